"""Rewards of episodes, against sums by hand."""

import pytest
import torch

from mmrl.errors import UserError
from mmrl.scoring import Scorer, Term
from mmrl.types import Episode, Prompt, Samples
from rewards import load_reward


def episode(rewards, success=False, **more) -> Episode:
    rewards = torch.tensor(rewards)
    turns, actions = rewards.shape
    return Episode(
        rewards=rewards,
        executed=torch.full((turns,), actions),
        actions=torch.zeros(turns, actions, 2),
        success=success,
        terminated=success,
        **more,
    )


def of(*episodes) -> Samples:
    return Samples([Prompt(id=f"start-{n}") for n in range(len(episodes))], episodes=list(episodes))


TWO = of(episode([[1.0, 2.0], [0.5, 0.0]], success=True), episode([[-1.0], [0.25], [0.0]]))


def test_success():
    assert load_reward("success")(TWO).tolist() == [1.0, 0.0]


def test_return_belongs_to_its_turns():
    reward = load_reward("episode_return")
    assert reward(TWO).tolist() == [3.5, -0.75]
    assert reward.turns(TWO) == [[3.0, 0.5], [-1.0, 0.25, 0.0]]
    scorer = Scorer([Term(reward, scale=2.0), Term(load_reward("success"), weight=10.0)])
    assert scorer(TWO).total.tolist() == [17.0, -1.5]
    # The end pays for success: it has no turns of its own, and the rest of a total belongs to the last turn.
    assert scorer.turns(TWO) == [[6.0, 1.0], [-2.0, 0.5, 0.0]]


@pytest.mark.parametrize("name", ["success", "episode_return"])
def test_other_samples(name):
    with pytest.raises(UserError, match=f"'{name}' scores episodes of an environment"):
        load_reward(name)(Samples([Prompt()], texts=["a"]))
