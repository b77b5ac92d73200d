"""Credit for denoising steps: what each decision did for the reward, where the plain share is the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.advantages import group_advantages
from mmrl.algorithms.base import Context
from mmrl.errors import UserError
from mmrl.types import Rollout

Completion = Literal["ode", "jump"]


def noise_weights(rollout: Rollout, mask: Tensor) -> Tensor:
    """TempFlow-GRPO's weight of each decision (arXiv 2508.04324): its std over the mean std of all that count.

    Steps that add much noise explore much; their mean weight is 1. The released code writes ``2.25 std``, which is this
    for the nine stochastic steps of its SD3.5 sampler.

    Returns:
        ``[N, T]`` float32 on the CPU.

    Raises:
        UserError: the rollout has no std.
    """
    if rollout.std is None:
        raise UserError("step_weight 'noise' needs a policy whose rollouts record the noise of their steps")
    std = rollout.std.cpu().float()
    count = distributed.total(mask.sum().item())
    return std * (max(count, 1) / max(distributed.total((std * mask).sum().item()), 1e-12))


def branch_advantages(scores: Tensor, group: Tensor, branch: Tensor, mask: Tensor) -> Tensor:
    """Advantages ``[N, T]`` of decisions that samples share (BranchGRPO, arXiv 2509.06040).

    A decision is worth the mean score of the samples that came of it, and is compared with the other decisions of its
    column and group, each counted once however many samples share it. Where all samples share one, there is no signal.

    Args:
        scores: ``[N]``; NaN where no reward applies.
        group: long ``[N]``, from 0.
        branch: long ``[N, T]``, see :class:`mmrl.types.Rollout`.
        mask: bool ``[N, T]``, the decisions that count.
    """
    valid = ~scores.isnan()
    columns = []
    for column in branch.unbind(1):
        names, place = column.unique(return_inverse=True)
        total = torch.zeros(len(names)).index_add_(0, place[valid], scores[valid].float())
        value = total / torch.zeros(len(names)).index_add_(0, place[valid], torch.ones(int(valid.sum())))
        where = torch.zeros(len(names), dtype=torch.long).scatter_(0, place, group)
        columns.append(group_advantages(value, where)[place])
    return torch.stack(columns, 1) * (mask & valid[:, None])


def reward_gains(before: Tensor, scores: Tensor) -> Tensor:
    """DenseGRPO's rewards ``[N, T]`` of decisions (arXiv 2601.20218): by how much each raised the score in prospect.

    The prospect after a decision is that before the next one, after the last one it is the score itself: the gains of a
    sample add up to its score less the prospect at its start.

    Args:
        before: ``[N, T]`` scores in prospect before each decision (:class:`Prospects`).
        scores: ``[N]``.
    """
    return torch.cat([before, scores[:, None]], 1).diff(dim=1)


def column_advantages(values: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """Values ``[N, T]`` normalised among the decisions of the same column and group; 0 where masked or NaN."""
    values = torch.where(mask, values, torch.nan)
    return torch.stack([group_advantages(column, group) for column in values.unbind(1)], 1)


@dataclass(frozen=True)
class NoiseCalibration:
    """Noise of each step by the gains it brings, after DenseGRPO (arXiv 2601.20218).

    A step should explore as widely as it can without making nearly everything worse: its noise grows by the factor
    ``1 + rate`` where the share of samples that gained by it is within ``tolerance`` of one half, and shrinks by it
    elsewhere.

    Attributes:
        bounds: of a step's noise as a multiple of the ``noise_level`` that was given.
    """

    rate: Annotated[float, Field(gt=0)] = 0.02
    tolerance: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    bounds: tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]] = (0.25, 4.0)


class Prospects:
    """Scores in prospect of the states before decisions; calibrated noise, if asked for, is part of a checkpoint.

    Attributes:
        scale: factors of the noise of decisions, in order; None is 1.
    """

    def __init__(self, completion: Completion, calibration: NoiseCalibration | None):
        self.completion = completion
        self.calibration = calibration
        self.scale: list[float] | None = None

    def state(self) -> dict[str, list[float]]:
        return {} if self.scale is None else {"scale": self.scale}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        self.scale = list(state["scale"])

    def __call__(self, context: Context, rollout: Rollout, scores: Tensor, step: int) -> Tensor:
        """Scores ``[N, T]``, on the CPU, of what the sampler makes without noise of the state before each decision.

        The shares of samples that gained by each decision go to the tally, and change the noise of later rollouts.
        """
        found = []
        for column in range(rollout.logp.shape[1]):
            with context.clock("rollout"):
                samples = context.policy.complete(rollout, column, jump=self.completion == "jump")
            with context.clock("reward"):
                found.append(context.scorer(samples, step=step).total.cpu().float())
        before = torch.stack(found, 1)
        gains = reward_gains(before, scores.detach().cpu().float())
        for column, gain in enumerate(gains.unbind(1)):
            context.tally.mean(f"gain/positive/{column}", (gain > 0).float(), (~gain.isnan()).float())
        if self.calibration is not None:
            self._calibrate(gains)
        return before

    def _calibrate(self, gains: Tensor) -> None:
        rate, (low, high) = 1 + self.calibration.rate, self.calibration.bounds
        scale = list(self.scale or [1.0] * gains.shape[1])
        for column, gain in enumerate(gains.unbind(1)):
            known = distributed.total((~gain.isnan()).sum().item())
            share = distributed.total((gain > 0).sum().item()) / max(known, 1)
            balanced = abs(share - 0.5) <= self.calibration.tolerance
            scale[column] = min(max(scale[column] * (rate if balanced else 1 / rate), low), high)
        self.scale = scale
