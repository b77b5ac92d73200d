"""Advantages against hand-computed numbers and invariants."""

import pytest
import torch

from mmrl.advantages import constant_groups, decoupled_advantages, group_advantages
from mmrl.algorithms.preference import pair_up

SCORES = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0, 0.0, 4.0])
GROUP = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])


def test_group_by_hand():
    out = group_advantages(SCORES, GROUP, "group", eps=0.0)
    assert out.tolist() == pytest.approx([-1, 0, 1, 0, 0, 0, -(0.5**0.5), 0.5**0.5])


def test_mean_rloo_and_none():
    assert group_advantages(SCORES, GROUP, "mean").tolist() == pytest.approx([-1, 0, 1, 0, 0, 0, -2, 2])
    # RLOO: 1 - (2 + 3) / 2 = -1.5
    assert group_advantages(SCORES, GROUP, "rloo").tolist() == pytest.approx([-1.5, 0, 1.5, 0, 0, 0, -4, 4])
    assert group_advantages(SCORES, GROUP, "none").tolist() == SCORES.tolist()


def test_batch_and_global_std():
    out = group_advantages(SCORES, GROUP, "batch", eps=0.0)
    assert out.tolist() == pytest.approx((torch.tensor([-1.0, 0, 1, 0, 0, 0, -2, 2]) / SCORES.std()).tolist())
    out = group_advantages(SCORES, GROUP, "global", eps=0.0)
    assert out.tolist() == pytest.approx(((SCORES - SCORES.mean()) / SCORES.std()).tolist())


@pytest.mark.parametrize("method", ["group", "mean", "batch", "rloo"])
def test_missing_scores_change_nothing_for_the_others(method):
    scores = torch.cat([SCORES, torch.tensor([torch.nan, torch.nan])])
    group = torch.cat([GROUP, torch.tensor([0, 3])])
    out = group_advantages(scores, group, method)
    assert torch.allclose(out[:8], group_advantages(SCORES, GROUP, method))
    assert out[8:].tolist() == [0.0, 0.0]


def test_rounding_noise_is_no_signal():
    scores = torch.tensor([0.1 + 0.2, 0.3, 0.30000001, 0.3])
    assert constant_groups(scores, torch.zeros(4, dtype=torch.long)).all()
    assert group_advantages(scores, torch.zeros(4, dtype=torch.long)).tolist() == [0.0] * 4


def test_order_of_rows_does_not_matter():
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for method in ("group", "mean", "batch", "rloo", "global"):
        out = group_advantages(SCORES, GROUP, method)
        assert torch.allclose(group_advantages(SCORES[order], GROUP[order], method), out[order])


def test_decoupled_is_blind_to_the_scale_of_a_reward():
    torch.manual_seed(0)
    table = torch.rand(8, 2)
    weights = torch.tensor([1.0, 0.5])
    plain = decoupled_advantages(table, weights, GROUP, eps=0.0)
    scaled = decoupled_advantages(table * torch.tensor([1.0, 1000.0]), weights, GROUP, eps=0.0)
    assert torch.allclose(plain, scaled, atol=1e-4)
    assert plain.mean().item() == pytest.approx(0, abs=1e-6)
    assert plain.std().item() == pytest.approx(1, abs=1e-5)


def test_pairs_are_best_against_worst_within_a_group():
    scores = torch.tensor([1.0, 3.0, 2.0, 0.0, 5.0, 5.0, torch.nan, 1.0])
    group = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    winners, losers = pair_up(scores, group, per_group=1)
    assert (winners.tolist(), losers.tolist()) == ([1], [3])
    winners, losers = pair_up(scores, group, per_group=2)
    assert (winners.tolist(), losers.tolist()) == ([1, 2], [3, 0])
