"""A Gaussian over chunks: the mean from an MLP, the std one number for each element."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrl.types import Decisions
from pipelines.robot.heads.base import (
    ActionHead,
    HeadShape,
    OverActions,
    Sampled,
    chunk_error,
    chunk_logp,
    live_actions,
)
from pipelines.robot.networks import mlp, pooled
from pipelines.step_kernel import gaussian_log_density

Positive = Annotated[float, Field(gt=0)]


class GaussianHead(ActionHead):
    """A chunk is one draw of independent Gaussians, and one decision.

    Args:
        shape: of context and chunk.
        hidden: widths of the layers of the mean's network.
        std: at the start.
        train_std: learn it, one number for each of the chunk's elements, whatever is observed.
        std_bounds: that a learned std is kept within.
        over_actions: the log-prob is the ``mean`` or the ``sum`` over executed actions and their numbers.
    """

    def __init__(
        self,
        shape: HeadShape,
        hidden: Sequence[int] = (128, 128),
        std: Positive = 0.2,
        train_std: bool = False,
        std_bounds: tuple[Positive, Positive] = (0.01, 1.0),
        over_actions: OverActions = "mean",
    ):
        super().__init__()
        self.shape = shape
        self.over_actions = over_actions
        self.network = mlp([shape.context_dim, *hidden, shape.horizon * shape.action_dim])
        log_std = torch.full((shape.horizon, shape.action_dim), math.log(std))
        self.log_std = nn.Parameter(log_std, requires_grad=train_std)
        self.bounds = tuple(math.log(bound) for bound in std_bounds)
        self.elements_per_decision = log_std.numel() if over_actions == "sum" else 1
        self.verbs = frozenset({"means"} if over_actions == "mean" and not train_std else ())

    def transition(self, context: Any) -> tuple[Tensor, Tensor]:
        """Mean ``[n, H, D]`` and std ``[H, D]``."""
        mean = self.network(pooled(context)).unflatten(1, (self.shape.horizon, self.shape.action_dim))
        return mean, self.log_std.clamp(*self.bounds).exp()

    def draw(self, turns: int, generator: torch.Generator, deterministic: bool = False) -> Tensor:
        """Normal numbers, none for the mean."""
        size = 0 if deterministic else self.shape.horizon * self.shape.action_dim
        return torch.randn(turns, size, generator=generator)

    def sample(self, context: Tensor, draws: Tensor, deterministic: bool = False) -> Sampled:
        """See :meth:`ActionHead.sample`."""
        mean, std = self.transition(context)
        if deterministic:
            return Sampled(mean, {})
        actions = mean + std * draws.view_as(mean)
        return Sampled(actions, {"after": actions}, gaussian_log_density(actions, mean, std), mean[:, None])

    def logp(self, elements: Tensor, executed: Tensor) -> Tensor:
        """See :func:`chunk_logp`."""
        return chunk_logp(elements[:, None], executed, self.over_actions, "step")

    def decisions(
        self, context: Tensor, record: Mapping[str, Tensor], executed: Tensor, columns: Sequence[int] | None = None
    ) -> Decisions:
        """See :meth:`ActionHead.decisions`."""
        mean, std = self.transition(context)
        after = record["after"]
        logp = self.logp(gaussian_log_density(after, mean, std), executed)
        if "means" not in self.verbs:
            return Decisions(logp)
        mean = torch.where(live_actions(executed, self.shape.horizon), mean, after)
        width = std[0, 0].expand(len(after), 1)
        return Decisions(logp, after[:, None], mean[:, None], width, dt=torch.ones_like(width))

    def fit(self, context: Tensor, actions: Tensor, executed: Tensor, normals: Tensor) -> Tensor:
        """Mean negative log-density of the elements; nothing is drawn."""
        mean, std = self.transition(context)
        return -chunk_error(gaussian_log_density(actions, mean, std), executed)
