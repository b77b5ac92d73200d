"""Regression weighted by reward or advantage."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.advantages import AdvantageMethod, constant_groups, group_sums
from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import sample_advantages
from mmrl.algorithms.online_fit import OnlineFit, nan_where


@dataclass
class RewardWeighted(OnlineFit):
    """RWR: ``E[w fit]`` with ``w = exp(R / beta)`` over its mean; on flows Flow-RWR (arXiv 2501.13918).

    The minimum is the policy that sampled, tilted by ``exp(R / beta)``: with ``samples_from: reference`` that is the
    optimum of reward less ``beta`` KL to the reference, and stays it; with ``current`` each step tilts on.

    Args:
        beta: temperature.
        mean_over: samples over which weights have mean 1: those of the ``group`` or of the ``batch``.
        samples_from: the ``current`` policy or the ``reference``.

    Groups whose scores are all equal are left out where weights are relative to the group.
    """

    beta: Annotated[float, Field(gt=0)] = 1.0
    mean_over: Literal["group", "batch"] = "group"
    samples_from: Literal["current", "reference"] = "current"

    def __post_init__(self) -> None:
        self.needs_reference = self.samples_from == "reference"

    def sampling(self, context: Context, step: int) -> contextlib.AbstractContextManager[None]:
        return context.policy.reference() if self.needs_reference else contextlib.nullcontext()

    def weigh(self, scores: Tensor, group: Tensor) -> Tensor:
        missing = scores.isnan()
        logits = torch.where(missing, -torch.inf, scores / self.beta).double()
        if self.mean_over == "batch":
            everyone = distributed.gather_rows(logits)
            top = everyone.max()
            weight = (logits - top).exp() / (everyone - top).exp().sum() * (everyone > -torch.inf).sum()
        else:
            top = logits.new_full((int(group.max()) + 1,), -torch.inf).scatter_reduce(0, group, logits, "amax")
            weight = (logits - top[group]).exp()
            weight = weight * group_sums((~missing).double(), group) / group_sums(weight, group)
            missing = missing | constant_groups(scores, group)
        return nan_where(missing, weight.float())


@dataclass
class AdvantageWeighted(OnlineFit):
    """AWR (arXiv 1910.00177): ``E[min(exp(A / beta), max_weight) fit]``.

    Args:
        advantage: over which baseline; see :func:`mmrl.advantages.group_advantages`.
        beta: temperature.
        max_weight: bound on weights.
    """

    advantage: AdvantageMethod = "group"
    beta: Annotated[float, Field(gt=0)] = 1.0
    max_weight: Annotated[float, Field(gt=0)] = 20.0

    def weigh(self, scores: Tensor, group: Tensor) -> Tensor:
        advantage = sample_advantages(scores, group, self.advantage)
        return nan_where(scores.isnan(), (advantage / self.beta).exp().clamp(max=self.max_weight))
