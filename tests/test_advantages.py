"""Advantages against hand-computed numbers and invariants."""

import math

import pytest
import torch

from mmrl.advantages import (
    constant_groups,
    decoupled_advantages,
    discounted_returns,
    generalized_advantages,
    group_advantages,
    last_decision_rewards,
    soft_advantages,
    whiten,
)
from mmrl.algorithms.credit import Credit
from mmrl.algorithms.pairs import pair_up
from mmrl.errors import UserError
from mmrl.scoring import Scorer, Term
from mmrl.types import Prompt, Rollout, Samples

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


def test_opo_gpg_and_pass_at_k_by_hand():
    lengths = torch.tensor([1, 1, 2, 1, 1, 1, 3, 1])
    # (1 + 2 + 2 * 3) / 4 = 2.25 and (3 * 0 + 4) / 4 = 1
    out = group_advantages(SCORES, GROUP, "opo", lengths=lengths)
    assert out.tolist() == pytest.approx([-1.25, -0.25, 0.75, 0, 0, 0, -1, 3])
    # Five of eight samples are in groups with a spread.
    out = group_advantages(SCORES, GROUP, "gpg")
    assert out.tolist() == pytest.approx([-1.6, 0, 1.6, 0, 0, 0, -3.2, 3.2])
    out = group_advantages(SCORES, GROUP, "pass_at_k", eps=0.0)
    assert out.tolist() == pytest.approx([0, 0, 1, 0, 0, 0, 0, 4 / 8**0.5])


MASK = torch.tensor([[True, True, False, True], [True, False, False, False]])


def test_the_last_decision_gets_the_reward():
    rewards = last_decision_rewards(torch.tensor([2.0, torch.nan]), MASK)
    assert rewards.tolist() == [[0, 0, 0, 2], [0, 0, 0, 0]]


def test_returns_skip_masked_decisions():
    rewards = torch.tensor([[1.0, 0.0, 9.0, 4.0], [3.0, 9.0, 9.0, 9.0]])
    # 1 + (0 + 4 / 2) / 2 = 2
    assert discounted_returns(rewards, MASK, 0.5).tolist() == [[2, 2, 0, 4], [3, 0, 0, 0]]


def test_gae_by_hand():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]])
    values = torch.tensor([[0.5, 0.25, 9.0, 0.5], [1.0, 9.0, 9.0, 9.0]])
    advantage, returns = generalized_advantages(rewards, values, MASK, gamma=1.0, lam=0.5)
    # deltas: last 1 - 0.5; second 0.5 - 0.25 (the value after the masked decision); first 0.25 - 0.5
    expected = [[-0.25 + 0.5 * (0.25 + 0.5 * 0.5), 0.25 + 0.5 * 0.5, 0, 0.5], [1, 0, 0, 0]]
    assert advantage.tolist() == expected
    assert returns.tolist() == [[expected[0][0] + 0.5, 0.75, 0, 1], [2, 0, 0, 0]]


def test_gae_with_lambda_1_is_return_minus_value():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 6).unbind(0)
    mask = torch.rand(3, 6) > 0.3
    advantage, returns = generalized_advantages(rewards, values, mask, gamma=0.9, lam=1.0)
    expected = discounted_returns(rewards, mask, 0.9)
    assert torch.allclose(returns, expected, atol=1e-6)
    assert torch.allclose(advantage, (expected - values) * mask, atol=1e-6)


def test_whitening_is_over_unmasked_decisions():
    torch.manual_seed(0)
    values = torch.randn(2, 4) * 3 + 1
    out = whiten(values, MASK)
    assert out[MASK].mean().item() == pytest.approx(0, abs=1e-6)
    assert out[MASK].std().item() == pytest.approx(1, abs=1e-5)
    assert (out[~MASK] == 0).all()


def test_soft_advantages_keep_order_and_slope_at_zero():
    advantage = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    out = soft_advantages(advantage, 1.0, 0.5)
    assert out.tolist() == pytest.approx([-2 * (math.e - 1), -2 * (math.e**0.5 - 1), 0, math.log(2), math.log(3)])
    assert torch.equal(soft_advantages(advantage, 0.0, 0.0), advantage)


def test_turns_earn_their_own_rewards():
    """Two turns with an answer of a tool between them: what the first earned is at its last token."""

    class Polite:
        name, differentiable = "polite", False

        def __call__(self, samples):
            return [3.0, 1.0]

        def turns(self, samples):
            return [[2.0, 0.5], [1.0]]

    def dialogue(*texts):
        return [{"role": "assistant", "text": text} for text in texts]

    samples = Samples([Prompt("a"), Prompt("b")], texts=["y", "z"], transcripts=[dialogue("x", "y"), dialogue("z")])
    scorer = Scorer([Term(Polite(), weight=0.5)])
    mask = torch.tensor([[True, True, False, True], [True, True, False, False]])
    rollout = Rollout(samples, torch.zeros(2, 4), mask, torch.tensor([0, 1]))
    turns = scorer.turns(samples)
    assert turns == [[1.0, 0.25], [0.5]]
    credit = Credit("returns", None, False, 1.0, 1.0, (0.0, 0.0), (1.0, 1.0))
    advantage, _ = credit(scorer(samples), rollout, mask, turns=turns)
    # The total of the first is 1.5, of which 0.25 is left for its last token.
    assert advantage.tolist() == [[1.5, 1.5, 0, 0.5], [0.5, 0.5, 0, 0]]
    plain, _ = credit(scorer(samples), rollout, mask)
    assert plain.tolist() == [[1.5, 1.5, 0, 1.5], [0.5, 0.5, 0, 0]]


def test_a_reward_must_name_every_turn():
    class Short:
        name = "short"

        def __call__(self, samples):
            return [1.0]

        def turns(self, samples):
            return [[1.0, 2.0]]

    samples = Samples([Prompt("a", id="row 3")], texts=["x"], transcripts=[[{"role": "assistant", "text": "x"}]])
    with pytest.raises(UserError, match=r"reward 'short' gave \[1.0, 2.0\] for the 1 turns of sample 0 .*row 3"):
        Scorer([Short()]).turns(samples)
