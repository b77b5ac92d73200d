"""Advantages, discounts and clip bounds of decisions that belong to turns."""

import math
import random

import pytest
import torch

from mmrl.advantages import generalized_advantages
from mmrl.algorithms.credit import Credit
from mmrl.algorithms.turns import ClipSchedule, Turns, discount_factor, turns_of
from mmrl.scoring import Scores
from mmrl.types import Prompt, Rollout, Samples


def plain_gae(rewards, values, final_value, gamma, lam):
    """One episode, written as the sum of discounted errors: ``A_t = sum_k (gamma lam)^k delta_{t+k}``."""
    values = [*values, final_value]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def test_advantages_of_random_episodes_equal_the_plain_sum():
    rng, width = random.Random(0), 9
    for _ in range(50):
        lengths = [rng.randrange(1, width + 1) for _ in range(4)]
        rewards, values = torch.randn(4, width), torch.randn(4, width)
        mask = torch.arange(width) < torch.tensor(lengths)[:, None]
        # Terminated episodes have nothing to come, truncated ones what the critic says.
        final = torch.randn(4) * torch.tensor([rng.random() < 0.5 for _ in range(4)])
        gamma, lam = rng.uniform(0.8, 1), rng.uniform(0.5, 1)
        found, returns = generalized_advantages(rewards * mask, values * mask, mask, gamma, lam, final)
        for row, length in enumerate(lengths):
            expected = plain_gae(
                rewards[row, :length].tolist(), values[row, :length].tolist(), final[row].item(), gamma, lam
            )
            torch.testing.assert_close(found[row, :length], torch.tensor(expected), atol=1e-5, rtol=1e-5)
            assert not found[row, length:].any()
        torch.testing.assert_close(returns, (found + values) * mask)


def episode_rollout(turns, per_turn, final_value):
    """Rows of ``turns[i]`` turns with ``per_turn`` decisions each."""
    width = max(turns) * per_turn
    turn = (torch.arange(width) // per_turn).expand(len(turns), -1).clone()
    mask = turn < torch.tensor(turns)[:, None]
    value = torch.randn(len(turns), max(turns)).repeat_interleave(per_turn, 1)
    rollout = Rollout(
        Samples([Prompt("go")] * len(turns)),
        logp=torch.zeros(len(turns), width),
        mask=mask,
        group=torch.arange(len(turns)),
        value=value,
        turn=turn,
        final_value=final_value,
    )
    return rollout


def credit(method, **options):
    return Credit(method, None, False, options.get("gamma", 0.9), 0.8, (0.0, 0.0), (1.0, 1.0))


def scores_of(total):
    return Scores(total=total, values=total[:, None], each={"r": total}, weights=torch.ones(1), seconds={})


@pytest.mark.parametrize("method", ["gae", "returns"])
def test_decisions_of_a_turn_share_what_their_turn_earned(method):
    turns, final = [3, 1, 2], torch.tensor([0.0, 0.7, -0.2])
    earned = [[0.1, 0.0, 1.0], [0.5], [0.2, 0.3]]
    total = torch.tensor([sum(row) for row in earned])
    one = episode_rollout(turns, 1, final)
    many = episode_rollout(turns, 4, final)
    many.value = one.value.repeat_interleave(4, 1)
    found_one, _ = credit(method)(scores_of(total), one, one.mask, turns=earned)
    found_many, returns = credit(method)(scores_of(total), many, many.mask, turns=earned)
    torch.testing.assert_close(found_many, found_one.repeat_interleave(4, 1) * many.mask)
    for row, count in enumerate(turns):
        if method == "gae":
            expected = plain_gae(earned[row], one.value[row, :count].tolist(), final[row].item(), 0.9, 0.8)
        else:
            following, expected = final[row].item(), []
            for reward in reversed(earned[row]):
                following = reward + 0.9 * following
                expected.insert(0, following)
        torch.testing.assert_close(found_one[row, :count], torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert (returns is None) == (method == "returns")


def test_a_turn_that_lost_some_decisions_keeps_the_places_of_the_others():
    turn = torch.tensor([[0, 0, 0, 1, 1, 1]])
    mask = torch.tensor([[False, True, True, True, False, True]])
    place, count = Turns(turn, mask).places()
    assert place.tolist() == [[0, 0, 1, 0, 0, 1]]
    assert count.tolist() == [[2] * 6]
    factor = discount_factor(place, count, 0.5)
    assert factor[mask].tolist() == [0.5, 1.0, 0.5, 1.0]


def test_a_sample_without_turns_is_one_turn():
    rollout = Rollout(Samples([Prompt("a")] * 2), torch.zeros(2, 3), torch.ones(2, 3) > 0, torch.arange(2))
    place, count = turns_of(rollout, rollout.mask).places()
    assert place.tolist() == [[0, 1, 2]] * 2
    assert count.tolist() == [[3] * 3] * 2


def test_clip_bounds_follow_the_published_schedule():
    schedule = ClipSchedule(first=0.1, rate=3.0)
    place, count = torch.arange(5)[None], torch.full((1, 5), 5)
    start, end = 0.001, 0.01
    published = [start + (end - start) * (math.exp(3 * i / 4) - 1) / (math.exp(3) - 1) for i in range(5)]
    torch.testing.assert_close(end * schedule.scale(place, count), torch.tensor([published]))
    # One trained step: the published formula divides 0 by 0; its bound is the clip range.
    assert schedule.scale(torch.tensor([[0]]), torch.tensor([[1]])).item() == 1.0
