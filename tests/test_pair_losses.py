"""Losses on pairs against numbers worked out by hand."""

import math

import pytest
import torch

from mmrl.pair_losses import PAIR_LOSSES, PairScores, mixed_pair_loss, pair_loss, preference_loss


def test_preference_loss_by_hand():
    margin = torch.tensor([0.0, 0.01])
    assert preference_loss(margin, 100.0).tolist() == pytest.approx([math.log(2), math.log1p(math.exp(-1))])
    smooth = preference_loss(margin, 100.0, label_smoothing=0.25)
    assert smooth[1].item() == pytest.approx(0.75 * math.log1p(math.exp(-1)) + 0.25 * math.log1p(math.exp(1)))
