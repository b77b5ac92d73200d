"""Reward backprop: differentiate the reward through the sampler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import numbers_of, row_chunks, tally_scores
from mmrl.seeding import derive_seed
from mmrl.types import Prompt


@dataclass
class MicroBatch:
    """Prompts with the seed of each sample; ``samples_in_update`` divides the loss."""

    prompts: list[Prompt]
    seeds: list[int]
    samples_in_update: int
    step: int


class RewardBackprop:
    """DRaFT-K (arXiv 2309.17400): the loss is minus the reward, the gradient flows through the last K steps.

    Args:
        group_size: samples per prompt.
        grad_steps: K; with K equal to the number of steps it is full DRaFT.
    """

    verbs = frozenset({"generate"})
    needs_reference = False
    needs_gradient_of_reward = True
    needs_rewards = True

    def __init__(
        self,
        group_size: Annotated[int, Field(ge=1)] = 1,
        grad_steps: Annotated[int, Field(ge=1)] = 1,
    ):
        self.group_size = group_size
        self.grad_steps = grad_steps

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
        return [prompt for prompt in prompts for _ in range(self.group_size)]

    def updates(self, context: Context, experience: list[Prompt], step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        yield Update(size, self._micro_batches(context, experience, size, step))

    def _micro_batches(self, context: Context, prompts: list[Prompt], size: int, step: int) -> Iterator[MicroBatch]:
        for rows in row_chunks(len(prompts), context.micro_batch_size):
            seeds = [derive_seed(context.seed, "generate", step, row) for row in numbers_of(rows, len(prompts))]
            yield MicroBatch(prompts[rows], seeds, size, step)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        with context.clock("rollout"):
            samples = context.policy.generate(micro_batch.prompts, micro_batch.seeds, grad_steps=self.grad_steps)
        with context.clock("reward"):
            scores = context.scorer(samples, step=micro_batch.step, grad=True)
        tally_scores(context.tally, scores)
        # A sample to which no reward applies has a NaN total and no gradient.
        total = scores.total[~scores.total.isnan()].sum()
        context.tally.mean("loss", -scores.total.nan_to_num(0.0))
        return -total / micro_batch.samples_in_update
