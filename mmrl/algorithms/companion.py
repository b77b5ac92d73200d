"""Models that are trained beside the policy: further copies of its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from mmrl import distributed
from mmrl.policy import Parameters


class Companion:
    """A copy of the policy's weights, as they were when the stage began, with an Adam of its own.

    The copy and Adam's two moments are snapshots of the policy's parameters: checkpoints hold them.

    Args:
        name: of the snapshot.
        lr: of Adam.
    """

    def __init__(self, name: str, lr: float):
        self.name = name
        self.lr = lr

    def start(self, parameters: Parameters) -> None:
        """Make the copy, unless it is there already."""
        if self.name in parameters.snapshots:
            return
        parameters.take_snapshot(self.name)
        for moment in self._moments:
            parameters.snapshots[moment] = {key: torch.zeros_like(p) for key, p in parameters.named.items()}

    @property
    def _moments(self) -> tuple[str, str]:
        return f"{self.name}-mean", f"{self.name}-square"

    @contextlib.contextmanager
    def training(self, parameters: Parameters, step: int) -> Iterator[None]:
        """Inside, the policy is the copy and gradients add up; at the end the copy takes its optimiser step ``step``.

        Steps count from 0; the policy has no gradients of its own before or after.
        """
        mean, square = (parameters.snapshots[moment] for moment in self._moments)
        with torch.enable_grad(), parameters.swapped(self.name):
            yield
            distributed.sum_gradients(list(parameters))
            adam = torch.optim.Adam(list(parameters), lr=self.lr)
            for key, p in parameters.named.items():
                adam.state[p] = {"step": torch.tensor(float(step)), "exp_avg": mean[key], "exp_avg_sq": square[key]}
            adam.step()
            adam.zero_grad(set_to_none=True)
