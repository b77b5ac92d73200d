"""Pictures that are noised again: at which noise levels, with which noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mmrl.seeding import generator
from mmrl.types import Denoising
from pipelines.scheduler_seam import Grid

FitTime = Literal["logit_normal", "uniform", "steps"]
"""``logit_normal`` and ``uniform`` are shifted as the model's own noise levels are; ``steps`` are the noise levels at
which the sampler, too, calls the network."""


def noised_again(grid: Grid, x0: Tensor, seeds: Sequence[int], kind: FitTime) -> Denoising:
    """States of ``x0 [N, ...]`` to predict at, without the prediction; row k is a function of ``seeds[k]`` alone."""
    draws = [generator(seed, "fit") for seed in seeds]
    if kind == "steps":
        levels = grid.step_times()
        time = torch.cat([levels[torch.randint(len(levels), (1,), generator=g)] for g in draws])
    else:
        u = torch.cat([1 - torch.rand(1, generator=g) if kind == "uniform" else _logistic(g) for g in draws])
        time = grid.shift * u / (1 + (grid.shift - 1) * u)
    time = time.to(x0.device)
    noise = torch.stack([torch.randn(x0.shape[1:], generator=g) for g in draws]).to(x0.device)
    x, target = grid.noised(x0, noise, time)
    return Denoising(target, x, time, grid.x0_scale(time))


def _logistic(draw: torch.Generator) -> Tensor:
    return torch.randn(1, generator=draw).sigmoid()
