"""Best of n: fit the best samples of each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.advantages import constant_groups
from mmrl.algorithms.online_fit import OnlineFit
from mmrl.errors import UserError


@dataclass
class BestOfN(OnlineFit):
    """RAFT (arXiv 2304.06767): sample n per prompt, keep the best, fit them, with nothing stored in between.

    Args:
        group_size: n.
        keep: how many of a group.
        threshold: keep only samples that score more than this.

    Groups whose scores are all equal have no best one and are left out.
    """

    keep: Annotated[int, Field(ge=1)] = 1
    threshold: float | None = None

    def __post_init__(self) -> None:
        if self.keep >= self.group_size:
            raise UserError(f"algorithm.keep is {self.keep}, but a group has {self.group_size} samples: keep fewer")

    @property
    def fits_per_sample(self) -> float:
        return self.noise_draws * self.keep / self.group_size

    def weigh(self, scores: Tensor, group: Tensor) -> Tensor:
        out = torch.full_like(scores, torch.nan, dtype=torch.float32)
        usable = ~scores.isnan() & ~constant_groups(scores, group)
        if self.threshold is not None:
            usable &= scores > self.threshold
        for name in group[usable].unique().tolist():
            rows = ((group == name) & usable).nonzero().flatten()
            best = rows[scores[rows].argsort(descending=True, stable=True)][: self.keep]
            # The mean over the samples of the update is then one over those that are kept.
            out[best] = self.group_size / self.keep
        return out
