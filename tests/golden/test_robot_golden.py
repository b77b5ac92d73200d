"""Robot policies against other libraries, densities written out, and a problem with a known optimum."""

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from table_policy import lines
from torch.distributions import Normal
from training import training_step

from mmrl import checkpoints, run
from mmrl.algorithms.base import Context
from mmrl.components import algorithm_component, build_algorithm
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt
from pipelines import RobotPolicy
from pipelines.robot.demonstrations import starts
from pipelines.robot.envs import Envs
from pipelines.robot.heads.base import HeadShape
from pipelines.robot.heads.denoising import DiffusionHead, FlowHead
from pipelines.robot.stepping import InThisProcess, Layout
from pipelines.step_kernel import cosine_alpha_bars
from rewards.robot import EpisodeReturn

SHAPE = HeadShape(5, 3, 2)


def test_log_probs_of_learned_noise_are_those_of_normal_densities():
    """ReinFlow's chain: N(x_k + v / K, sigma(s, t_k)^2), with our velocity, which is noise minus action."""
    torch.manual_seed(0)
    head = FlowHead(SHAPE, num_steps=4, hidden=[16], learned_std=(0.08, 0.2), over_steps="sum", over_actions="sum")
    context = torch.randn(7, 5)
    draws = torch.stack([head.draw(1, torch.Generator().manual_seed(k))[0] for k in range(7)])
    sampled = head.sample(context, draws)
    record = sampled.record
    chain = torch.cat([record["before"], record["after"][:, -1:]], 1)
    total = torch.zeros(7)
    for k, (now, after) in enumerate(pairwise(chain.unbind(1))):
        time = torch.full((7,), 1 - k / 4)
        mean = now - head.network(context, now, time) / 4
        std = head.noise(context, head.network.time(time))
        assert std.min() >= 0.08
        assert std.max() <= 0.2
        total += Normal(mean, std).log_prob(after).sum((1, 2))
    executed = torch.full((7,), 3)
    assert torch.allclose(head.logp(sampled.elements, executed)[:, 0], total, atol=1e-4)
    logp = head.decisions(context, record, executed).logp
    assert torch.allclose(logp[:, 0], total, atol=1e-4)
    # The embedding of the time learns from means alone.
    std = head.noise(context, head.network.time(torch.ones(7))).sum()
    own, embedding = head.noise.layers[0].weight, head.network.time.layers[0].weight
    assert torch.autograd.grad(std, own, retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(std, embedding, allow_unused=True) == (None,)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_diffusion_steps_are_those_of_diffusers(steps):
    """DPPO's means: DDIM's, and with all levels and eta 1 DDPM's posterior, both from the clipped clean estimate."""
    from diffusers import DDIMScheduler, DDPMScheduler

    options = {"num_train_timesteps": 20, "beta_schedule": "squaredcos_cap_v2", "clip_sample": True}
    levels = torch.tensor(cosine_alpha_bars(20))
    head = DiffusionHead(SHAPE, num_steps=steps, diffusion_steps=20, hidden=[16], min_std=1e-3)
    ddim = DDIMScheduler(**options, set_alpha_to_one=True, timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    assert torch.allclose(ddim.alphas_cumprod, levels, atol=1e-6)
    ddpm = DDPMScheduler(**options, variance_type="fixed_small")
    ddpm.set_timesteps(20)
    x, context = torch.randn(6, 3, 2), torch.randn(6, 5)
    yes = torch.ones(6, dtype=torch.long)
    for k, timestep in enumerate(ddim.timesteps):
        index = torch.full((6,), k)
        with torch.no_grad():
            output = head.network(context, x, head.times[index])
            for noisy, eta in ((yes, 1.0), (0 * yes, 0.0)):
                mean, std = head.transition(context, x, index, noisy)
                zero = torch.zeros_like(x)
                expected = ddim.step(output, timestep, x, eta=eta, use_clipped_model_output=True, variance_noise=zero)
                assert torch.allclose(mean, expected.prev_sample, atol=1e-5), (k, eta)
                variance = ddim._get_variance(timestep, timestep - 20 // steps)
                assert torch.allclose(std, eta * variance.clamp(min=0).sqrt(), atol=1e-5)
            if steps == 20:
                posterior = ddpm.step(output, timestep, x, generator=torch.Generator().manual_seed(1)).prev_sample
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
                spread = 0.0 if k == 19 else ddpm._get_variance(timestep).sqrt()
                mean, std = head.transition(context, x, index, yes)
                assert torch.allclose(mean + std * noise, posterior - spread * noise + std * noise, atol=1e-5)


class Regulator:
    """One step of a linear-quadratic problem: reward ``-|x + a|^2 - |a|^2``, whose best action is ``-x / 2``."""

    layout = Layout((-2.0,) * 2, (2.0,) * 2, 2, None, 1, False)

    def __init__(self, num_envs: int):
        self.num_envs = num_envs
        self.states = np.zeros((num_envs, 2), np.float32)

    def restart(self, rows, seeds):
        for row, seed in zip(rows, seeds, strict=True):
            self.states[row] = np.random.default_rng(seed).uniform(-1, 1, 2)

    def advance(self, rows, actions):
        cost = np.square(self.states[rows] + actions).sum(1) + np.square(actions).sum(1)
        over = np.ones(len(rows), bool)
        return -cost, over, ~over, {"success": over}

    def observe(self, rows):
        return {"state": self.states[rows].copy()}

    def draw(self, rows):
        raise NotImplementedError

    def close(self):
        pass


STARTS = [Prompt(id=f"start-{seed}", inputs={"seed": seed}) for seed in range(256)]
PPO = {
    "type": "ppo",
    "whiten": True,
    "gamma": 1.0,
    "kl_coef": 0.0,
    "epochs": 4,
    "minibatches": 2,
    "value": {"coef": 1.0},
}
GRPO = {"type": "grpo", "group_size": 8, "epochs": 4, "minibatches": 2}


@pytest.mark.parametrize(("algorithm", "batch"), [(PPO, 256), (GRPO, 32)])
def test_the_optimum_of_a_linear_quadratic_problem_is_reached(algorithm, batch):
    torch.manual_seed(0)
    head = {"type": "gaussian", "hidden": [], "std": 0.2, "over_actions": "sum"}
    env = Envs(InThisProcess(Regulator(256)), "regulator")
    value = algorithm["type"] == "ppo"
    robot = RobotPolicy("mlp", env, head, horizon=1, normalise="none", value_head=value, value_hidden=[32])
    algorithm = build_algorithm(algorithm_component(algorithm | {"clip_range": 0.2}, where="test", path="algorithm"))
    optimiser = torch.optim.Adam(list(robot.parameters), lr=5e-2)
    starts = PromptSampler(STARTS, batch, shuffle=False)
    for step in range(25):
        for group in optimiser.param_groups:
            group["lr"] = 5e-2 * (1 - step / 25)
        context = Context(robot, Scorer([EpisodeReturn()]), 0, 256, Clock(), Tally(), starts)
        training_step(algorithm, context, optimiser, step)
    layer = robot.head.network[0]
    # Actions are in units of the environment's bound, 2.
    assert torch.allclose(2 * layer.weight, -torch.eye(2) / 2, atol=0.05)
    assert torch.allclose(2 * layer.bias, torch.zeros(2), atol=0.05)


CONFIG = {
    "seed": 3,
    "pipeline": {
        "type": "robot",
        "env": "planar:push",
        "env_options": {"max_steps": 8, "reward": "shaped"},
        "action_head": {"type": "flow", "hidden": [16], "min_std": 0.05, "train_steps": 2, "early": "frozen"},
        "num_steps": 3,
        "envs": 16,
        "normalise": "running",
        "value_head": True,
        "batch_size": 8,
    },
    "rewards": ["episode_return"],
    "eval": {"rewards": ["success"]},
    "stages": [
        {
            "name": "clone",
            "data": {
                "prompts": "pipelines.robot.demonstrations:demonstrations",
                "options": {"env": "planar:push", "episodes": 4, "horizon": 4},
                "eval_prompts": "pipelines.robot.demonstrations:starts",
                "eval_options": {"env": "planar:push", "count": 4, "split": "eval"},
            },
            "algorithm": {"type": "sft"},
            "trainer": {"steps": 2, "lr": 1e-3},
        },
        {
            "name": "practice",
            "data": {
                "prompts": "pipelines.robot.demonstrations:starts",
                "options": {"env": "planar:push", "count": 16},
                "eval_prompts": "pipelines.robot.demonstrations:starts",
                "eval_options": {"env": "planar:push", "count": 4, "split": "eval"},
                "batch_size": 8,
            },
            "algorithm": {"type": "ppo", "clip_range": 0.1, "epochs": 2, "kl_coef": 0.01, "kl_in": "loss"},
            "trainer": {"steps": 4, "lr": 1e-3, "save_every": 2},
        },
    ],
    "trainer": {"device": "cpu", "tensorboard": False},
}


def test_resume_is_bit_exact_with_statistics_and_a_frozen_copy(tmp_path):
    for name in ("straight", "stopped"):
        run.train(parse_config(CONFIG | {"run_dir": str(tmp_path / name)}))
    last = checkpoints.checkpoints(tmp_path / "stopped")[-1]
    shutil.rmtree(last)
    run.resume(tmp_path / "stopped")

    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    saved = {}
    for file in sorted(checkpoints.checkpoints(tmp_path / "straight")[-1].glob("*.safetensors")):
        one, two = load_file(file), load_file(last / file.name)
        assert all(torch.equal(one[key], two[key]) for key in one), file.name
        saved |= one
    assert saved["statistics.count"] > 4 * 8 * 3
    assert "frozen.layers.0.weight" in saved


@pytest.mark.parametrize("algorithm", [PPO, GRPO])
def test_the_gradient_does_not_depend_on_micro_batches(algorithm):
    options = {"max_steps": 10, "reward": "shaped"}
    found = []
    for size, turns in ((32, None), (5, None), (7, 1)):
        torch.manual_seed(0)
        robot = RobotPolicy(
            "mlp", "planar:push", env_options=options, envs=32, value_head=True, turns_per_backward=turns
        )
        built = build_algorithm(algorithm_component(algorithm, where="test", path="algorithm"))
        context = Context(robot, Scorer([EpisodeReturn()]), 0, size, Clock(), Tally())
        prompts = starts("planar:push", 32 // built.group_size)
        with torch.no_grad():
            experience = built.collect(context, prompts, 0)
        update = next(iter(built.updates(context, experience, 0)))
        for micro_batch in update.micro_batches:
            built.loss(context, micro_batch).backward()
        assert context.tally.result()["ratio/max_abs_dev"] == 0
        found.append(torch.cat([p.grad.flatten() for p in robot.parameters if p.grad is not None]))
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=1e-4, atol=1e-5 * found[0].abs().max().item())
