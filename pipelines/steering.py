"""Rollouts that climb a reward: the drift of their stochastic steps is bent by its gradient (Euphonium)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmrl.components import Component, build_scorer, reward_component
from mmrl.types import Prompt
from pipelines.scheduler_seam import Plan, Sample

if TYPE_CHECKING:
    from pipelines.diffusion import DiffusionPolicy


@dataclass(frozen=True)
class Steering:
    """How rewards steer rollouts (Euphonium, arXiv 2602.04928); evaluations are never steered.

    A stochastic step N(mean, C^2) of a sample becomes N(mean + scale C^2 grad r, C^2), to first order what it is under
    a tilt by ``exp(scale r)``. With r a reward of noisy states this discretises the drift towards the distribution that
    a KL of weight ``1 / (2 scale)`` keeps near the policy. Here r is the reward of the estimate of the clean sample,
    and its gradient goes through the decoder and the network; the paper has a reward model for noisy latents.

    Log-probs are those of the steps as they would have been: replays need no rewards, and a policy gradient makes
    likelier what steering found and rewards confirmed.

    Attributes:
        rewards: as in the config's own list, all differentiable.
        scale: the paper's ``1 / (2 beta)``.
        begin: first step of the sampler that may be steered.
    """

    rewards: list[dict[str, Any]]
    scale: Annotated[float, Field(ge=0)] = 0.16
    begin: Annotated[int, Field(ge=0)] = 0

    def components(self) -> list[Component]:
        """The rewards, checked but not built; raises ``UserError``."""
        where = "pipeline.steering"
        return [
            reward_component(reward, where=where, path=f"rewards.{k}", folders=())
            for k, reward in enumerate(self.rewards)
        ]


@dataclass
class Stretch(Plan):
    """Some steps of a plan as a run of their own; ``x`` is the state that they arrive at."""

    whole: Sample
    begin: int
    end: int | None = None
    x: Tensor | None = None

    def steps(self, total: int) -> list[int]:
        self.whole.grid = self.grid
        self.whole.steps(total)
        return list(range(self.begin, total if self.end is None else self.end))

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        arrived = self.whole.take(index, x, output, dtype)
        self.x = arrived.to(dtype).float()
        return arrived


@dataclass
class Look(Stretch):
    """One step of a plan that shows its estimate of the clean sample and is taken later, by :meth:`go`."""

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        self._step = index, x.detach(), output.detach(), dtype
        return self.grid.endpoints(index, x, output)[0]

    def go(self, push: Tensor) -> Tensor:
        """Take the step with its mean moved by its variance times ``push``; returns the next state."""
        self.whole.push = push
        super().take(*self._step)
        self.whole.push = None
        return self.x


class Steered:
    """Runs the plans of a policy's rollouts, steered by rewards.

    Raises:
        UserError: a reward is not differentiable.
    """

    def __init__(self, options: Steering):
        self.options = options
        self.scorer = build_scorer(options.components())
        self.scorer.check_differentiable()

    def run(
        self, policy: DiffusionPolicy, prompts: list[Prompt], plan: Sample, seeds: Sequence[int], x: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Decoded samples, and rewards ``[N, T]`` of the states before the decisions; NaN where none was computed."""
        seam, call, place = policy.seam, policy.train, plan.start
        process = torch.full((len(prompts), len(plan.stochastic)), torch.nan)
        for column, step in enumerate(plan.stochastic):
            if step < self.options.begin:
                continue
            before = Stretch(plan, place, step)
            if x is None or place < step:
                x = self._advance(policy, prompts, before, seeds, x)
            x, process[:, column] = self._steer(policy, prompts, Look(plan, step, step + 1), seeds, x)
            place = step + 1
        return seam.run(prompts, call, Stretch(plan, place), seeds, x, decode=True), process

    def _advance(
        self, policy: DiffusionPolicy, prompts: list[Prompt], plan: Stretch, seeds: Sequence[int], x: Tensor | None
    ) -> Tensor:
        """The state after a stretch; of one without steps, the noise it would start from."""
        if plan.begin == plan.end:
            seen: dict[str, Any] = {"texts": []}
            policy.seam.run(prompts, policy.train, policy.seam.inspection(), seeds, seen=seen)
            return seen["latents"].float()
        policy.seam.run(prompts, policy.train, plan, seeds, x)
        return plan.x

    def _steer(
        self, policy: DiffusionPolicy, prompts: list[Prompt], look: Look, seeds: Sequence[int], x: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The state after a steered step, and the rewards ``[N]`` of the state before it, on the CPU."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            decoded = policy.seam.run(prompts, policy.train, look, seeds, x, grad=True, decode=True)
            samples = policy._samples(prompts, decoded.float(), torch.arange(len(prompts)))
            total = self.scorer(samples, grad=True).total
            (climb,) = torch.autograd.grad(total.nan_to_num().sum(), x)
        with torch.no_grad():
            return look.go(self.options.scale * climb), total.detach().cpu()
