"""Times a PPO step of a flow policy on the planar push: mmrl's Trainer against its bare parts and against a plain loop.

    OMP_NUM_THREADS=1 python benchmarks/robot_step.py --hidden 256,256,256 --num-steps 10

All three have the same environments, networks, batch shapes and numbers of optimiser steps, in one process and in turn:

* ``mmrl``: a step of the Trainer, all of it: starts, episodes, rewards, advantages, passes over the rollout, logging.
* ``bare``: the environments with the actions of that step, and the calls of the networks that it made, on random inputs
  of the same shapes, with backward and optimiser; nothing else.
* ``plain``: a loop in the manner of DPPO (arXiv 2409.00588) on as many turns: environments that are over begin anew,
  every pair of turn and denoising step is a sample of its own, which is shuffled among all others and brings its own
  call of the critic, and old log-probs are computed in a pass of their own.

Times are CPU seconds of the process, which a busy machine disturbs less than the clock on the wall. The policy is
cloned first, so that episodes end at different times; the learning rate is next to 0, so that all steps are alike.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.algorithms.regularisers import ValueHead
from mmrl.config import TrainerOptions
from mmrl.data import PromptSampler
from mmrl.display import Display
from mmrl.optim import build_optimizer
from mmrl.scoring import Scorer
from mmrl.trainer import Stage, Trainer
from mmrl.types import Prompt, Samples
from pipelines import RobotPolicy
from pipelines.robot.demonstrations import demonstrations, starts
from pipelines.robot.envs import Envs, make_envs
from rewards.robot import Success

ENV, EPISODES, HORIZON = "planar:push", 256, 4
NOISE, CLIP, GAMMA, LAMBDA = 0.7, 0.2, 0.99, 0.95
EPOCHS, MINIBATCHES = 4, 4


@dataclass
class Call:
    """A call of a network: which, for how many rows, and whether a backward pass followed."""

    module: nn.Module
    rows: int
    grad: bool


class Mmrl:
    """Steps of the Trainer."""

    def __init__(self, policy: RobotPolicy, prompts: list[Prompt], folder: Path):
        self.policy = policy
        algorithm = PolicyGradient(
            group_size=1,
            clip_range=CLIP,
            advantage="gae",
            advantage_clip=None,
            whiten=True,
            aggregation="token",
            gamma=GAMMA,
            lam=LAMBDA,
            value=ValueHead(coef=0.5),
            epochs=EPOCHS,
            minibatches=MINIBATCHES,
        )
        options = TrainerOptions(lr=1e-30, micro_batch_size=EPISODES)
        sampler = PromptSampler(prompts, EPISODES, 0, True)
        self.stage = Stage("benchmark", algorithm, sampler, Scorer([Success()]), None, options, 0)
        self.trainer = Trainer(policy, [self.stage], folder, None, Display(rank=1))
        self.optimizer = build_optimizer("AdamW", policy.parameters, options.lr, {})
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(self, number: int) -> None:
        self.trainer._step(self.stage, self.optimizer, self.scaler, number)


class Bare:
    """What a step of mmrl did in environments and networks, recorded, and done again with nothing around it."""

    def __init__(self, mmrl: Mmrl):
        self.policy, self.optimizer = mmrl.policy, mmrl.optimizer
        self.modules = [self.policy.head.network, self.policy.value]

    def record(self, step: Callable[[], None]) -> None:
        """Run ``step`` and keep the calls of networks and environments."""
        self.calls: list[Call] = []
        self.stepped: list[tuple[Tensor, Tensor]] = []

        def note(module: nn.Module, inputs: Any, output: Any) -> None:
            self.calls.append(Call(module, len(inputs[0]), torch.is_grad_enabled()))

        hooks = [module.register_forward_hook(note) for module in self.modules]
        envs = self.policy.envs
        reset, forward = envs.reset, envs.step

        def resetting(seeds: list[int]) -> Any:
            self.seeds = list(seeds)
            return reset(seeds)

        def stepping(rows: Tensor, actions: Tensor) -> Any:
            self.stepped.append((rows, actions))
            return forward(rows, actions)

        envs.reset, envs.step = resetting, stepping
        step()
        del envs.reset, envs.step
        for hook in hooks:
            hook.remove()

    def step(self, number: int) -> None:
        envs, head = self.policy.envs, self.policy.head
        envs.reset(self.seeds)
        for rows, actions in self.stepped:
            envs.step(rows, actions)
        updates = EPOCHS * MINIBATCHES
        graded = sum(call.grad for call in self.calls) // updates
        pending: list[Tensor] = []
        for call in self.calls:
            context = torch.randn(call.rows, envs.state_dim)
            inputs = (context,)
            if call.module is head.network:
                inputs = (context, torch.randn(call.rows, HORIZON, envs.action_dim), torch.rand(call.rows))
            if not call.grad:
                with torch.inference_mode():
                    call.module(*inputs)
                continue
            pending.append(call.module(*inputs).sum())
            if len(pending) == graded:
                sum(pending).backward()
                pending = []
                self.optimizer.step()
                self.optimizer.zero_grad()


class Plain:
    """A loop in the manner of DPPO; see the head of this file.

    Args:
        turns: taken by every environment, whatever episodes they belong to.
        num_steps: of denoising.
    """

    def __init__(self, policy: RobotPolicy, envs: Envs, optimizer: torch.optim.Optimizer, turns: int, num_steps: int):
        self.policy, self.envs, self.optimizer, self.turns = policy, envs, optimizer, turns
        self.num_steps = num_steps
        self.network, self.value = policy.head.network, policy.value
        sigmas = [1 - k / num_steps for k in range(num_steps + 1)]
        self.sigmas = sigmas
        self.levels = [NOISE * math.sqrt(s / (1 - (sigmas[1] if s == 1 else s))) for s in sigmas[:-1]]
        self.trained = num_steps - 1

    def mean_std(self, state: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Flow-SDE: where a step goes and its std, for rows at different steps; the last one has no noise."""
        s = torch.tensor(self.sigmas)[index][:, None, None]
        g = torch.tensor(self.levels)[index][:, None, None]
        dt = -1 / self.num_steps
        v = self.network(state, x, s[:, 0, 0])
        last = (index == self.trained)[:, None, None]
        sde = x * (1 + g * g * dt / (2 * s)) + v * (1 + g * g * (1 - s) / (2 * s)) * dt
        return torch.where(last, x + v * dt, sde), torch.where(last, 0.0, g * math.sqrt(-dt))

    def log_prob(self, state: Tensor, before: Tensor, after: Tensor, index: Tensor) -> Tensor:
        mean, std = self.mean_std(state, before, index)
        return torch.distributions.Normal(mean, std).log_prob(after).sum((1, 2))

    def step(self, number: int) -> None:
        torch.manual_seed(number)
        with torch.no_grad():
            states, chains, rewards, ends, final = self.collect(number)
            values = torch.stack([self.value(state) for state in states])
            last = self.value(final)
            index = torch.arange(self.trained).repeat(len(states) * EPISODES)
            pairs = states.flatten(0, 1).repeat_interleave(self.trained, 0)
            before, after = (chains[:, :, k : k + self.trained].flatten(0, 2) for k in (0, 1))
            rows = len(index) // MINIBATCHES
            logp = torch.cat(
                [
                    self.log_prob(
                        pairs[begin : begin + rows], *(x[begin : begin + rows] for x in (before, after, index))
                    )
                    for begin in range(0, len(index), rows)
                ]
            )
            advantage = torch.zeros(len(states), EPISODES)
            running = torch.zeros(EPISODES)
            for turn in reversed(range(len(states))):
                following = last if turn + 1 == len(states) else values[turn + 1]
                go_on = 1 - ends[turn]
                delta = rewards[turn] + GAMMA * following * go_on - values[turn]
                running = delta + GAMMA * LAMBDA * go_on * running
                advantage[turn] = running
            returns = (advantage + values).flatten().repeat_interleave(self.trained)
            advantage = advantage.flatten().repeat_interleave(self.trained)
        for _ in range(EPOCHS):
            for part in torch.randperm(len(index)).split(rows):
                ratio = (self.log_prob(pairs[part], before[part], after[part], index[part]) - logp[part]).exp()
                chosen = advantage[part]
                chosen = (chosen - chosen.mean()) / (chosen.std() + 1e-8)
                loss = torch.maximum(-chosen * ratio, -chosen * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
                loss = loss + 0.5 * 0.5 * (self.value(pairs[part]) - returns[part]).square().mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(list(self.policy.parameters), 1.0)
                self.optimizer.step()

    def collect(self, number: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        envs, everyone = self.envs, torch.arange(EPISODES)
        seed = number << 20
        observed = envs.reset(range(seed, seed + EPISODES)).state
        states, chains, rewards, ends = [], [], [], []
        for turn in range(self.turns):
            state = self.policy.statistics.normalised(observed)
            x = torch.randn(EPISODES, HORIZON, envs.action_dim)
            chain = [x]
            for k in range(self.num_steps):
                mean, std = self.mean_std(state, x, torch.full((EPISODES,), k))
                x = mean + std * torch.randn_like(x)
                chain.append(x)
            step = envs.step(everyone, x.clamp(-1, 1))
            done = step.terminated | step.truncated
            observed = step.observation.state
            if done.any():
                fresh = done.nonzero().flatten()
                seen = envs.backend.restart(fresh.numpy(), [seed + EPISODES * (turn + 1) + int(row) for row in fresh])
                envs._done[fresh.numpy()] = False
                observed = observed.clone()
                observed[fresh] = torch.from_numpy(seen["state"])
            states.append(state)
            chains.append(torch.stack(chain, 1))
            rewards.append(step.success.float())
            ends.append(done.float())
        final = self.policy.statistics.normalised(observed)
        return torch.stack(states), torch.stack(chains), torch.stack(rewards), torch.stack(ends), final


def clone(policy: RobotPolicy, steps: int) -> None:
    """Teach the policy a little, so that episodes end at different times."""
    shown = list(demonstrations(ENV, 64, HORIZON, noise=0.4))
    policy.begin_stage(shown)
    optimizer = torch.optim.Adam(policy.parameters, lr=1e-3)
    for step in range(steps):
        rows = torch.randint(len(shown), (128,), generator=torch.Generator().manual_seed(step)).tolist()
        policy.fit(Samples([shown[row] for row in rows]), [128 * step + k for k in range(128)]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def main(
    hidden: Annotated[str, typer.Option(help="Widths of the layers.")] = "256,256,256",
    num_steps: Annotated[int, typer.Option(help="Denoising steps, all but the last of them decisions.")] = 10,
    repeats: Annotated[int, typer.Option(help="Timed steps of each.")] = 5,
    clone_steps: Annotated[int, typer.Option(help="Steps of cloning before.")] = 300,
) -> None:
    """Print CPU seconds a step, ratios, and work done."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    widths = [int(width) for width in hidden.split(",")]
    head = {"type": "flow", "hidden": widths, "noise_level": NOISE, "over_actions": "sum"}
    policy = RobotPolicy(
        "mlp",
        ENV,
        head,
        horizon=HORIZON,
        num_steps=num_steps,
        envs=EPISODES,
        value_head=True,
        value_hidden=widths,
    )
    clone(policy, clone_steps)
    with tempfile.TemporaryDirectory() as folder:
        mmrl = Mmrl(policy, starts(ENV, 4096), Path(folder))
        mmrl.step(0)
        policy.counters.clear()
        bare = Bare(mmrl)
        bare.record(lambda: mmrl.step(1))
        work = dict(policy.counters)
        turns = round(work["turns"] / EPISODES)
        plain = Plain(policy, make_envs(ENV, EPISODES), mmrl.optimizer, turns, num_steps)
        plain.step(0)
        times: dict[str, list[float]] = {"mmrl": [], "bare": [], "plain": []}
        for _ in range(repeats):
            for name, contestant in (("mmrl", mmrl), ("bare", bare), ("plain", plain)):
                began = time.process_time()
                contestant.step(1)
                times[name].append(time.process_time() - began)
    console = Console(width=120)
    table = Table("", "CPU s a step", "turns", "turns a CPU second", "mmrl is")
    own = statistics.median(times["mmrl"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        done = turns * EPISODES if name == "plain" else work["turns"]
        # The plain loop has a few turns more or less.
        ratio = (done / middle) / (work["turns"] / own)
        said = {
            "mmrl": "",
            "bare": f"{own / middle:.2f} times the bare parts",
            "plain": f"{1 / ratio:.2f} times faster",
        }
        table.add_row(name, f"{middle:.3f}", str(done), f"{done / middle:,.0f}", said[name])
    console.print(table)
    calls = sum(not call.grad for call in bare.calls), sum(call.grad for call in bare.calls)
    console.print(
        f"{hidden}: work of a step of mmrl {work}; network calls {calls[0]} without, {calls[1]} with gradient"
    )


if __name__ == "__main__":
    typer.run(main)
