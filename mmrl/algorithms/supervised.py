"""Supervised fine-tuning: explain given targets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import numbers_of, row_chunks
from mmrl.seeding import derive_seed
from mmrl.types import Prompt, Samples


@dataclass
class MicroBatch:
    """Prompts with targets and the noise seed of each; ``rows_in_update`` divides the loss."""

    prompts: list[Prompt]
    seeds: list[int]
    rows_in_update: int


class Supervised:
    """Minimise ``fit`` of each prompt's ``target``: token NLL, denoising error or action likelihood.

    Args:
        noise_draws: noise and timestep draws per row and step.
    """

    verbs = frozenset({"fit"})
    needs_reference = False
    needs_gradient_of_reward = False
    needs_rewards = False
    group_size = 1

    def __init__(self, noise_draws: Annotated[int, Field(ge=1)] = 1):
        self.noise_draws = noise_draws

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
        return list(prompts)

    def updates(self, context: Context, experience: list[Prompt], step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        yield Update(size, self._micro_batches(context, experience, size, step))

    def _micro_batches(self, context: Context, prompts: list[Prompt], size: int, step: int) -> Iterator[MicroBatch]:
        order, numbers = self._order(context, prompts), numbers_of(slice(0, len(prompts)), len(prompts))
        for chunk in row_chunks(len(prompts), context.micro_batch_size):
            rows = order[chunk]
            for draw in range(self.noise_draws):
                seeds = [derive_seed(context.seed, "fit", step, draw, numbers[row]) for row in rows]
                yield MicroBatch([prompts[row] for row in rows], seeds, size)

    def _order(self, context: Context, prompts: Sequence[Prompt]) -> list[int]:
        """Rows of like length together, where the policy knows lengths, so that little is padded."""
        length = getattr(context.policy, "fit_length", None)
        rows = list(range(len(prompts)))
        return rows if length is None else sorted(rows, key=lambda row: length(prompts[row]))

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        fit = context.policy.fit(Samples(prompts=micro_batch.prompts), micro_batch.seeds)
        context.tally.mean("loss", fit)
        return fit.sum() / (micro_batch.rows_in_update * self.noise_draws)
