"""Robot policies: replays, episodes of unequal length, statistics, folders, and what is refused."""

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from mmrl.errors import UserError
from mmrl.types import Prompt, Rollout, Samples
from pipelines import RobotPolicy
from pipelines.robot.envs import Envs, make_envs
from pipelines.robot.heads.denoising import FlowHead
from pipelines.robot.policy import ROWS

ENVS = str(Path(__file__).with_name("odd_envs.py"))
WALK = {"env": f"{ENVS}:Walk", "env_options": {"processes": 0, "max_steps": 20}}
PROMPTS = [Prompt(id=f"start-{seed}", text="walk", inputs={"seed": seed}) for seed in (0, 3, 5, 8)]
"""Walks of 2, 5, 7 and 3 steps."""


@functools.cache
def walks() -> Envs:
    """Shared, since an episode depends on its seed alone."""
    return make_envs(WALK["env"], 16, **WALK["env_options"])


def policy(head="flow", **options) -> RobotPolicy:
    torch.manual_seed(0)
    if "env_options" in options or "envs" in options:
        options = WALK | options
    options = {"env": walks(), "horizon": 2, "envs": 16, "normalise": "none"} | options
    head = {"type": head} if isinstance(head, str) else head
    return RobotPolicy("mlp", action_head={"hidden": [16]} | head, **options)


REDUCTIONS = [(steps, actions) for steps in ("step", "mean", "sum") for actions in ("mean", "sum")]
DENOISING = {
    "flow_sde": {"type": "flow", "step": "flow_sde"},
    "cps": {"type": "flow", "step": "cps"},
    "dance": {"type": "flow", "step": "dance"},
    "floor": {"type": "flow", "step": "ode", "min_std": 0.1, "min_logp_std": 0.2, "noise_clip": 2.0},
    "learned": {"type": "flow", "learned_std": [0.08, 0.2], "logp_clamp": [-5.0, 2.0]},
    "ddpm": {"type": "diffusion", "min_std": 0.05},
    "ddim": {"type": "diffusion", "diffusion_steps": 20, "eta": 0.7, "train_steps": 1, "early": "frozen"},
    "random": {"type": "flow", "step": "flow_sde", "train_steps": "random"},
}


@pytest.mark.parametrize("num_steps", [1, 2, 4, 10])
@pytest.mark.parametrize("name", DENOISING)
def test_the_ratio_is_exactly_1_before_the_first_update(name, num_steps):
    head = DENOISING[name]
    if num_steps == 1 and name in ("flow_sde", "cps", "dance", "random", "ddim"):
        head = head | {"min_std": 0.1}
    for over_steps, over_actions in REDUCTIONS:
        robot = policy(head | {"over_steps": over_steps, "over_actions": over_actions}, num_steps=num_steps)
        check_replay(robot)


@pytest.mark.parametrize("options", [{}, {"train_std": True, "over_actions": "sum"}])
def test_the_ratio_of_a_gaussian_head_is_exactly_1(options):
    check_replay(policy({"type": "gaussian", **options}, value_head=True))


def check_replay(robot: RobotPolicy) -> None:
    with torch.no_grad():
        rollout = robot.rollout(PROMPTS, 3, seed=1)
        found = robot.decisions(rollout)
        assert rollout.mask.any(1).all()
        assert not rollout.mask.all()
        assert torch.equal(found.logp[rollout.mask], rollout.logp[rollout.mask])
        # Parts of rows and of columns, in any order, are the same numbers.
        rows, columns = torch.tensor([7, 2, 4]), [rollout.logp.shape[1] - 1, 0]
        part = robot.decisions(rollout[rows], columns)
        assert torch.equal(part.logp, found.logp[rows][:, columns])


class Inclusive(FlowHead):
    """ReinFlow's fault: the sampler's times run from one end to the other, the scorer's stop a step before."""

    def sample(self, context, draws, deterministic=False):
        self.times = torch.linspace(1, 0, self.steps)
        found = super().sample(context, draws, deterministic)
        self.times = torch.tensor([1 - k / self.steps for k in range(self.steps)])
        return found


def test_a_sampler_that_differs_from_the_scorer_is_caught():
    robot = policy({"type": f"{__file__}:Inclusive", "learned_std": [0.1, 0.2]}, num_steps=4)
    with pytest.raises(UserError, match="does not score what it sampled: the log-prob of decision"):
        robot.rollout(PROMPTS, 2, seed=0)


def test_a_network_that_draws_at_random_is_caught():
    class Noisy(nn.Module):
        context_dim = 3

        def forward(self, observation):
            return nn.functional.dropout(observation.state, training=True)

    robot = RobotPolicy(Noisy(), **WALK)
    with pytest.raises(UserError, match="a network draws at random"):
        robot.rollout(PROMPTS, 2, seed=0)


def test_finished_episodes_leave_the_batch():
    robot = policy(envs=12)
    calls = []
    robot.encoder.register_forward_hook(lambda module, inputs, output: calls.append(len(output)))
    rollout = robot.rollout(PROMPTS, 30, seed=0)
    lengths = torch.tensor([2, 5, 7, 3]).repeat_interleave(30)
    assert rollout.samples.lengths.tolist() == lengths.tolist()
    turns = int((-(-lengths // 2)).sum())
    assert robot.counters["turns"] == turns
    assert robot.counters["env_steps"] == int(lengths.sum())
    # The last call scores the first rollout again; the others are those of 10 waves of 12 episodes.
    assert calls[-1] - turns < ROWS
    waves = [int(-(-wave.max() // 2)) for wave in lengths.split(12)]
    assert sum(calls[:-1]) == ROWS * sum(waves)
    assert robot.counters["network_rows"] == 2 * turns
    assert torch.equal(rollout.turn[0], torch.arange(4).repeat_interleave(3))
    assert torch.equal(rollout.mask.sum(1), 3 * -(-lengths // 2))


def test_an_episode_depends_on_its_prompt_and_number_alone():
    robot = policy()
    whole = robot.rollout(PROMPTS, 3, seed=1)
    part = robot.rollout(PROMPTS[2:3], 3, seed=1)
    for mine, other in zip(part.samples.episodes, whole.samples.episodes[6:9], strict=True):
        assert torch.equal(mine.actions, other.actions)
        assert torch.equal(mine.states, other.states)
    assert not torch.equal(part.samples.episodes[0].actions, part.samples.episodes[1].actions)


def test_generate_is_deterministic_and_draws_only_where_chunks_start():
    robot = policy(num_steps=4)
    first, second = (robot.generate(PROMPTS, [5, 6, 7, 8]).episodes for _ in range(2))
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(first, second, strict=True))
    draws = torch.randn(1, 4)
    state = torch.tensor([[0.0, 0.0, 0.0]])
    x = draws.view(1, 2, 2)
    with torch.no_grad():
        for k in range(4):
            x = x - robot.head.network(state, x, torch.tensor([1 - k / 4])) / 4
        found = robot.head.sample(state, draws, deterministic=True).actions
    assert torch.allclose(found, x, atol=1e-6)


def test_only_executed_actions_count():
    robot = policy({"type": "flow", "over_actions": "sum", "min_std": 0.1}, num_steps=2, horizon=4)
    rollout = robot.rollout(PROMPTS[:1], 1, seed=0)
    assert rollout.trace.turns.executed.tolist() == [2]
    assert rollout.samples.episodes[0].actions.shape == (1, 4, 2)
    record = rollout.trace.turns.record
    record.tensors["after"] = torch.cat([record["after"][:, :, :2], record["after"][:, :, 2:] + 100], 2)
    assert torch.allclose(robot.decisions(rollout).logp, rollout.logp, atol=1e-5)


def test_a_random_step_is_the_only_one_with_noise():
    robot = policy({"type": "flow", "train_steps": "random", "noise_level": 1.0}, num_steps=4)
    rollout = robot.rollout(PROMPTS, 20, seed=0)
    steps = rollout.trace.turns.record["step"]
    assert steps.shape[1] == 1
    assert set(steps.flatten().tolist()) == {0, 1, 2}
    assert robot.head.decisions_per_turn == 1


def test_early_steps_keep_a_copy_of_the_network():
    robot = policy({"type": "flow", "min_std": 0.1, "train_steps": 2, "early": "frozen"}, num_steps=4)
    head, context, x = robot.head, torch.zeros(1, 3), torch.randn(1, 2, 2)
    with torch.no_grad():
        for p in robot.parameters:
            p.add_(0.1)
    early, index = (torch.tensor([1]), torch.tensor([0]))
    now = head.transition(context, x, index, early)[0]
    assert not torch.allclose(head.transition(context, x, index, early, frozen=True)[0], now)
    robot.begin_stage([])
    assert torch.equal(head.transition(context, x, index, early, frozen=True)[0], now)
    assert any(key.startswith("frozen.") for key in robot.parameters.state())
    assert not any("frozen" in key for key in robot.parameters.named)
    assert robot.rollout(PROMPTS, 2, seed=0).trace.turns.record["step"][0].tolist() == [2, 3]


def test_values_at_the_end_are_those_of_episodes_that_a_limit_cut():
    robot = policy(value_head=True, env_options={"processes": 0, "max_steps": 5})
    rollout = robot.rollout(PROMPTS, 2, seed=0)
    cut = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0]).bool()
    assert torch.equal(rollout.samples.truncated, cut)
    assert torch.equal(rollout.final_value != 0, cut)
    last = torch.stack([rollout.samples.episodes[row].states[-1] for row in (4, 5)])
    assert torch.allclose(rollout.final_value[cut], robot.value(last), atol=1e-6)
    found = robot.decisions(rollout).value
    assert torch.equal(found[rollout.mask], rollout.value[rollout.mask])
    found[rollout.mask].sum().backward()
    assert robot.value.layers[0].weight.grad.abs().sum() > 0
    assert robot.head.network.layers[0].weight.grad is None


def test_the_value_network_may_have_its_own_learning_rate():
    groups = policy(value_head=True, value_lr_scale=10.0).parameters.groups()
    assert [group["scale"] for group in groups] == [1.0, 10.0]
    assert len(groups[1]["params"]) == 6


def test_running_statistics_are_those_of_all_states():
    robot = policy(normalise="running")
    seen = [robot.rollout(PROMPTS, 2, seed=seed).samples.episodes for seed in range(3)]
    states = torch.cat([episode.states for episodes in seen for episode in episodes]).double()
    kept = robot.parameters.buffers
    assert kept["statistics.count"] == len(states)
    assert torch.allclose(kept["statistics.mean"], states.mean(0))
    assert torch.allclose(kept["statistics.square"], (states - states.mean(0)).square().sum(0))
    normalised = robot.statistics.normalised(states)
    assert torch.allclose(normalised.mean(0), torch.zeros(3), atol=1e-4)
    assert torch.allclose(normalised.std(0, correction=0), torch.ones(3), atol=1e-4)


def demonstrations(count=6):
    drawn = torch.Generator().manual_seed(0)
    return [
        Prompt(
            id=f"show-{k}",
            target={
                "observation": {"state": 3 + 2 * torch.randn(3, generator=drawn)},
                "actions": 4 * torch.rand(2, 2, generator=drawn) - 2,
            },
        )
        for k in range(count)
    ]


@pytest.mark.parametrize("head", ["flow", "diffusion", "gaussian"])
def test_fit_depends_on_seeds_not_on_batches(head):
    robot, shown = policy(head, normalise="fixed"), demonstrations()
    robot.begin_stage(shown)
    assert robot.statistics.known
    whole = robot.fit(Samples(shown), range(6))
    parts = torch.cat([robot.fit(Samples(shown[:4]), range(4)), robot.fit(Samples(shown[4:]), [4, 5])])
    assert torch.equal(whole, parts)
    assert whole.requires_grad
    rollout = robot.rollout(PROMPTS, 1, seed=0)
    found = robot.fit(rollout, range(4))
    assert torch.equal(found[2:], robot.fit(rollout[2:], [2, 3]))
    with torch.no_grad():
        robot.parameters.take_snapshot("reference")
        next(iter(robot.parameters)).add_(1.0)
        with robot.reference():
            assert torch.equal(robot.fit(rollout, range(4)), found)
        assert not torch.equal(robot.fit(rollout, range(4)), found)


def test_denoise_is_fit_before_the_mean():
    robot = policy("flow", normalise="none")
    rollout = robot.rollout(PROMPTS, 1, seed=0)
    found = robot.denoise(rollout, range(4))
    assert found.row.tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 3, 3]
    again = robot.denoise(rollout, range(4), at=replace(found, prediction=None))
    assert torch.equal(again.prediction, found.prediction)
    whole = rollout.trace.turns.executed == 2
    error = (found.prediction - found.target).square().flatten(1).mean(1)
    error = torch.where(whole, error, 2 * error)
    mean = torch.zeros(4).index_add(0, found.row, error) / torch.tensor([1, 3, 4, 2])
    assert torch.allclose(mean, robot.fit(rollout, range(4)), atol=1e-6)
    x0 = found.x - found.x0_scale[:, None, None] * found.target
    assert torch.allclose(x0, rollout.trace.turns.actions, atol=1e-6)


def test_a_folder_brings_everything_back(tmp_path):
    robot = policy({"type": "flow", "noise_level": 0.9}, normalise="fixed", num_steps=3)
    robot.begin_stage(demonstrations())
    robot.export(tmp_path / "model")
    loaded = RobotPolicy(RobotPolicy.load(str(tmp_path / "model")), **WALK, value_head=True)
    assert loaded.horizon == 2
    assert loaded.head.steps == 3
    one, two = (p.generate(PROMPTS, [1, 2, 3, 4]).episodes for p in (robot, loaded))
    assert all(torch.equal(a.actions, b.actions) for a, b in zip(one, two, strict=True))
    # Options of sampling may change, and noise may be learned on top.
    other = RobotPolicy(
        RobotPolicy.load(str(tmp_path / "model")), **WALK, num_steps=5, action_head={"learned_std": [0.1, 0.2]}
    )
    assert other.head.steps == 5
    assert other.head.noise is not None
    with pytest.raises(UserError, match="does not fit this pipeline"):
        RobotPolicy(RobotPolicy.load(str(tmp_path / "model")), **WALK, horizon=3)


def test_rows_of_rollouts_join_without_copies():
    robot = policy()
    rollout = robot.rollout(PROMPTS, 2, seed=0)
    other = robot.rollout(PROMPTS[:1], 2, seed=1)
    joined = Rollout.cat([rollout[4:], other, rollout[:4]])
    assert joined.trace[torch.tensor([0])].turns is joined.trace.turns
    assert len(joined.trace.turns) == len(rollout.trace.turns) + len(other.trace.turns)
    assert torch.equal(robot.decisions(joined).logp[joined.mask], joined.logp[joined.mask])


def test_turns_can_be_scored_a_few_at_a_time():
    robot = policy(turns_per_backward=2)
    rollout = robot.rollout(PROMPTS, 1, seed=0)
    assert robot.decision_chunks(rollout) == [list(range(6)), list(range(6, 12))]
    assert robot.decision_chunks(rollout[:2]) == [list(range(6)), list(range(6, 9))]
    parts = [robot.decisions(rollout, columns).logp for columns in robot.decision_chunks(rollout)]
    assert torch.equal(torch.cat(parts, 1), robot.decisions(rollout).logp)


def test_a_crash_is_counted_and_the_episode_played_again(tmp_path):
    options = {"processes": 1, "max_steps": 20, "once": str(tmp_path / "once")}
    env = str(Path(__file__).with_name("fragile_env.py"))
    robot = policy(env=f"{env}:Fragile", env_options=options)
    rollout = robot.rollout(PROMPTS, 1, seed=0)
    robot.envs.close()
    # All episodes of its process went with it.
    assert robot.counters["dropped"] == 4
    calm = policy().rollout(PROMPTS, 1, seed=0)
    for one, other in zip(rollout.samples.episodes, calm.samples.episodes, strict=True):
        assert torch.equal(one.actions, other.actions)
        assert torch.equal(one.states, other.states)


@pytest.mark.parametrize(
    ("head", "options", "words"),
    [
        ("flwo", {}, "did you mean 'flow'"),
        ({"type": "flow", "nosie_level": 1}, {}, "unknown key 'nosie_level'"),
        ("flow", {"num_steps": 1}, "no step of the action head adds noise with num_steps 1"),
        ({"type": "flow", "train_steps": 4}, {"num_steps": 4}, "only 3 of 4 steps add noise"),
        ({"type": "diffusion", "diffusion_steps": 15}, {"num_steps": 10}, "multiple of num_steps"),
    ],
)
def test_options_are_checked_before_anything_is_built(head, options, words):
    with pytest.raises(UserError, match=words):
        RobotPolicy.validate(action_head=head, **options)


def test_a_prompt_without_a_start_is_refused():
    with pytest.raises(UserError, match="prompt 'x' has no start"):
        policy().generate([Prompt(id="x", text="go")], [0])
