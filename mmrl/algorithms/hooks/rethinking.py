"""Forced rethinking: answers go on after a trigger such as "Wait" (VL-Rethinker, arXiv 2504.08837)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmrl import distributed
from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import numbers_of, score
from mmrl.algorithms.experience import Batch
from mmrl.seeding import derive_seed, generator


@dataclass(frozen=True)
class Rethinking:
    """Some finished answers lose their end, get a trigger and are continued by the policy, within its length limit.

    The policy learns the whole of it, the trigger included, so that it comes to say it by itself.

    Attributes:
        share: of the samples that are tried.
        trigger: text put behind the first answer.
        keep: ``better`` keeps a continued answer only where it scores more than the first one, ``always`` each.
    """

    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    trigger: str = "\n\nWait, let me check this again."
    keep: Literal["better", "always"] = "better"

    verbs = frozenset({"given"})

    def __call__(self, context: Context, batch: Batch, step: int) -> Batch:
        """The batch with continued answers in place of first ones."""
        rollout, total = batch.rollout, batch.scores.total.cpu()
        truncated = rollout.samples.truncated
        whole = torch.ones(len(batch), dtype=torch.bool) if truncated is None else ~truncated.cpu()
        places = whole.nonzero().flatten()
        order = torch.randperm(len(places), generator=generator(context.seed, "rethink", step, distributed.rank()))
        rows = sorted(places[order[: round(self.share * len(batch))]].tolist())
        taken: list[int] = []
        if rows:
            prompts = [rollout.samples.prompts[row] for row in rows]
            numbers = numbers_of(slice(0, len(batch)), len(batch))
            seeds = [derive_seed(context.seed, "rethink", step, numbers[row]) for row in rows]
            answers = context.policy.completions(rollout[rows])
            with context.clock("rollout"):
                more = context.policy.given(prompts, context.policy.continued(prompts, answers, self.trigger, seeds))
            known = torch.ones(len(rows), dtype=torch.bool)
            continued = Batch(more, score(context, more, step, tally=False), known)
            new = continued.scores.total.cpu()
            better = torch.ones(len(rows), dtype=torch.bool) if self.keep == "always" else new > total[rows]
            taken = better.nonzero().flatten().tolist()
            batch = batch.with_rows([rows[k] for k in taken], continued.take(taken))
        context.tally.mean("rethinking/tried", torch.tensor(len(rows) / len(batch)))
        context.tally.mean("rethinking/kept", torch.tensor(len(taken) / len(batch)))
        return batch
