"""Trees and fans of denoising paths on a tiny Stable Diffusion 3: work, exact replay, gradient, credit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_diffusion_policy import PROMPTS, make, nudge

from mmrl import UserError
from mmrl.algorithms.credit import Credit
from mmrl.config import parse_config
from mmrl.scoring import Scorer
from mmrl.types import Rollout
from pipelines.branching import Branching
from pipelines.trace import shared_states
from pipelines.windows import noise_levels

LEVELS = [0.7, 0.5, 0.6, 0.4]
TREE = {"num_steps": 5, "batch_size": 4, "guidance": 1.0, "branching": Branching(at=[0, 2]), "noise_level": LEVELS}


def rows_of(policy, work) -> int:
    before = policy.counters["network_rows"]
    work()
    return policy.counters["network_rows"] - before


@pytest.fixture(scope="module")
def tree():
    policy = make(keep_mean=True, **TREE)
    nudge(policy)
    return policy, policy.rollout(PROMPTS, 4, seed=1)


def test_a_tree_runs_each_shared_step_once_in_rollout_and_replay(tree):
    policy, rollout = tree
    # Two trees with 1, 2, 2, 4 and 4 paths at their five steps, where eight samples apart take 40 rows.
    assert rows_of(policy, lambda: policy.rollout(PROMPTS, 4, seed=2)) == 2 * (1 + 2 + 2 + 4 + 4)
    for column, paths in enumerate([1, 2, 2, 4]):
        assert rows_of(policy, lambda column=column: policy.decisions(rollout, [column])) == 2 * paths
    assert rollout.group.tolist() == [0] * 4 + [1] * 4
    assert [len(column.unique()) for column in rollout.branch[:4].T] == [2, 2, 4, 4]
    assert rollout.branch[0, 0] == rollout.branch[1, 0] != rollout.branch[2, 0]


def test_a_tree_replays_exactly_with_the_noise_of_its_depth(tree):
    policy, rollout = tree
    replay = policy.decisions(rollout)
    assert torch.equal(replay.logp, rollout.logp)
    assert torch.equal(replay.mean, rollout.mean)
    assert torch.equal(replay.std, rollout.std)
    assert rollout.trace.noise.tolist() == [LEVELS] * 8
    z = (replay.action - replay.mean) / replay.std[..., None, None, None]
    assert abs(z.std().item() - 1) < 0.1
    assert rollout.trace.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 8
    assert rollout.trace.states.shape[:2] == (8, 6)


def test_rows_of_a_tree_are_samples_like_any_others(tree):
    """The gradient through shared forwards is that of each row by itself."""
    policy, rollout = tree

    def gradient(shared: Rollout) -> torch.Tensor:
        for parameter in policy.parameters:
            parameter.grad = None
        weight = torch.linspace(-1, 1, 32).view(8, 4)
        (policy.decisions(shared).logp * weight).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters])

    torch.testing.assert_close(gradient(rollout), gradient(replace(rollout, branch=None)), rtol=1e-3, atol=1e-5)
    part = rollout[[6, 1]]
    torch.testing.assert_close(policy.decisions(part).logp, part.logp, rtol=0, atol=1e-5)


def test_a_branch_is_a_function_of_seed_prompt_and_place(tree):
    policy, rollout = tree
    alone = policy.rollout(PROMPTS[1:], 4, seed=1)
    torch.testing.assert_close(alone.samples.images, rollout.samples.images[4:], rtol=0, atol=1e-5)
    images = rollout.samples.images[:4]
    assert all((images[a] - images[b]).abs().max() > 1e-3 for a in range(4) for b in range(a))


def test_a_fan_leaves_one_path_with_one_noisy_step_a_group():
    policy = make(num_steps=5, batch_size=4, guidance=1.0, window=[0, 2], branching=Branching(shape="fan"))
    nudge(policy)
    rollout = policy.rollout(PROMPTS, 4, seed=1)
    assert rollout.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rollout.trace.steps.flatten().tolist() == [0, 0, 2, 2] * 2
    # The path itself to its third step, and two samples from each of the two places it is left at.
    assert rows_of(policy, lambda: policy.rollout(PROMPTS, 4, seed=1)) == 2 * (3 + 2 * (4 + 2))
    found = []
    assert rows_of(policy, lambda: found.append(policy.decisions(rollout))) == 4
    assert torch.equal(found[0].logp, rollout.logp)
    # The path has no noise: what is left of it at any place is the picture of the deterministic sampler.
    plain = make(num_steps=5, batch_size=4, guidance=1.0, step="ode")
    nudge(plain)
    picture = plain.rollout(PROMPTS, 1, seed=1).samples.images
    torch.testing.assert_close(
        policy.complete(rollout, 0).images[[0, 2, 4, 6]], picture[[0, 0, 1, 1]], rtol=0, atol=1e-5
    )


def test_completions_of_states():
    """Each state's deterministic end; the prospect after the last decision is the sample itself."""
    policy = make(num_steps=5, batch_size=4, guidance=1.0, window=[1, 2])
    rollout = policy.rollout(PROMPTS, 2, seed=1)
    ode = make(num_steps=5, batch_size=4, guidance=1.0, step="ode").rollout(PROMPTS, 2, seed=1)
    found = []
    assert rows_of(policy, lambda: found.append(policy.complete(rollout, 0))) == 4 * 4
    torch.testing.assert_close(found[0].images, ode.samples.images, rtol=0, atol=1e-5)
    assert rows_of(policy, lambda: policy.complete(rollout, 1)) == 4 * 3
    assert rows_of(policy, lambda: found.append(policy.complete(rollout, 1, jump=True))) == 4
    torch.testing.assert_close(found[1].images, policy.jump_to_x0(rollout, 2).images, rtol=0, atol=1e-5)
    quiet = make(num_steps=5, batch_size=4, guidance=1.0, window=[1, 2], noise_level=[0.7, 1e-4])
    rollout = quiet.rollout(PROMPTS, 2, seed=1)
    torch.testing.assert_close(quiet.complete(rollout, 1).images, rollout.samples.images, rtol=0, atol=1e-3)


def test_completions_of_shared_states_are_made_once(tree):
    policy, rollout = tree
    assert rows_of(policy, lambda: policy.complete(rollout, 0)) == 2 * 5
    assert rows_of(policy, lambda: policy.complete(rollout, 2)) == 4 * 3
    rows, back = shared_states(rollout, 1)
    assert rows == [0, 2, 4, 6]
    assert back.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_credit_of_a_tree(tree):
    rollout = tree[1]
    scores = Scorer([lambda samples: samples.images.mean((1, 2, 3))])(rollout.samples)
    credit = Credit("tree", None, False, 1.0, 0.95, (0.0, 0.0), (1.0, 1.0))
    advantage, _ = credit(scores, rollout, rollout.mask)
    halves = scores.total.view(4, 2).mean(1)
    better = (halves[0::2] > halves[1::2]).repeat_interleave(4)
    first = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2) * 0.5**0.5 * torch.where(better, 1, -1)
    torch.testing.assert_close(advantage[:, 0], first, rtol=0.2, atol=0)
    assert torch.equal(advantage[:, 0], advantage[:, 1])
    assert torch.equal(advantage[:, 2], advantage[:, 3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"branching": Branching(at=[3]), "window": [0, 1]}, ["branching.at", "3", "[0, 1]"]),
        ({"branching": Branching(), "step": "ode"}, ["stochastic"]),
        ({"noise_level": [0.5, 0.5]}, ["noise_level", "2 numbers", "[0, 1, 2]"]),
        ({"noise_level": [0.5, 0.0, 0.5]}, ["noise_level", "0.0"]),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(UserError) as error:
        make(**options)
    assert all(word in str(error.value) for word in words)


def test_group_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"group_size 6 .* a tree here has 4 samples"):
        make(branching=Branching(at=[0, 1])).rollout(PROMPTS, 6, seed=1)


def test_advantage_tree_needs_branches():
    data = {
        "pipeline": {"type": "diffusion", "model": "some/model"},
        "data": {"prompts": ["a red circle"]},
        "rewards": ["jpeg"],
        "algorithm": {"type": "grpo", "advantage": "tree"},
    }
    with pytest.raises(UserError, match=r"pipeline\.branching"):
        parse_config(data)
    data["pipeline"]["branching"] = {"at": "first", "width": 8}
    assert parse_config(data).pipeline.options["branching"]["width"] == 8
    assert noise_levels(0.5, [1, 4]) == {1: 0.5, 4: 0.5}
