"""Shaping and factors: sums by hand, and a chain whose best policy shaping leaves alone."""

import pytest
import torch

from mmrl.errors import UserError
from mmrl.scoring import Scorer, Term
from mmrl.types import Episode, Prompt, Samples
from rewards import load_reward

FUNCTIONS = """
def first(states):
    return states[:, 0]

def square(states):
    return (states[:, 0] ** 2).tolist()

def short(states):
    return states[1:, 0]

def smooth(episode):
    return 1 - episode.actions.abs().amax((1, 2))

def half(episode):
    return 0.5

def large(episode):
    return 1.5
"""


@pytest.fixture
def functions(tmp_path):
    path = tmp_path / "potentials.py"
    path.write_text(FUNCTIONS)
    return path


def episode(states, terminated, rewards=None, actions=None, success=False) -> Episode:
    states = torch.tensor(states, dtype=torch.float32)[:, None]
    turns = len(states) - 1
    return Episode(
        rewards=torch.zeros(turns, 1) if rewards is None else torch.tensor(rewards),
        executed=torch.ones(turns, dtype=torch.long),
        actions=torch.zeros(turns, 1, 1) if actions is None else torch.tensor(actions),
        success=success,
        terminated=terminated,
        states=states,
    )


def of(*episodes) -> Samples:
    return Samples([Prompt(id=f"start-{n}") for n in range(len(episodes))], episodes=list(episodes))


def test_shaping_telescopes(functions):
    samples = of(episode([1.0, 4.0, 2.0, 7.0], True), episode([3.0, 5.0], False))
    reward = load_reward("shaping", potential=f"{functions}:first", discount=0.5)
    assert reward.turns(samples) == [[1.0, -3.0, -2.0], [-0.5]]
    for row, turns in enumerate(reward.turns(samples)):
        discounted = sum(0.5**k * part for k, part in enumerate(turns))
        one = samples.episodes[row]
        end = 0.0 if one.terminated else 0.5**one.turns * one.states[-1, 0].item()
        assert discounted == pytest.approx(end - one.states[0, 0].item())
    ends = load_reward("shaping", potential=f"{functions}:first", discount=0.5, time_limit="ends")
    assert ends.turns(samples)[1] == [-3.0]
    # With discount 1 and all ends alike, the sum is a function of the start alone.
    plain = load_reward("shaping", potential=f"{functions}:square", time_limit="ends")
    assert plain(samples).tolist() == [-1.0, -9.0]
    scorer = Scorer([Term(load_reward("episode_return")), Term(reward, weight=2.0)])
    assert scorer.turns(samples) == [[2.0, -6.0, -4.0], [-1.0]]
    assert scorer(samples).total.tolist() == [-8.0, -1.0]


GAMMA = 0.9
END = 4


def step(state: int, action: int) -> tuple[int, float]:
    """A chain of five states: 1 for its right end, where it is over, and a little for each stay at the left one."""
    after = min(max(state + (1 if action else -1), 0), END)
    return after, 1.0 if after == END else 0.08 if after == state == 0 else 0.0


def best_actions(bonus) -> tuple[list[int], torch.Tensor]:
    """Greedy actions and Q ``[4, 2]`` after value iteration, with ``bonus(state, after)`` added to the reward."""
    moves = [[step(state, action) for action in range(2)] for state in range(END)]
    rewards = torch.tensor([[r + bonus(state, to) for to, r in row] for state, row in enumerate(moves)]).double()
    after = torch.tensor([[to for to, _ in row] for row in moves])
    q = torch.zeros_like(rewards)
    for _ in range(300):
        q = rewards + GAMMA * torch.cat([q.max(1).values, torch.zeros(1)])[after]
    return q.argmax(1).tolist(), q


def test_shaping_leaves_the_best_policy_alone(functions, tmp_path):
    (tmp_path / "table.py").write_text(
        "import torch\nPOTENTIAL = torch.tensor([3.0, -1.0, 0.5, -2.0, 6.0])\n\n"
        "def potential(states):\n    return POTENTIAL[states[:, 0].long()]\n"
    )
    potential = torch.tensor([3.0, -1.0, 0.5, -2.0, 6.0])
    shaping = load_reward("shaping", potential=f"{tmp_path}/table.py:potential", discount=GAMMA)

    def shaped(state, after):
        (turns,) = shaping.turns(of(episode([state, after], terminated=after == END)))
        return turns[0]

    plain, q = best_actions(lambda state, after: 0.0)
    with_shaping, shaped_q = best_actions(shaped)
    assert with_shaping == plain
    assert plain == [0, 1, 1, 1]
    # Not only the order: all actions of a state lose its potential.
    assert torch.allclose(shaped_q, q - potential[:END, None].double(), atol=1e-6)
    # The same numbers as a plain bonus do change the policy.
    assert best_actions(lambda state, after: potential[after].item())[0] != plain


def test_factors_multiply_turn_by_turn(functions):
    one = episode([0.0, 1.0, 2.0], True, [[2.0], [4.0]], [[[0.25]], [[1.0]]], success=True)
    two = episode([0.0, 1.0], False, [[1.0]], [[[0.5]]])
    samples = of(one, two)
    factors = [f"{functions}:smooth", f"{functions}:half"]
    reward = load_reward("penalised", of={"type": "episode_return"}, factors=factors)
    assert reward.turns(samples) == [[0.75, 0.0], [0.25]]
    assert reward(samples).tolist() == [0.75, 0.25]
    success = load_reward("penalised", of={"type": "success"}, factors=[f"{functions}:half"])
    assert success.turns(samples) == [[0.0, 0.5], [0.0]]
    wrong = load_reward("penalised", of={"type": "success"}, factors=[f"{functions}:large"])
    with pytest.raises(UserError, match=r"large' gave 1.5 for the 2 turns of sample 0 \(prompt 'start-0'"):
        wrong(samples)


def test_wrong_potentials_are_named(functions):
    samples = of(episode([0.0, 1.0, 2.0], True))
    with pytest.raises(UserError, match=r"gave \[2\] numbers for the 3 states of sample 0"):
        load_reward("shaping", potential=f"{functions}:short")(samples)
    samples.episodes[0].states = None
    with pytest.raises(UserError, match="observations have none"):
        load_reward("shaping", potential=f"{functions}:first")(samples)
    with pytest.raises(UserError, match="'success' has no potentials"):
        load_reward("shaping", potential={"type": "success"})
