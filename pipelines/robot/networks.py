"""Networks of robot policies: encoders of observations, and the small nets of action heads.

An *encoder* is a module ``encoder(observation) -> context`` with an attribute ``context_dim``. The context is a float
tensor ``[n, context_dim]``, or anything else with rows that the action head at hand can take (it must offer
``repeat_interleave(k, 0)`` like a tensor, and ``pooled()`` as a tensor for networks that are MLPs). It is computed once
for each turn, however many denoising steps follow. An encoder may bring networks of its own for action heads,
``chunk_network(horizon, action_dim, time_width)`` in the place of :class:`ChunkNetwork`, and ``token_network``; and a
``scale`` in the place of :class:`pipelines.robot.normalise.ActionScale`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrl.errors import UserError

if TYPE_CHECKING:
    from pipelines.robot.envs import Observation

NETWORKS: dict[str, str] = {
    "mlp": "pipelines.robot.networks:StateEncoder",
    "scene": "pipelines.robot.vla:SceneEncoder",
    "vlm": "pipelines.robot.vla_vlm:VLMEncoder",
    "lerobot": "pipelines.robot.vla_lerobot:LeRobotEncoder",
}
"""Encoders by name; each is built as ``Encoder(spaces, **options)``."""


@dataclass(frozen=True)
class Spaces:
    """What an environment shows and takes.

    Attributes:
        state_dim: numbers of the state, 0 where there is none.
        image_shape: ``(3, h, w)`` of pictures, or None.
        action_dim: numbers of one action.
    """

    state_dim: int
    image_shape: tuple[int, int, int] | None
    action_dim: int


def mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    """Linear layers of the given sizes with the activation between them."""
    layers: list[nn.Module] = []
    for number, (before, after) in enumerate(pairwise(sizes)):
        layers += [nn.Linear(before, after)] if number == len(sizes) - 2 else [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers)


class StateEncoder(nn.Module):
    """The state as it is, or through an MLP.

    Args:
        spaces: of the environment.
        hidden: widths of its layers; none passes the normalised state on, which the action head's own layers suffice
            for.
    """

    def __init__(self, spaces: Spaces, hidden: Sequence[int] = ()):
        super().__init__()
        if not spaces.state_dim:
            raise UserError(
                "network 'mlp' reads a state, but the environment shows pictures only: "
                f"take another one of {', '.join(NETWORKS)}"
            )
        self.layers = mlp([spaces.state_dim, *hidden], nn.ReLU) if hidden else nn.Identity()
        self.context_dim = hidden[-1] if hidden else spaces.state_dim

    def forward(self, observation: Observation) -> Tensor:
        """``[n, context_dim]`` from the state ``[n, S]``."""
        return self.layers(observation.state)


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time in [0, 1], then a small MLP: ``[n] -> [n, width]``."""

    def __init__(self, width: int):
        super().__init__()
        frequencies = torch.exp(torch.linspace(0, math.log(200.0), width // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.layers = mlp([2 * (width // 2), 2 * width, width])

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], 1))


class ChunkNetwork(nn.Module):
    """What a denoising head asks at every step: ``network(context, x, time) -> [n, H, D]``, an MLP on all three.

    Args:
        context_dim: width of the context.
        horizon, action_dim: H actions of D numbers.
        hidden: widths of the layers.
        time_width: of the time's embedding, even.
    """

    def __init__(self, context_dim: int, horizon: int, action_dim: int, hidden: Sequence[int], time_width: int):
        super().__init__()
        self.time = TimeEmbedding(time_width)
        size = horizon * action_dim
        self.layers = mlp([context_dim + size + time_width, *hidden, size])

    def forward(self, context: Tensor, x: Tensor, time: Tensor) -> Tensor:
        """Velocity or noise ``[n, H, D]`` for noisy chunks ``x`` at times ``[n]`` in [0, 1], 1 being noise."""
        return self.layers(torch.cat([context, x.flatten(1), self.time(time)], 1)).view_as(x)


class NoiseNetwork(nn.Module):
    """ReinFlow's bounded noise (arXiv:2505.22094): the std of each element from context and time.

    The embedding of the time comes from the velocity network and is detached, as is published, so that exploration does
    not shape it. ``log sigma^2`` is ``tanh``-bounded between those of ``bounds``.
    """

    def __init__(
        self,
        context_dim: int,
        time_width: int,
        horizon: int,
        action_dim: int,
        hidden: Sequence[int],
        bounds: tuple[float, float],
    ):
        super().__init__()
        self.layers = mlp([context_dim + time_width, *hidden, horizon * action_dim])
        self.shape = (horizon, action_dim)
        self.low, self.high = (2 * math.log(bound) for bound in bounds)

    def forward(self, context: Any, embedded_time: Tensor) -> Tensor:
        """Standard deviations ``[n, H, D]`` from a context and an embedding of the time ``[n, time_width]``."""
        out = self.layers(torch.cat([pooled(context), embedded_time.detach()], 1)).unflatten(1, self.shape)
        return torch.exp(0.5 * (self.low + (self.high - self.low) * (out.tanh() + 1) / 2))


class ValueNetwork(nn.Module):
    """Predicted return ``[n]`` from a context, which gets no gradient from it."""

    def __init__(self, context_dim: int, hidden: Sequence[int]):
        super().__init__()
        self.layers = mlp([context_dim, *hidden, 1])

    def forward(self, context: Any) -> Tensor:
        return self.layers(pooled(context).detach())[:, 0]


def pooled(context: Any) -> Tensor:
    """A context as one tensor ``[n, context_dim]``."""
    return context if isinstance(context, Tensor) else context.pooled()
