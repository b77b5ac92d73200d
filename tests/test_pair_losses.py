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


def pair(better=0.4, worse=-0.2):
    """Log-ratios as given; log-probs -2 and -6 over 4 and 3 decisions."""
    numbers = (-2.0, -6.0, better, worse, 4.0, 3.0)
    return PairScores(*(torch.tensor([x]) for x in numbers))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


BETA = 0.5
BY_HAND = {
    "sigmoid": -math.log(sigmoid(0.3)),
    "robust": (-0.9 * math.log(sigmoid(0.3)) + 0.1 * math.log(sigmoid(-0.3))) / 0.8,
    "ipo": (0.1 + 0.2 / 3 - 1.0) ** 2,
    "hinge": 0.7,
    "sigmoid_norm": -math.log(sigmoid(0.5 * (0.1 + 0.2 / 3))),
    "bco_pair": -math.log(sigmoid(0.2)) - math.log(sigmoid(0.1)),
    "nca_pair": -math.log(sigmoid(0.2)) - 0.5 * math.log(sigmoid(-0.2)) - 0.5 * math.log(sigmoid(0.1)),
    "exo_pair": sigmoid(0.3) * (math.log(sigmoid(0.3)) - math.log(0.9))
    + sigmoid(-0.3) * (math.log(sigmoid(-0.3)) - math.log(0.1)),
    "sppo_hard": 0.6**2 + 0.8**2,
    "apo_zero": 1 - sigmoid(0.2) + sigmoid(-0.1),
    "apo_down": sigmoid(0.2) + 1 - sigmoid(0.3),
    "simpo": -math.log(sigmoid(0.5 * (-0.5 + 2.0) - 0.5)),
    "orpo": 0.5 - 0.5 * math.log(sigmoid(-0.5 + 2.0 - math.log(1 - math.exp(-0.5)) + math.log(1 - math.exp(-2.0)))),
    "sft": 0.5,
}


@pytest.mark.parametrize("kind", PAIR_LOSSES)
def test_pair_losses_by_hand(kind):
    smoothing = 0.1 if kind in ("robust", "exo_pair") else 0.0
    assert pair_loss(kind, pair(), BETA, smoothing, gamma=0.5).item() == pytest.approx(BY_HAND[kind], rel=1e-5)


def test_mixture_is_the_weighted_sum():
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}
    expected = sum(weight * BY_HAND[kind] for kind, weight in weights.items())
    assert mixed_pair_loss(weights, pair(), BETA).item() == pytest.approx(expected, rel=1e-5)


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="slic"):
        pair_loss("slic", pair(), BETA)
