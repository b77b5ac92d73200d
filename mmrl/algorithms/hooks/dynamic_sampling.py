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
        silent = batch.silent()
        used = {prompt.id for prompt in batch.rollout.samples.prompts}
        found: dict[int, Batch] = {}
        tried = 0
        for attempt in range(1, self.max_tries + 1):
            missing = [number for number in silent if number not in found]
            if not missing:
                break
            prompts = context.prompts.extra(step, attempt, len(missing), used)
            used |= {prompt.id for prompt in prompts}
            tried += len(prompts)
            rollout = roll_out(context, prompts, batch.group_size, step, attempt)
            more = Batch(rollout, score(context, rollout, step, tally=False))
            dull = more.silent()
            good = [number for number in range(more.groups) if number not in dull]
            found |= {place: more.group(number) for place, number in zip(missing, good, strict=False)}
        context.tally.mean("groups/extra", torch.tensor(float(tried)))
        context.tally.mean("groups/replaced", torch.tensor(float(len(found))))
        return batch.replaced(found)
