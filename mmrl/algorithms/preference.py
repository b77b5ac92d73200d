"""The preference family: make the better of two outputs likelier than the worse one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.advantages import constant_groups
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import roll_out, row_chunks, score
from mmrl.pair_losses import preference_loss
from mmrl.seeding import derive_seed
from mmrl.types import Prompt, Rollout


@dataclass
class Pairs:
    """Aligned winners and losers; ``names`` are numbers of the pairs that no other process uses."""

    winners: Rollout
    losers: Rollout
    names: list[int]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> Pairs:
        return Pairs(self.winners[rows], self.losers[rows], self.names[rows])


@dataclass
class MicroBatch:
    """Some pairs with the noise seed of each; ``pairs_in_update`` divides the loss."""

    pairs: Pairs
    seeds: list[int]
    pairs_in_update: int


class PreferenceOptimisation:
    """Online DPO: roll out a group, pair its best with its worst, fit both under policy and reference.

    Works on whatever ``fit`` measures: for diffusion it is Diffusion-DPO (arXiv 2311.12908), for flows Flow-DPO.

    Args:
        group_size: samples per prompt.
        beta: strength of the preference; half of Diffusion-DPO's (published 2000 to 5000 there means 1000 to 2500).
        label_smoothing: chance that a label is wrong (cDPO).
        pairs: ``best_worst`` one pair a group; ``ranked`` best with worst, second with second worst and so on.
        noise_draws: noise and timestep draws per pair; each is a term of its own.
        refresh_reference: every so many steps the reference becomes the current policy; never when not given.
        epochs: passes over the pairs of a rollout.
    """

    verbs = frozenset({"rollout", "fit"})
    needs_reference = True
    needs_gradient_of_reward = False
    needs_rewards = True

    def __init__(
        self,
        group_size: Annotated[int, Field(ge=2)] = 8,
        beta: Annotated[float, Field(gt=0)] = 100.0,
        label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0,
        pairs: Literal["best_worst", "ranked"] = "best_worst",
        noise_draws: Annotated[int, Field(ge=1)] = 1,
        refresh_reference: Annotated[int, Field(ge=1)] | None = None,
        epochs: Annotated[int, Field(ge=1)] = 1,
    ):
        self.group_size = group_size
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.pairs = pairs
        self.noise_draws = noise_draws
        self.refresh_reference = refresh_reference
        self.epochs = epochs

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Pairs:
        if self.refresh_reference and step > 0 and step % self.refresh_reference == 0:
            context.policy.parameters.take_snapshot("reference")
        rollout = roll_out(context, prompts, self.group_size, step)
        scores = score(context, rollout, step).total.cpu()
        per_group = 1 if self.pairs == "best_worst" else self.group_size // 2
        winners, losers = pair_up(scores, rollout.group.cpu(), per_group)
        context.tally.mean("pairs/margin", scores[winners] - scores[losers])
        names = (winners + distributed.rank() * len(rollout)).tolist()
        return Pairs(rollout[winners], rollout[losers], names)

    def updates(self, context: Context, experience: Pairs, step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        for epoch in range(self.epochs):
            yield Update(size, self._micro_batches(context, experience, size, step, epoch))

    def _micro_batches(self, context: Context, pairs: Pairs, size: int, step: int, epoch: int) -> Iterator[MicroBatch]:
        # Winner and loser run together, so a pair counts as two samples.
        for rows in row_chunks(len(pairs), max(1, context.micro_batch_size // 2)):
            part = pairs[rows]
            for draw in range(self.noise_draws):
                seeds = [derive_seed(context.seed, "fit", step, epoch, draw, name) for name in part.names]
                yield MicroBatch(part, seeds, size)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        both = Rollout.cat([micro_batch.pairs.winners, micro_batch.pairs.losers])
        seeds = micro_batch.seeds * 2
        fit = context.policy.fit(both, seeds)
        with torch.no_grad(), context.policy.reference():
            reference = context.policy.fit(both, seeds)
        won, lost = (reference - fit).chunk(2)
        margin = won - lost
        per_pair = preference_loss(margin, self.beta, self.label_smoothing)
        context.tally.mean("loss", per_pair)
        context.tally.mean("pairs/accuracy", (margin > 0).float())
        context.tally.mean("pairs/logit", self.beta * margin)
        context.tally.mean("fit/winner", fit.chunk(2)[0])
        return per_pair.sum() / (micro_batch.pairs_in_update * self.noise_draws)


def pair_up(scores: Tensor, group: Tensor, per_group: int) -> tuple[Tensor, Tensor]:
    """Row indices of winners and losers: the k-th best with the k-th worst of each group, for k up to ``per_group``.

    Samples without a score take no part, nor do pairs whose scores are equal.
    """
    equal = constant_groups(scores, group)
    winners: list[int] = []
    losers: list[int] = []
    for name in group.unique().tolist():
        rows = ((group == name) & ~scores.isnan() & ~equal).nonzero().flatten()
        ranked = rows[scores[rows].argsort(descending=True, stable=True)].tolist()
        for k in range(min(per_group, len(ranked) // 2)):
            best, worst = ranked[k], ranked[-1 - k]
            if scores[best] > scores[worst]:
                winners.append(best)
                losers.append(worst)
    return torch.tensor(winners, dtype=torch.long), torch.tensor(losers, dtype=torch.long)
