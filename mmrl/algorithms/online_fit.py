"""Fit what the policy sampled, more or less of it as it scored: the frame that regression methods share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import numbers_of, roll_out, row_chunks, score, split_groups
from mmrl.seeding import derive_seed
from mmrl.types import Prompt, Rollout, Rows


@dataclass(eq=False)
class Weighted(Rows):
    """Samples to learn from.

    Attributes:
        rollout: N samples.
        weight: float32 ``[N]`` on the CPU, what the algorithm made of their scores: a weight or an advantage. NaN for a
            sample that takes no part.
        number: of each sample in the batch of all processes; its noise is seeded by it.
    """

    rollout: Rollout
    weight: Tensor
    number: list[int]

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def group(self) -> Tensor:
        """Long ``[N]`` on the CPU."""
        return self.rollout.group.cpu()


@dataclass
class MicroBatch:
    """Some samples with a seed of noise for each.

    Attributes:
        divisor: of the sum of the samples' losses: samples of the update, those that take no part too, times draws.
        first: this is the first update since the samples were made.
    """

    rows: Weighted
    seeds: list[int]
    divisor: int
    first: bool


@dataclass
class OnlineFit(ABC):
    """Sample groups, give each sample a weight by its score, minimise the weighted ``fit``.

    Args:
        group_size: samples per prompt.
        noise_draws: noise and timestep draws per sample and update.
        epochs: passes over the samples of a rollout.
        minibatches: optimiser steps per pass; whole groups stay together.
    """

    group_size: Annotated[int, Field(ge=1)] = 8
    noise_draws: Annotated[int, Field(ge=1)] = 1
    epochs: Annotated[int, Field(ge=1)] = 1
    minibatches: Annotated[int, Field(ge=1)] = 1

    verbs: ClassVar[frozenset[str]] = frozenset({"rollout", "fit"})
    needs_reference: ClassVar[bool] = False
    needs_gradient_of_reward: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = True
    whole_groups: ClassVar[bool] = False
    """A micro-batch holds whole groups, at least one."""
    shared_noise: ClassVar[bool] = False
    """The members of a group see the same noise."""

    @property
    def fits_per_sample(self) -> float:
        """Times that a sample is fitted in a pass, on average."""
        return self.noise_draws

    @abstractmethod
    def weigh(self, scores: Tensor, group: Tensor) -> Tensor:
        """Weights ``[n]``, NaN for samples that take no part.

        Args:
            scores: ``[n]`` on the CPU; NaN where no reward applies.
            group: long ``[n]``, numbered from 0.
        """

    def sampling(self, context: Context, step: int) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy is the one that samples."""
        return contextlib.nullcontext()

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Weighted:
        with self.sampling(context, step):
            rollout = roll_out(context, prompts, self.group_size, step)
        scores = score(context, rollout, step).total.cpu()
        weight = self.weigh(scores, rollout.group.cpu())
        context.tally.mean("samples/fitted", (~weight.isnan()).float())
        return Weighted(rollout, weight, list(numbers_of(slice(0, len(rollout)), len(rollout))))

    def updates(self, context: Context, experience: Weighted, step: int) -> Iterator[Update]:
        parts = split_groups(experience.group, self.minibatches)
        for number in range(self.epochs * self.minibatches):
            part = experience[parts[number % self.minibatches]]
            rows = part[~part.weight.isnan()]
            divisor = int(distributed.total(len(part))) * self.noise_draws
            yield Update(int(distributed.total(len(rows))), self._micro_batches(context, rows, divisor, step, number))

    def _micro_batches(
        self, context: Context, experience: Weighted, divisor: int, step: int, number: int
    ) -> Iterator[MicroBatch]:
        for chunk in self._chunks(experience.group, context.micro_batch_size):
            rows = experience[chunk]
            names = [k // self.group_size if self.shared_noise else k for k in rows.number]
            for draw in range(self.noise_draws):
                seeds = [derive_seed(context.seed, "fit", step, number, draw, name) for name in names]
                yield MicroBatch(rows, seeds, divisor, number == 0)

    def _chunks(self, group: Tensor, size: int) -> list[slice]:
        if not self.whole_groups:
            return row_chunks(len(group), size)
        ends = group.unique_consecutive(return_counts=True)[1].cumsum(0).tolist()
        chunks, start = [], 0
        for end, following in zip(ends, [*ends[1:], float("inf")], strict=True):
            if following - start > size:
                chunks.append(slice(start, end))
                start = end
        return chunks

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        fit = context.policy.fit(micro_batch.rows.rollout, micro_batch.seeds)
        weight = micro_batch.rows.weight.to(fit)
        context.tally.mean("fit", fit)
        context.tally.mean("loss", weight * fit)
        return (weight * fit).sum() / micro_batch.divisor


def nan_where(condition: Tensor, values: Tensor) -> Tensor:
    """``values`` with NaN, "takes no part", where the condition holds."""
    return torch.where(condition, torch.nan, values)
