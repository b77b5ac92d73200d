"""Residual reinforcement learning: the base stays, targets are Bellman's, a resumed run is the same run."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmrl import checkpoints, run
from mmrl.algorithms.base import Context
from mmrl.algorithms.off_policy import OffPolicy
from mmrl.config import parse_config
from mmrl.errors import UserError
from mmrl.metrics import read_metrics
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from mmrl.transitions import Replay, Transitions
from mmrl.types import Prompt
from pipelines import RobotPolicy
from pipelines.robot.demonstrations import starts
from pipelines.robot.heads.residual import tanh_log_density
from pipelines.robot.residual import Critics, ResidualPolicy
from rewards.robot import EpisodeReturn

SHORT = {"max_steps": 10, "reward": "shaped"}
SMALL = {"hidden": [16], "critic_hidden": [16, 16], "critics": 3, "capacity": 64, "envs": 16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A policy that was never trained."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("base")
    RobotPolicy("mlp", "planar:push", {"type": "flow", "hidden": [16]}, num_steps=2).export(place)
    return place


def residual(folder, **options):
    torch.manual_seed(1)
    return ResidualPolicy(ResidualPolicy.load(str(folder)), "planar:push", env_options=SHORT, **SMALL | options)


def context_of(policy, size=256):
    return Context(policy, Scorer([EpisodeReturn()]), 0, size, Clock(), Tally())


def test_without_a_correction_the_base_acts_and_a_correction_is_bounded(folder):
    prompts, seeds = starts("planar:push", 8), list(range(8))
    base = RobotPolicy(RobotPolicy.load(str(folder)), "planar:push", env_options=SHORT, envs=16)
    corrected = residual(folder, scale=0.2)
    for one, other in zip(
        base.generate(prompts, seeds).episodes, corrected.generate(prompts, seeds).episodes, strict=True
    ):
        assert torch.equal(one.actions, other.actions)
    with torch.no_grad():
        corrected.head.actor[-1].bias[: corrected.head.size] = 100.0
    first = torch.stack([episode.actions[0] for episode in base.generate(prompts, seeds).episodes])
    moved = torch.stack([episode.actions[0] for episode in corrected.generate(prompts, seeds).episodes])
    inside = (first > -1) & (first < 0.8)
    assert torch.allclose(moved[inside], first[inside] + 0.2, atol=1e-6)


def test_log_densities_are_those_of_a_tanh_gaussian():
    u, mean, log_std = torch.randn(3, 50, dtype=torch.float64)
    normal = torch.distributions.Normal(mean, log_std.exp())
    expected = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    assert torch.allclose(tanh_log_density(u, mean, log_std), normal.log_prob(u) - torch.log1p(-(u.tanh() ** 2)))
    draw = expected.rsample()
    assert torch.allclose(tanh_log_density(draw.atanh(), mean, log_std), expected.log_prob(draw), atol=1e-4)


def test_critics_are_separate_networks(folder):
    critics = Critics(5, [7, 6], 3)
    torch.nn.init.normal_(critics.weights[-1])
    situation, action = torch.randn(4, 3), torch.randn(4, 2)
    found = critics(situation, action)
    assert found.shape == (3, 4)
    for e in range(3):
        x = torch.cat([situation, action], 1)
        for weight, bias in zip(critics.weights, critics.biases, strict=True):
            x = x @ weight[e] + bias[e]
            if weight is not critics.weights[-1]:
                x = torch.nn.functional.layer_norm(x, x.shape[1:]).relu()
        assert torch.allclose(found[e], x[:, 0], atol=1e-5)


def test_turns_become_transitions(folder):
    policy = residual(folder)
    rollout = policy.rollout(starts("planar:push", 6), 2, 0)
    episodes = rollout.samples.episodes
    rewards = [episode.rewards.sum(1).tolist() for episode in episodes]
    found = policy.transitions(rollout, rewards)
    counts = [episode.turns for episode in episodes]
    assert counts == [3] * 12
    assert torch.equal(found.reward, torch.cat([episode.rewards.sum(1) for episode in episodes]))
    states = policy.envs.state_dim
    normalised = policy.statistics.normalised
    after = torch.cat([episode.states[1:] for episode in episodes])
    assert torch.equal(found.situation[:, :states], normalised(torch.cat([e.states[:-1] for e in episodes])))
    assert torch.equal(found.after[:, :states], normalised(after))
    within = torch.ones(36, dtype=torch.bool)
    within[2::3] = False
    assert torch.equal(found.after[within], found.situation[1:][within[:-1]])
    # What was executed is the proposal with the correction.
    chunk = found.situation[:, states:] + policy.head.scale * found.action
    executed = torch.cat([episode.actions for episode in episodes]).flatten(1)
    assert torch.allclose(policy.scale.clipped(chunk.unflatten(1, (4, 2))).flatten(1), executed, atol=1e-6)
    # Time limits alone ended these.
    assert rollout.samples.truncated.all()
    assert found.terminated.sum() == 0


def test_an_end_of_the_environment_is_terminal_and_a_time_limit_is_not(tmp_path):
    env, options = f"{Path(__file__).with_name('odd_envs.py')}:Walk", {"processes": 0, "max_steps": 4}
    RobotPolicy("mlp", env, {"type": "gaussian", "hidden": []}, horizon=2, env_options=options).export(tmp_path)
    policy = ResidualPolicy(ResidualPolicy.load(str(tmp_path)), env, env_options=options, **SMALL)
    # Walks of 2, 3 and 7 steps.
    rollout = policy.rollout([Prompt(id=str(seed), inputs={"seed": seed}) for seed in (0, 1, 5)], 1, 0)
    found = policy.transitions(rollout, [[1.0], [0.0, 1.0], [0.0, 1.0]])
    assert found.terminated.tolist() == [1, 0, 1, 0, 0]
    assert found.after[:, 1].tolist() == [2, 2, 3, 2, 4]


def test_targets_are_those_of_bellman(folder):
    policy = residual(folder)
    torch.nn.init.normal_(policy._slow.weights[-1])
    generator = torch.Generator().manual_seed(0)
    S, A = policy.head.situation_size, policy.head.size
    situation, after = torch.randn(2, 4, S, generator=generator)
    action = torch.randn(4, A, generator=generator)
    reward, terminated = torch.tensor([1.0, 0.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    transitions = Transitions(situation, after, action.tanh(), reward, terminated)
    policy.recall = lambda *_: transitions
    for entropy in (False, True):
        algorithm = OffPolicy(
            updates_per_step=1, actor_every=1, draws=4, discount=0.9, prior_steps=0, critic_steps=0,
            entropy_in_target=entropy,
        )  # fmt: skip
        critic, actor = list(algorithm.updates(context_of(policy), None, 0))
        (micro_batch,) = critic.micro_batches
        assert len(micro_batch.critics) == 2
        assert algorithm.optimiser_steps == 2
        with torch.no_grad():
            mean, log_std = policy.head.gaussian(after)
            u = mean + log_std.exp() * micro_batch.normals
            values = policy._slow(after, u.tanh())[micro_batch.critics].min(0).values
            if entropy:
                logp = torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - torch.log1p(-(u.tanh() ** 2))
                values = values - policy.log_temperature.exp() * logp.sum(1)
        found = algorithm.target(context_of(policy), micro_batch)
        assert torch.equal(found[:2], reward[:2])
        assert torch.allclose(found[2:], reward[2:] + 0.9 * values[2:], atol=1e-5)

        algorithm.loss(context_of(policy), micro_batch).backward()
        moved = {name for name, parameter in policy.parameters.named.items() if parameter.grad is not None}
        assert moved == {name for name in policy.parameters.named if name.startswith("residual.critics")}
        policy.modules.zero_grad()
        algorithm.loss(context_of(policy), actor.micro_batches[0]).backward()
        moved = {name for name, parameter in policy.parameters.named.items() if parameter.grad is not None}
        assert moved == {name for name in policy.parameters.named if not name.startswith("residual.critics")}
        policy.modules.zero_grad()


def test_the_gradient_does_not_depend_on_micro_batches(folder):
    found = []
    for size in (32, 5):
        policy = residual(folder)
        prompts = starts("planar:push", 4)
        algorithm = OffPolicy(updates_per_step=1, actor_every=1, draws=32, prior_steps=0, critic_steps=0)
        context = context_of(policy, size)
        algorithm.collect(context, prompts, 0)
        for update in algorithm.updates(context, None, 0):
            for micro_batch in update.micro_batches:
                algorithm.loss(context, micro_batch).backward()
        found.append(torch.cat([p.grad.flatten() for p in policy.parameters]))
    assert found[0].abs().max() > 0
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_the_temperature_moves_towards_the_entropy_that_is_asked_for(folder):
    policy = residual(folder)
    policy.remember(policy.rollout(starts("planar:push", 4), 1, 0), [[0.0] * 3] * 4)
    for entropy, sign in ((5.0, -1), (-5.0, 1)):
        algorithm = OffPolicy(updates_per_step=1, actor_every=1, prior_steps=0, critic_steps=0, entropy=entropy)
        _, actor = list(algorithm.updates(context_of(policy), None, 0))
        algorithm.loss(context_of(policy), actor.micro_batches[0]).backward()
        assert policy.log_temperature.grad.sign() == sign
        policy.modules.zero_grad()


def test_a_ring_keeps_the_latest_transitions():
    ring = Replay(5, 1, 1)
    for first in (0, 4, 8):
        numbers = torch.arange(first, first + 4).float()
        ring.add(Transitions(numbers[:, None], numbers[:, None], numbers[:, None], numbers, numbers))
    assert len(ring) == 5
    assert sorted(ring.buffers["reward"].tolist()) == [7, 8, 9, 10, 11]
    many = torch.arange(12.0)
    ring.add(Transitions(many[:, None], many[:, None], many[:, None], many, many))
    assert sorted(ring.buffers["reward"].tolist()) == [7, 8, 9, 10, 11]
    drawn = ring.draw(1000, torch.Generator().manual_seed(0))
    assert torch.equal(drawn.reward, drawn.situation[:, 0])
    assert 150 < (drawn.reward == 9).sum() < 250


def config(folder, place):
    data = {"prompts": "pipelines.robot.demonstrations:starts", "options": {"env": "planar:push", "count": 16}}
    held_out = {
        "eval_prompts": "pipelines.robot.demonstrations:starts",
        "eval_options": {"env": "planar:push", "count": 4, "split": "eval"},
    }
    small = SMALL | {"env_options": SHORT}
    return {
        "run_dir": str(place),
        "seed": 3,
        "pipeline": {"type": "residual_robot", "model": str(folder), "env": "planar:push"} | small,
        "algorithm": {"type": "residual_rl", "updates_per_step": 3, "draws": 32, "prior_steps": 1, "critic_steps": 1},
        "rewards": ["episode_return"],
        "eval": {"rewards": ["success"]},
        "data": data | held_out | {"batch_size": 8},
        "trainer": {"steps": 6, "lr": 1e-3, "save_every": 3, "device": "cpu", "tensorboard": False},
    }


def test_resume_is_bit_exact_and_the_base_never_changes(folder, tmp_path):
    for name in ("straight", "stopped"):
        run.train(parse_config(config(folder, tmp_path / name)))
    last = checkpoints.checkpoints(tmp_path / "stopped")[-1]
    shutil.rmtree(last)
    run.resume(tmp_path / "stopped")
    one = load_file(checkpoints.checkpoints(tmp_path / "straight")[-1] / "policy.safetensors")
    two = load_file(last / "policy.safetensors")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert one["replay.own.added"] == 6 * 8 * 3
    assert 0 < one["replay.prior.added"] < 8 * 3
    names = ("loss", "value", "entropy", "temperature", "reward/mean", "grad_norm")
    straight, stopped = (
        [{key: x for key, x in line.items() if key.endswith(names)} for line in read_metrics(tmp_path / name)]
        for name in ("straight", "stopped")
    )
    assert straight == stopped

    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "straight/model/model.safetensors")
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    # What was exported is a corrected policy, which acts as the trained one.
    trained = residual(tmp_path / "straight" / "model")
    assert torch.equal(trained.head.actor[-1].weight, one["residual.actor.2.weight"])
    assert trained.head.actor[-1].weight.abs().max() > 0
    with pytest.raises(UserError, match="residual"):
        residual(tmp_path / "straight" / "model", hidden=[8])


@pytest.mark.slow
def test_corrections_mend_an_untrained_base(folder, tmp_path):
    """Progress as reward: returns rise well above those of the base."""
    torch.manual_seed(0)
    place = tmp_path / "reach"
    RobotPolicy("mlp", "planar:push", {"type": "flow", "hidden": [16]}, num_steps=2).export(place)
    short = config(place, tmp_path / "run")
    short["pipeline"] |= {"scale": 1.0, "capacity": 20000, "hidden": [64], "critic_hidden": [64, 64]}
    short["pipeline"]["env_options"] = {"max_steps": 24, "reward": "shaped"}
    short["algorithm"] = {"type": "residual_rl", "updates_per_step": 32, "prior_steps": 2, "critic_steps": 2}
    short["data"] |= {"batch_size": 16}
    short["data"]["eval_options"] |= {"count": 64}
    short["eval"] = {"rewards": ["episode_return"]}
    short["trainer"] |= {"steps": 40, "save_every": 0}
    found = run.train(parse_config(short))["eval"]
    assert found["after"]["episode_return"] > found["before"]["episode_return"] + 0.1
