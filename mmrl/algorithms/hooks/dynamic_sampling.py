"""Dynamic sampling (DAPO, arXiv 2503.14476): groups that teach nothing are replaced by those of further prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import roll_out, score
from mmrl.algorithms.experience import Batch


@dataclass(frozen=True)
class DynamicSampling:
    """Roll out more prompts until every group's scores have a spread.

    The spread decides, not the mean, so it works for graded rewards as well. Each try rolls out as many prompts as are
    still missing. What further prompts a step takes depends on seed, step and try alone.

    Attributes:
        max_tries: further rollouts; groups without spread that are left then stay.
    """

    max_tries: Annotated[int, Field(ge=1)] = 3

    def __call__(self, context: Context, batch: Batch, step: int) -> Batch:
        """The batch with as many silent groups replaced as could be."""
        missing, tried, whole = batch.silent(), 0, len(batch.silent())
        used = {prompt.id for prompt in batch.rollout.samples.prompts}
        for attempt in range(1, self.max_tries + 1):
            if not missing:
                break
            prompts = context.prompts.extra(step, attempt, len(missing), used)
            used |= {prompt.id for prompt in prompts}
            tried += len(prompts)
            rollout = roll_out(context, prompts, batch.group_size, step, attempt)
            more = Batch(rollout, score(context, rollout, step, tally=False))
            good = sorted(set(range(more.groups)) - set(more.silent()))
            places = [row for number in missing[: len(good)] for row in batch.rows_of(number)]
            batch = batch.with_rows(places, more.take([row for number in good for row in more.rows_of(number)]))
            missing = missing[len(good) :]
        context.tally.mean("groups/extra", torch.tensor(float(tried)))
        context.tally.mean("groups/replaced", torch.tensor(float(whole - len(missing))))
        return batch
