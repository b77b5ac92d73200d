"""PRDP: predict reward differences by log-ratios of whole samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import roll_out, row_chunks, score, split_groups
from mmrl.algorithms.experience import reference_logp, replay
from mmrl.algorithms.objectives import default_clip_range
from mmrl.forward_losses import reward_difference_errors
from mmrl.types import Prompt, Rollout, Rows


@dataclass(eq=False)
class Scored(Rows):
    """Samples with their log-probs ``[N, T]`` under the reference and their scores ``[N]``, on the CPU."""

    rollout: Rollout
    reference: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.rollout)


@dataclass
class MicroBatch:
    """Decisions ``columns`` of some rows; ``slope [n, t]`` is the derivative of the update's loss by each log-prob."""

    rollout: Rollout
    columns: list[int]
    slope: Tensor


@dataclass
class RewardDifference:
    """PRDP (arXiv 2402.08714): ``(log-ratio_a - log-ratio_b - (R_a - R_b) / beta)^2`` over pairs of a group.

    A log-ratio is that of policy to reference, summed over the sample's decisions; where it predicts all differences
    the policy is the optimum of reward less ``beta`` KL. The loss is one of whole samples, so its derivative by each
    log-prob is found first, at the cost of one pass without gradient from the second update on, and carried to the
    decisions in portions that fit into memory.

    Args:
        group_size: samples per prompt.
        beta: weight of the KL.
        clip_range: how far each decision's log-prob may go from the policy that sampled before it stops counting as
            progress; None is 0.2 for tokens and 1e-4 for Gaussian decisions.
        epochs: passes over the samples of a rollout.
        minibatches: optimiser steps per pass; whole groups stay together.
    """

    group_size: Annotated[int, Field(ge=2)] = 8
    beta: Annotated[float, Field(gt=0)] = 0.1
    clip_range: Annotated[float, Field(gt=0)] | None = None
    epochs: Annotated[int, Field(ge=1)] = 1
    minibatches: Annotated[int, Field(ge=1)] = 1

    verbs: ClassVar[frozenset[str]] = frozenset({"rollout", "decisions"})
    needs_reference: ClassVar[bool] = True
    needs_gradient_of_reward: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = True

    def defaults_for(self, verbs: frozenset[str]) -> dict[str, float]:
        """What options that are not given stand for, with a policy that offers ``verbs``."""
        return {"clip_range": default_clip_range("clip", "means" in verbs)[0]}

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Scored:
        rollout = roll_out(context, prompts, self.group_size, step)
        scores = score(context, rollout, step).total.cpu().float()
        return Scored(rollout, reference_logp(context, rollout), scores)

    def updates(self, context: Context, experience: Scored, step: int) -> Iterator[Update]:
        parts = split_groups(experience.rollout.group.cpu(), self.minibatches)
        for number in range(self.epochs * self.minibatches):
            part = experience[parts[number % self.minibatches]]
            rows = part[~part.scores.isnan()]
            yield Update(int(distributed.total(len(rows))), self._micro_batches(context, rows, number == 0))

    def _micro_batches(self, context: Context, rows: Scored, first: bool) -> Iterator[MicroBatch]:
        slope = self._slope(context, rows, first)
        for chunk in row_chunks(len(rows), context.micro_batch_size):
            rollout = rows.rollout[chunk]
            for columns in context.policy.decision_chunks(rollout):
                yield MicroBatch(rollout, columns, slope[chunk][:, columns])

    def _slope(self, context: Context, rows: Scored, first: bool) -> Tensor:
        """Derivative of the loss by each log-prob ``[n, T]``."""
        mask, old = rows.rollout.mask.cpu(), rows.rollout.logp.cpu()
        now = (old if first or not len(rows) else replay(context, rows.rollout).logp).detach().requires_grad_()
        bound = self.clip_range or self.defaults_for(context.policy.verbs)["clip_range"]
        with torch.enable_grad():
            near = old + (now - old).clamp(-bound, bound)
            ratio, clipped = (torch.where(mask, x - rows.reference, 0.0).sum(1) for x in (now, near))
            errors = reward_difference_errors(ratio, clipped, rows.scores / self.beta, rows.rollout.group.cpu())
            pairs = max(distributed.total(len(errors)), 1)
            # The factor makes the first update's gradient that of REINFORCE with the mean of the others as baseline.
            (slope,) = torch.autograd.grad(self.beta / 4 * errors.sum() / pairs, now)
        context.tally.mean("loss", errors)
        context.tally.mean("ratio/log", ratio)
        return slope

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        logp = context.policy.decisions(micro_batch.rollout, micro_batch.columns).logp
        slope = micro_batch.slope.to(logp)
        return torch.where(slope != 0, slope * logp, 0.0).sum()
