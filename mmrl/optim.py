"""Optimisers by name, learning-rate schedules as functions of the step, and the average of weights."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch

from mmrl.errors import UserError, nearest

Schedule = Literal["constant", "linear", "cosine"]


def build_optimizer(name: str, parameters: Iterable[Any], lr: float, options: Mapping[str, Any]):
    """``torch.optim.<name>`` over parameters or groups of them.

    Raises:
        UserError: there is no such optimiser, or it does not take one of the options.
    """
    known = [
        key
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer) and key != "Optimizer"
    ]
    if name not in known:
        raise UserError(f"trainer.optimizer: torch has no optimizer '{name}'{nearest(name, known)}")
    kind = getattr(torch.optim, name)
    accepted = set(inspect.signature(kind).parameters) - {"params", "lr"}
    for key in options:
        if key not in accepted:
            raise UserError(f"trainer.optimizer_options.{key}: {name} has no such option{nearest(key, accepted)}")
    return kind(list(parameters), lr=lr, **options)


def learning_rate(lr: float, schedule: Schedule, warmup: int, step: int, steps: int) -> float:
    """The rate of optimiser step ``step`` (from 0) of ``steps``.

    Rises linearly over the first ``warmup`` steps, then stays, or falls to 0 at the end linearly or as a half cosine.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    progress = (step - warmup) / max(steps - warmup, 1)
    if schedule == "linear":
        return lr * (1 - progress)
    return lr * 0.5 * (1 + math.cos(math.pi * progress))


def average_decay(decay: float, updates: int, warmup: bool) -> float:
    """Decay of the weight average at its n-th update; with warm-up ``min((1 + n) / (10 + n), decay)``."""
    return min((1 + updates) / (10 + updates), decay) if warmup else decay
