"""What a rollout of denoising steps is replayed from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmrl.types import Rollout, Rows
from pipelines.scheduler_seam import Kernel


@dataclass(eq=False)
class Trace(Rows):
    """What a rollout is replayed from.

    Attributes:
        states: ``[N, P, ...]`` float32 states at ``positions``; the last is the final latent.
        positions: long ``[N, P]``; position p is the state before step p.
        steps: long ``[N, T]``, the step of the sampler that each decision is.
        noise: float64 ``[N, T]``, the noise level of each.
        seeds: long ``[N]``, of what the pipeline itself draws.
        kept: long ``[N]``, the rows' numbers in a :class:`pipelines.kept_graph.KeptGraph`, if their graphs were kept.
    """

    states: Tensor
    positions: Tensor
    steps: Tensor
    noise: Tensor
    seeds: Tensor
    kept: Tensor | None = None

    def at(self, position: int) -> Tensor:
        """States ``[N, ...]`` at one position; all rows must have it at the same place."""
        columns = (self.positions[0] == position).nonzero().flatten()
        if len(columns) == 0:
            raise ValueError(f"the rollout kept states at {self.positions[0].tolist()}, not at {position}")
        return self.states[:, int(columns[0])]

    def kernel(self, kernel: Kernel) -> Kernel:
        """``kernel`` with the noise levels that were recorded, which all rows must share."""
        return replace(kernel, noise_level=dict(zip(self.steps[0].tolist(), self.noise[0].tolist(), strict=True)))


def shared_states(rollout: Rollout, column: int) -> tuple[list[int], Tensor]:
    """Rows of which each has another state before decision ``column``, and for every row which of these is its own.

    Before the first decision states are a function of what a path starts from, after that of the last one it took.
    """
    if column == 0:
        names = rollout.trace.seeds.tolist()
    elif rollout.branch is not None:
        names = rollout.branch[:, column - 1].tolist()
    else:
        names = range(len(rollout))
    rows: dict[int, int] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, row)
    number = {name: place for place, name in enumerate(rows)}
    return list(rows.values()), torch.tensor([number[name] for name in names])
