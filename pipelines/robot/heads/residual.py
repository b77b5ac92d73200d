"""A small actor beside a frozen action head, whose chunks it corrects."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mmrl.types import Decisions
from pipelines.robot.heads.base import ActionHead, HeadShape, Sampled, chunk_logp
from pipelines.robot.networks import mlp, pooled

LOG_STD = (-5.0, 1.0)


class ResidualHead(ActionHead):
    """The base's chunk plus ``scale * a``, with ``a`` in (-1, 1) the tanh of a Gaussian; one decision.

    What the Gaussian's mean and std depend on, the *situation*, is the context and the base's chunk. At the start the
    mean is 0. The base always samples as its deterministic sampler does, from the same noise.

    Args:
        shape: of context and chunk.
        base: the head that is corrected.
        scale: bound of the correction, where 1 is half the range of an action.
        hidden: widths of the actor's layers.
        std: of the Gaussian at the start.
    """

    def __init__(self, shape: HeadShape, base: ActionHead, scale: float, hidden: Sequence[int], std: float):
        super().__init__()
        self.shape, self.base, self.scale = shape, base, scale
        self.size = shape.horizon * shape.action_dim
        self.situation_size = shape.context_dim + self.size
        self.elements_per_decision = self.size
        self.actor = mlp([self.situation_size, *hidden, 2 * self.size], nn.ReLU)
        nn.init.zeros_(self.actor[-1].weight)
        with torch.no_grad():
            self.actor[-1].bias.copy_(torch.tensor([0.0, math.log(std)]).repeat_interleave(self.size))

    def situation(self, context: Any, chunk: Tensor) -> Tensor:
        """``[n, S]`` from a context and the base's chunk ``[n, H, D]``."""
        return torch.cat([pooled(context).float(), chunk.float().flatten(1)], 1)

    def gaussian(self, situation: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log of the std ``[n, H * D]`` before the tanh."""
        mean, log_std = self.actor(situation).chunk(2, 1)
        return mean, log_std.clamp(*LOG_STD)

    def propose(self, context: Any, starts: Tensor) -> Tensor:
        """The base's chunk ``[n, H, D]`` from numbers of its :meth:`draw`."""
        return self.base.sample(context, starts, deterministic=True).actions

    def draw(self, turns: int, generator: torch.Generator, deterministic: bool = False) -> Tensor:
        """The base's numbers, then a normal number for each element."""
        starts = self.base.draw(turns, generator, deterministic=True)
        if deterministic:
            return starts
        return torch.cat([starts, torch.randn(turns, self.size, generator=generator)], 1)

    def sample(self, context: Any, draws: Tensor, deterministic: bool = False) -> Sampled:
        """See :meth:`ActionHead.sample`."""
        starts = draws if deterministic else draws[:, : -self.size]
        chunk = self.propose(context, starts)
        situation = self.situation(context, chunk)
        mean, log_std = self.gaussian(situation)
        u = mean if deterministic else mean + log_std.exp() * draws[:, -self.size :]
        actions = chunk + self.scale * u.tanh().view_as(chunk)
        if deterministic:
            return Sampled(actions, {})
        record = {"situation": situation, "u": u, "starts": starts}
        return Sampled(actions, record, tanh_log_density(u, mean, log_std).view_as(chunk))

    def logp(self, elements: Tensor, executed: Tensor) -> Tensor:
        """See :func:`pipelines.robot.heads.base.chunk_logp`."""
        return chunk_logp(elements[:, None], executed, "sum", "step")

    def decisions(
        self, context: Any, record: Mapping[str, Tensor], executed: Tensor, columns: Sequence[int] | None = None
    ) -> Decisions:
        """See :meth:`ActionHead.decisions`; the base is not asked again."""
        elements = tanh_log_density(record["u"], *self.gaussian(record["situation"]))
        return Decisions(self.logp(elements.unflatten(1, (self.shape.horizon, self.shape.action_dim)), executed))


def tanh_log_density(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-density of ``tanh(u)``, by element, for Gaussian ``u``."""
    gaussian = -0.5 * ((u - mean) * (-log_std).exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    return gaussian - 2 * (math.log(2) - u - softplus(-2 * u))
