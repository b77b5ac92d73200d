"""The policy-gradient family: sample groups, weigh decisions by advantage, bound the step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed, losses
from mmrl.advantages import AdvantageMethod, decoupled_advantages, group_advantages
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import roll_out, row_chunks, score, split_groups
from mmrl.errors import UserError
from mmrl.policy import Policy
from mmrl.scoring import Scores
from mmrl.types import Decisions, Prompt, Rollout

GROUP_BASELINES = ("group", "mean", "batch", "rloo", "gdpo", "decoupled")


@dataclass
class Experience:
    """A rollout and the advantage ``[N]`` of each sample, on the device of the scores."""

    rollout: Rollout
    advantage: Tensor


class ReferenceScores:
    """All decisions of some rows under the reference: one call of the policy for the micro-batches that share them."""

    def __init__(self, rollout: Rollout):
        self.rollout = rollout
        self._decisions: Decisions | None = None

    def columns(self, policy: Policy, columns: list[int]) -> Decisions:
        """The decisions ``columns``, without gradient."""
        if self._decisions is None:
            with torch.no_grad(), policy.reference():
                self._decisions = policy.decisions(self.rollout)
        return self._decisions.columns(columns)


@dataclass
class MicroBatch:
    """Some rows and some decisions (``columns``) of a rollout with their weights ``[n, t]`` in the update's loss."""

    rollout: Rollout
    reference: ReferenceScores
    advantage: Tensor
    weight: Tensor
    columns: list[int]
    first: bool


class PolicyGradient:
    """GRPO and its relatives on the decisions of any policy.

    Args:
        group_size: samples per prompt.
        objective: ``clip`` PPO/GRPO; ``gspo`` the same on the mean log-ratio of a sample; ``cispo``; ``reinforce``;
            ``guard`` GRPO-Guard and ``dppo`` Flow-DPPO for Gaussian decisions. See ``mmrl.losses``.
        clip_range: lower clip bound; for Gaussian log-probs, which are means over elements, 1e-4 to 1e-6.
        clip_range_high: upper bound; the same when not given.
        dual_clip: bound on the loss of negative advantages, as a multiple (> 1).
        ratio_bounds: clamp of CISPO's weight, on the ratio itself.
        divergence_threshold: of ``dppo``.
        aggregation: ``sequence``, ``token`` or ``constant``.
        max_decisions: divisor of ``constant``; the rollout's T when not given.
        advantage: see ``mmrl.advantages``; ``gdpo`` normalises each reward within its group, then the sum over the
            batch; ``decoupled`` leaves out the second, as MixGRPO does.
        advantage_clip: bound on the size of an advantage.
        kl_coef: weight of the KL to the reference; 0 runs no reference, and the metric ``kl`` is then the k3 estimate
            of how far the policy has moved from the one that sampled.
        kl: ``exact`` for Gaussian decisions, mean over elements; ``exact_dt`` the same times the step size, which is
            what Flow-GRPO's released code adds; ``k1``, ``k2``, ``k3`` estimates for any decisions.
        epochs: passes over a rollout.
        minibatches: optimiser steps per pass; whole groups stay together.
    """

    needs_gradient_of_reward = False
    needs_rewards = True

    def __init__(
        self,
        group_size: Annotated[int, Field(ge=1)] = 8,
        objective: Literal["clip", "gspo", "cispo", "reinforce", "guard", "dppo"] = "clip",
        clip_range: Annotated[float, Field(gt=0)] = 1e-4,
        clip_range_high: Annotated[float, Field(gt=0)] | None = None,
        dual_clip: Annotated[float, Field(gt=1)] | None = None,
        ratio_bounds: tuple[float, float] = (0.0, 5.0),
        divergence_threshold: Annotated[float, Field(gt=0)] = 1e-5,
        aggregation: losses.Aggregation = "sequence",
        max_decisions: Annotated[int, Field(ge=1)] | None = None,
        advantage: AdvantageMethod | Literal["gdpo", "decoupled"] = "group",
        advantage_clip: Annotated[float, Field(gt=0)] = 5.0,
        kl_coef: Annotated[float, Field(ge=0)] = 0.0,
        kl: Literal["exact", "exact_dt", "k1", "k2", "k3"] = "exact",
        epochs: Annotated[int, Field(ge=1)] = 1,
        minibatches: Annotated[int, Field(ge=1)] = 1,
    ):
        if group_size == 1 and advantage in GROUP_BASELINES:
            raise UserError(
                f"algorithm.group_size is 1, but advantage '{advantage}' compares the samples of a group: "
                "use 2 or more, or advantage 'global'"
            )
        self.group_size = group_size
        self.objective = objective
        self.clip_low = clip_range
        self.clip_high = clip_range if clip_range_high is None else clip_range_high
        self.dual_clip = dual_clip
        self.ratio_bounds = ratio_bounds
        self.divergence_threshold = divergence_threshold
        self.aggregation = aggregation
        self.max_decisions = max_decisions
        self.advantage = advantage
        self.advantage_clip = advantage_clip
        self.kl_coef = kl_coef
        self.kl = kl
        self.epochs = epochs
        self.minibatches = minibatches
        self.needs_reference = kl_coef > 0
        self.needs_means = objective in ("guard", "dppo")
        gaussian = self.needs_means or (kl_coef > 0 and kl.startswith("exact"))
        self.verbs = frozenset({"rollout", "decisions"} | ({"means"} if gaussian else set()))

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Experience:
        context.policy.keep_mean = self.needs_means
        rollout = roll_out(context, prompts, self.group_size, step)
        scores = score(context, rollout, step)
        advantage = self._advantages(scores, rollout.group).clamp(-self.advantage_clip, self.advantage_clip)
        alive = torch.zeros(len(prompts)).index_add_(0, rollout.group.cpu(), advantage.abs().cpu()) > 0
        context.tally.mean("groups/without_signal", (~alive).float())
        return Experience(rollout, advantage)

    def _advantages(self, scores: Scores, group: Tensor) -> Tensor:
        """Advantages of this process's samples, from the scores of all processes."""
        rank, groups, rows = distributed.rank(), int(group.max()) + 1, len(group)
        all_groups = distributed.gather_rows(group + rank * groups)
        if self.advantage in ("gdpo", "decoupled"):
            table = distributed.gather_rows(scores.values)
            batch_norm = self.advantage == "gdpo"
            out = decoupled_advantages(table, scores.weights, all_groups.to(table.device), batch_norm=batch_norm)
        else:
            table = distributed.gather_rows(scores.total)
            out = group_advantages(table, all_groups.to(table.device), self.advantage)
        return out[rank * rows : (rank + 1) * rows]

    def updates(self, context: Context, experience: Experience, step: int) -> Iterator[Update]:
        """Optimiser steps. Rows without advantage count in the totals but nothing is computed for them."""
        rollout, advantage = experience.rollout, experience.advantage.cpu()
        parts = split_groups(rollout.group.cpu(), self.minibatches)
        for number in range(self.epochs * self.minibatches):
            part = parts[number % self.minibatches]
            rows = part[advantage[part] != 0]
            mask = rollout.mask[part]
            weight = losses.aggregation_weights(
                rollout.mask[rows],
                self.aggregation,
                rows=int(distributed.total(len(part))),
                decisions=int(distributed.total(mask.sum().item())),
                max_decisions=self.max_decisions or mask.shape[1],
            )
            micro_batches = self._micro_batches(context, rollout[rows], advantage[rows], weight, first=number == 0)
            yield Update(int(distributed.total(len(rows))), micro_batches)

    def _micro_batches(
        self, context: Context, rollout: Rollout, advantage: Tensor, weight: Tensor, first: bool
    ) -> Iterator[MicroBatch]:
        for rows in row_chunks(len(rollout), context.micro_batch_size):
            part = rollout[rows]
            reference = ReferenceScores(part)
            # A sequence ratio needs all decisions of a sample at once.
            chunks = (
                [list(range(weight.shape[1]))] if self.objective == "gspo" else context.policy.decision_chunks(part)
            )
            for columns in chunks:
                yield MicroBatch(part, reference, advantage[rows], weight[rows][:, columns], columns, first)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        rollout, columns = micro_batch.rollout, micro_batch.columns
        decisions = context.policy.decisions(rollout, columns)
        device = decisions.logp.device
        old_logp = rollout.logp[:, columns].to(device)
        advantage = micro_batch.advantage.to(device)[:, None]
        weight = micro_batch.weight.to(device)

        policy_loss, ratio = self._objective(decisions, rollout, columns, old_logp, advantage)
        loss = (weight * policy_loss).sum()
        if self.kl_coef > 0:
            kl = self._reference_kl(context, micro_batch, decisions)
            loss = loss + self.kl_coef * (weight * kl).sum()
        else:
            kl = losses.sampled_kl(old_logp, decisions.logp, "k3")

        tally = context.tally
        if micro_batch.first:
            tally.max("ratio/max_abs_dev", (ratio - 1).abs())
        tally.mean("ratio/clip_fraction", losses.clipped_fraction(ratio, advantage, self.clip_low, self.clip_high))
        tally.mean("kl", kl, weight)
        tally.mean("loss", policy_loss, weight)
        return loss

    def _objective(
        self, decisions: Decisions, rollout: Rollout, columns: list[int], old_logp: Tensor, advantage: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss per decision and the ratio it was made from, both ``[n, t]``."""
        logp = decisions.logp
        if self.objective == "gspo":
            mask = rollout.mask[:, columns].to(logp.device)
            ratio = losses.sequence_log_ratio(logp, old_logp, mask).exp()
        elif self.objective == "guard":
            old_mean = rollout.mean[:, columns].to(logp.device)
            ratio = losses.guard_log_ratio(decisions.action, decisions.mean, old_mean, decisions.std).exp()
        else:
            ratio = (logp - old_logp).exp()

        if self.objective == "cispo":
            return losses.cispo_loss(logp, ratio, advantage, *self.ratio_bounds), ratio
        if self.objective == "reinforce":
            return losses.reinforce_loss(logp, advantage), ratio
        if self.objective == "dppo":
            old_mean = rollout.mean[:, columns].to(logp.device)
            divergence = losses.gaussian_kl(decisions.mean, old_mean, decisions.std)
            return losses.divergence_masked_loss(ratio, advantage, divergence, self.divergence_threshold), ratio
        loss = losses.clipped_loss(ratio, advantage, self.clip_low, self.clip_high, self.dual_clip)
        # GRPO-Guard evens out the gradient over time steps of unequal length.
        return (loss / decisions.dt if self.objective == "guard" else loss), ratio

    def _reference_kl(self, context: Context, micro_batch: MicroBatch, decisions: Decisions) -> Tensor:
        reference = micro_batch.reference.columns(context.policy, micro_batch.columns)
        if self.kl in ("k1", "k2", "k3"):
            return losses.sampled_kl(decisions.logp, reference.logp, self.kl)
        exact = losses.gaussian_kl(decisions.mean, reference.mean, decisions.std)
        return exact * decisions.dt if self.kl == "exact_dt" else exact
