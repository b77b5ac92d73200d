"""Observations brought to mean 0 and spread 1, actions to [-1, 1]."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl import distributed

LIMIT = 10.0


class Statistics:
    """Mean and spread of states, of all that were ever added; a state of which nothing is known stays as it is.

    Attributes:
        buffers: float64 tensors that :class:`mmrl.policy.Parameters` keeps in checkpoints.
    """

    def __init__(self, size: int):
        names = "count", "mean", "square"
        shapes = (), (size,), (size,)
        self.buffers = {
            name: torch.zeros(shape, dtype=torch.float64) for name, shape in zip(names, shapes, strict=True)
        }

    @property
    def known(self) -> bool:
        """Whether any states were added."""
        return bool(self.buffers["count"] > 0)

    def add(self, states: Tensor) -> None:
        """Merge states ``[n, S]`` of all processes in (Chan et al. 1979: sums of squares about the means)."""
        states = distributed.gather_ragged(states).double()
        count = len(states)
        if count == 0:
            return
        mean = states.mean(0)
        square = (states - mean).square().sum(0)
        own = self.buffers
        joined = own["count"] + count
        shift = mean - own["mean"]
        own["square"] += square + shift.square() * own["count"] * count / joined
        own["mean"] += shift * count / joined
        own["count"].copy_(joined)

    def normalised(self, states: Tensor) -> Tensor:
        """Float32 states, at most 10 spreads from the mean; numbers that never changed are not stretched."""
        if self.buffers["count"] < 2:
            return states.float()
        spread = (self.buffers["square"] / self.buffers["count"]).sqrt()
        spread = torch.where(spread < 1e-6, 1.0, spread)
        mean, spread = self.buffers["mean"].float().to(states.device), spread.float().to(states.device)
        return ((states.float() - mean) / spread).clamp(-LIMIT, LIMIT)


class ActionScale:
    """Between actions in [-1, 1] and those between an environment's bounds; numbers without bounds stay as they are."""

    def __init__(self, low: Tensor, high: Tensor):
        bounded = low.isfinite() & high.isfinite()
        self.half = torch.where(bounded, (high - low) / 2, 1.0).float()
        self.middle = torch.where(bounded, (high + low) / 2, 0.0).float()
        self.limit = torch.where(bounded, 1.0, torch.inf).float()

    def clipped(self, actions: Tensor) -> Tensor:
        """Actions of the policy ``[..., D]``, on the CPU, as far as the bounds let them take effect."""
        return torch.minimum(torch.maximum(actions, -self.limit), self.limit)

    def to_env(self, actions: Tensor) -> Tensor:
        """Clipped actions of the policy as the environment takes them."""
        return actions * self.half + self.middle

    def from_env(self, actions: Tensor) -> Tensor:
        """The inverse of :meth:`to_env`."""
        return self.clipped((actions - self.middle) / self.half)
