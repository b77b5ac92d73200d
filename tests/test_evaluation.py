"""Held-out evaluation: proportions with intervals, and moving pictures of the first episodes."""

import io
import json
import math

import pytest
import torch
from rich.console import Console
from table_policy import HERE, table_config, train

from mmrl.display import Display
from mmrl.evaluation import Evaluation, wilson_interval
from mmrl.media import clip_frames
from mmrl.scoring import Scorer
from mmrl.seeding import generator
from mmrl.types import Episode, Prompt, Samples
from rewards import load_reward


def test_interval_ends_where_the_normal_test_does():
    # Wilson's ends are the probabilities p with |share - p| = z sqrt(p (1 - p) / count); 0 and 1 are kept where exact.
    for good, count in ((0, 10), (453, 1000), (7, 9), (20, 20)):
        share = good / count
        low, high = wilson_interval(share, count)
        assert 0 <= low < high <= 1
        for end in (low, high):
            if end not in (share, 0.0, 1.0):
                assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count))
    assert wilson_interval(0.453, 1000) == pytest.approx((0.4224, 0.4840), abs=1e-4)


class Walker:
    """Acts in a world of its own: an episode is a function of the prompt's seed."""

    batch_size = 4

    def __init__(self):
        self.record = 0

    def generate(self, prompts, seeds, grad_steps=0):
        return Samples(list(prompts), episodes=[self._episode(p, k < self.record) for k, p in enumerate(prompts)])

    def _episode(self, prompt, record):
        draws = generator(prompt.inputs["seed"], "world")
        turns = int(torch.randint(2, 6, (), generator=draws))
        success = bool(torch.rand((), generator=draws) < 0.4)
        frames = None
        if record:
            frames = torch.zeros(turns + 1, 3, 16, 16, dtype=torch.uint8)
            for turn in range(turns + 1):
                frames[turn, turn % 3, 2 * turn : 2 * turn + 4, 4:8] = 255
        return Episode(
            rewards=torch.rand(turns, 2, generator=draws),
            executed=torch.full((turns,), 2),
            actions=torch.zeros(turns, 2, 1),
            success=success,
            terminated=success,
            frames=frames,
        )


def starts(count):
    return [Prompt("push the puck", id=f"start-{k}", inputs={"seed": k}) for k in range(count)]


def scorer():
    return Scorer([load_reward("success"), load_reward("episode_return")])


def test_a_share_of_successes_has_an_interval():
    prompts = starts(50)
    found = Evaluation(prompts, 1, 0, scorer())(Walker(), 0)
    episodes = Walker().generate(prompts, range(50)).episodes
    good = sum(one.success for one in episodes)
    assert 0 < good < 50
    assert found["eval/success/mean"] == good / 50
    assert (found["eval/success/low"], found["eval/success/high"]) == wilson_interval(good / 50, 50)
    assert found["eval/success/count"] == 50
    returns = [one.rewards.sum().item() for one in episodes]
    assert found["eval/episode_return/mean"] == pytest.approx(sum(returns) / 50)
    assert not any(key.startswith(("eval/episode_return/low", "eval/reward/low")) for key in found)
    assert found["eval/reward"] == pytest.approx(good / 50 + sum(returns) / 50)
    out = io.StringIO()
    Display(console=Console(file=out, width=200)).evaluation(0, found)
    low, high = wilson_interval(good / 50, 50)
    assert f"success {good / 50:.3f} [{low:.3f}, {high:.3f}] of 50" in out.getvalue()


def test_the_first_episodes_are_films(tmp_path):
    policy = Walker()
    Evaluation(starts(1001), 1, 0, scorer(), record=6)(policy, 0, tmp_path)
    assert policy.record == 0
    rows = json.loads((tmp_path / "scores.json").read_text())
    assert [row["name"] for row in rows] == [f"{k:04d}-0" for k in range(1001)]
    assert [row["prompt_id"] for row in rows if "file" in row] == [f"start-{k}" for k in range(6)]
    expected = policy.generate(starts(1), [0]).episodes[0]
    assert len(clip_frames(tmp_path / rows[0]["file"])) == expected.turns + 1
    assert not list(tmp_path.glob("*-1.*"))


def test_nothing_is_drawn_without_a_folder():
    policy = Walker()
    seen = []
    plain, policy.generate = policy.generate, lambda *args: seen.append(policy.record) or plain(*args)
    Evaluation(starts(5), 1, 0, scorer())(policy, 0)
    assert seen == [0, 0]


def test_summary_of_a_run_names_rewards_plainly(tmp_path):
    rewards = [{"type": f"{HERE}:exact"}, {"type": f"{HERE}:share_right"}]
    summary = train(
        table_config(tmp_path / "run", {"type": "grpo", "group_size": 4}, rewards=rewards, trainer={"steps": 2})
    )
    after = summary["eval"]["after"]
    assert after["exact"] == after["exact/mean"]
    assert after["share_right"] == after["share_right/mean"]
    assert after["reward"] == pytest.approx(after["exact"] + after["share_right"])
    assert after["exact/low"] <= after["exact"] <= after["exact/high"]
    assert after["exact/count"] == 4
