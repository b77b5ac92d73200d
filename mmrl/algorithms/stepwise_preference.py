"""Preference over recorded decisions: D3PO on whole trajectories, SPO on single steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import roll_out, row_chunks
from mmrl.algorithms.pairs import Pairing, Pairs, pairs_of_groups
from mmrl.errors import UserError
from mmrl.pair_losses import preference_loss
from mmrl.seeding import derive_seed, generator
from mmrl.types import Prompt, Rollout


@dataclass
class MicroBatch:
    """Some pairs and the columns of the decisions at hand; ``decisions_in_update`` divides the loss."""

    pairs: Pairs
    columns: list[int]
    decisions_in_update: int


class StepwisePreference:
    """DPO's loss on each recorded denoising step: ``-log sigmoid(beta (r_w - r_l))`` with r the step's log-ratio.

    * D3PO (arXiv 2311.13231): every step of the better output of a group is preferred to the same step of the worse.
    * SPO (2406.04314), with ``candidates``: single steps of a rollout are taken anew several times from the state that
      they started at, the estimates of the clean output right after are scored, and the best and the worst candidate
      make a pair. Where the paper trains a reward model for noisy pictures, this shows the rewards those estimates.

    Args:
        group_size: samples per prompt; with ``candidates``, rollouts per prompt.
        candidates: how often a step is taken anew; null for D3PO.
        steps_per_rollout: with ``candidates``, how many steps of a rollout, drawn at every training step.
        beta: strength of the preference.
        ratio_clip: ratios are clamped to one plus or minus this, as in D3PO's code; null for none.
        pairs: see :class:`mmrl.algorithms.preference.PreferenceOptimisation`.
        refresh_reference: every so many steps the reference becomes the current policy; never when not given.
        epochs: passes over the pairs of a rollout.
    """

    needs_gradient_of_reward = False
    needs_reference = True
    needs_rewards = True

    def __init__(
        self,
        group_size: Annotated[int, Field(ge=1)] = 8,
        candidates: Annotated[int, Field(ge=2)] | None = None,
        steps_per_rollout: Annotated[int, Field(ge=1)] = 1,
        beta: Annotated[float, Field(gt=0)] = 0.1,
        ratio_clip: Annotated[float, Field(gt=0, lt=1)] | None = None,
        pairs: Pairing = "best_worst",
        refresh_reference: Annotated[int, Field(ge=1)] | None = None,
        epochs: Annotated[int, Field(ge=1)] = 1,
    ):
        if candidates is None and group_size < 2:
            raise UserError("algorithm.group_size is 1, but a pair needs two samples of a prompt: set it to 2 or more")
        self.group_size = group_size
        self.candidates, self.steps_per_rollout = candidates, steps_per_rollout
        self.beta, self.ratio_clip = beta, ratio_clip
        self.pairs = pairs
        self.refresh_reference = refresh_reference
        self.epochs = epochs
        self.verbs = frozenset({"rollout", "decisions", "means"} | ({"candidates"} if candidates else set()))
        self.needs_comparison = pairs == "compared"

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Pairs:
        if self.refresh_reference and step > 0 and step % self.refresh_reference == 0:
            context.policy.parameters.take_snapshot("reference")
        rollout = roll_out(context, prompts, self.group_size, step)
        if self.candidates:
            rollout = self._candidates(context, rollout, step)
        return pairs_of_groups(context, rollout, step, self.pairs)

    def _candidates(self, context: Context, rollout: Rollout, step: int) -> Rollout:
        """Single decisions taken anew; those of one state are a group."""
        total = rollout.logp.shape[1]
        draw = generator(context.seed, "columns", step)
        parts = []
        with context.clock("rollout"):
            for column in torch.randperm(total, generator=draw)[: self.steps_per_rollout].tolist():
                seed = derive_seed(context.seed, "candidates", step, column, distributed.rank())
                part = context.policy.candidates(rollout, column, self.candidates, seed)
                part.group = part.group + len(parts) * len(rollout)
                part.samples.group = part.group
                parts.append(part)
        return Rollout.cat(parts)

    def updates(self, context: Context, experience: Pairs, step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        mask = experience.winners.mask & experience.losers.mask
        decisions = int(distributed.total(mask.sum().item()))
        for _ in range(self.epochs):
            yield Update(size, self._micro_batches(context, experience, decisions))

    def _micro_batches(self, context: Context, pairs: Pairs, decisions: int) -> Iterator[MicroBatch]:
        # Winner and loser run together, so a pair counts as two samples.
        for rows in row_chunks(len(pairs), max(1, context.micro_batch_size // 2)):
            part = pairs[rows]
            for columns in context.policy.decision_chunks(part.winners):
                yield MicroBatch(part, columns, decisions)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        policy, both, columns = context.policy, micro_batch.pairs.both, micro_batch.columns
        logp = policy.decisions(both, columns).logp
        with torch.no_grad(), policy.reference():
            reference = policy.decisions(both, columns).logp
        log_ratio = logp - reference
        if self.ratio_clip is not None:
            log_ratio = log_ratio.clamp(math.log1p(-self.ratio_clip), math.log1p(self.ratio_clip))
        won, lost = log_ratio.chunk(2)
        mask = both.mask[:, columns].to(logp.device)
        mask = (mask.chunk(2)[0] & mask.chunk(2)[1]).to(won)
        per_decision = preference_loss(won - lost, self.beta) * mask
        context.tally.mean("loss", per_decision, mask)
        context.tally.mean("pairs/accuracy", (won > lost).float(), mask)
        context.tally.mean("pairs/logit", self.beta * (won - lost), mask)
        return per_decision.sum() / micro_batch.decisions_in_update
