"""Rewards that a model has written: what they compute, what they may not do, and what is said when they fail."""

import pytest
import torch

from mmrl.errors import UserError
from mmrl.scoring import Scorer
from mmrl.types import Episode, Prompt, Samples
from rewards import load_reward

GOOD = """
import math

def reward(state, action, next_state):
    near = -np.linalg.norm(next_state[:2])
    return near - 0.5 * (action ** 2).sum() + math.floor(state[2])
"""


def samples() -> Samples:
    generator = torch.Generator().manual_seed(0)
    episodes = []
    for turns, executed in ((3, [2, 2, 1]), (1, [2])):
        actions = torch.randn(turns, 2, 4, generator=generator)
        episodes.append(
            Episode(
                rewards=torch.zeros(turns, 2),
                executed=torch.tensor(executed),
                actions=actions,
                success=False,
                terminated=True,
                states=torch.randn(turns + 1, 3, generator=generator),
            )
        )
    return Samples([Prompt(id="start-0"), Prompt(id="start-1")], episodes=episodes)


def write(folder, code):
    path = folder / "written.py"
    path.write_text(code)
    return str(path)


def test_it_is_the_function_on_every_turn(tmp_path):
    reward = load_reward("reward_code", file=write(tmp_path, GOOD))
    batch = samples()
    expected = [
        [
            -one.states[c + 1, :2].norm().item()
            - 0.5 * one.actions[c, : one.executed[c]].square().sum().item()
            + one.states[c, 2].floor().item()
            for c in range(one.turns)
        ]
        for one in batch.episodes
    ]
    for found, one in zip(reward.turns(batch), expected, strict=True):
        assert found == pytest.approx(one, abs=1e-5)
    assert reward(batch).tolist() == pytest.approx([sum(one) for one in expected], abs=1e-5)
    assert reward.turns(batch) == reward.turns(batch)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return s[7]", r"written.py, line 2: IndexError"),
        ("return 'much'", r"written.py, ValueError"),
        ("import socket; socket.socket()", r"line 2: PermissionError"),
        ("open('/tmp/elsewhere', 'w')", r"line 2: PermissionError"),
        ("import os; os._exit(0)", r"took more than 1 s or 2048 MB"),
        ("while True: pass", r"took more than 1 s"),
        ("open('scores.json', 'w').write('[1]'); import os; os._exit(0)", r"took more than"),
    ],
)
def test_failures_are_named(tmp_path, body, words):
    reward = load_reward("reward_code", file=write(tmp_path, f"def reward(s, a, t):\n    {body}"), seconds=1)
    with pytest.raises(UserError, match=words):
        reward(samples())


def test_a_score_that_is_no_number_names_its_sample(tmp_path):
    scorer = Scorer([load_reward("reward_code", file=write(tmp_path, "def reward(s, a, t):\n    return s[0] / 0 * 0"))])
    with pytest.raises(UserError, match=r"sample 0 \(prompt 'start-0'"):
        scorer(samples())


def test_files_are_checked_before_anything_runs(tmp_path):
    for code, words in (
        ("def reward(", r"written.py, line 1: "),
        ("def other():\n    pass", r"does not define reward\(state, action, next_state\)"),
    ):
        with pytest.raises(UserError, match=words):
            load_reward("reward_code", file=write(tmp_path, code))
    with pytest.raises(UserError, match="there is no file"):
        load_reward("reward_code", file=str(tmp_path / "none.py"))
    batch = samples()
    batch.episodes[1].states = None
    with pytest.raises(UserError, match=r"sample 1 \(prompt 'start-1'.*\) has none"):
        load_reward("reward_code", file=write(tmp_path, GOOD))(batch)
