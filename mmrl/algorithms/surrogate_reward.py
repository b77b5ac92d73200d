"""TDM-R1: few-step samplers learn from any reward through a surrogate of it that has a gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import numbers_of, row_chunks, score
from mmrl.algorithms.companion import Companion
from mmrl.algorithms.forward_process import GroupPreference, again
from mmrl.algorithms.online_fit import Weighted
from mmrl.forward_losses import distribution_matching_loss
from mmrl.policy import ChainPolicy
from mmrl.seeding import derive_seed, generator
from mmrl.tally import Tally
from mmrl.types import Chain, Prompt, mean_square


@dataclass
class MicroBatch:
    """Some rows, the seeds of their paths and of the noise that is added again, and the step of the sampler at hand."""

    rows: Weighted
    starts: list[int]
    seeds: list[int]
    place: int
    divisor: int


@dataclass
class SurrogateReward:
    """TDM-R1 (arXiv 2603.07700): a few-step sampler climbs a learned reward of its own intermediate estimates.

    The sampler is deterministic, so what its path ends with is the reward of every state on it. Each training step
    takes one place on the paths of all groups and does three things there, all on what the sampler's step at that place
    expects the clean output to be, noised again (``x_t``):

    1. The surrogate ``log p_s(x_t) - log p_ref(x_t)`` learns the order of each group: ``p_s`` is a copy of the model
       that is trained by DGPO's group preference (:class:`mmrl.algorithms.forward_process.GroupPreference`).
    2. The tracker, another copy, is fitted to what the sampler makes now, so that its score is that of ``p_theta``.
    3. The sampler's weights get the gradient of ``reward_coef * surrogate - kl_coef * KL(p_theta | p_ref)`` through one
       of its steps. Scores are differences of predictions, so neither copy is differentiated and no denoising error is
       minimised by the sampler itself, which would blur what few steps make.

    Where this differs from the paper: copies and reference are of the policy as the stage began and not of the
    many-step model that a few-step one was distilled from; ``x_t`` is the noised estimate of the clean output and not
    the noised state of the path; the surrogate's log-ratio is estimated by denoising errors and not by KLs.

    Args:
        group_size: samples per prompt.
        beta: of the surrogate's preference.
        surrogate_lr, tracker_lr: of their Adam; the trainer's is the sampler's. A tracker slower than the sampler lets
            the KL swing.
        reward_coef: weight of the surrogate. With 1, and a ``kl_coef`` of 1, the sampler goes where ``p_s`` is.
        kl_coef: weight of the KL to the reference; 0 trains no tracker.
    """

    group_size: Annotated[int, Field(ge=2)] = 8
    beta: Annotated[float, Field(gt=0)] = 10.0
    surrogate_lr: Annotated[float, Field(gt=0)] = 1e-4
    tracker_lr: Annotated[float, Field(gt=0)] = 1e-4
    reward_coef: Annotated[float, Field(gt=0)] = 1.0
    kl_coef: Annotated[float, Field(ge=0)] = 1.0

    verbs: ClassVar[frozenset[str]] = frozenset({"chain", "denoise"})
    needs_reference: ClassVar[bool] = True
    needs_gradient_of_reward: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.surrogate = Companion("surrogate", self.surrogate_lr)
        self.tracker = Companion("tracker", self.tracker_lr)
        self.preference = GroupPreference(group_size=self.group_size, beta=self.beta)

    def network_calls(self, num_steps: int) -> tuple[int, int]:
        """At most so many calls per sample, and so many of them with gradient, with a sampler of ``num_steps``."""
        predictions = 2 + 2 + (2 if self.kl_coef else 0)
        return 3 * num_steps - 1 + predictions, 2 + (1 if self.kl_coef else 0)

    def place(self, num_steps: int, seed: int, step: int) -> int:
        """The sampler's step that training step ``step`` is about; a function of its arguments alone."""
        return int(torch.randint(num_steps, (1,), generator=generator(seed, "place", step)))

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Weighted:
        policy: ChainPolicy = context.policy
        for companion in self._companions:
            companion.start(policy.parameters)
        prompts = [prompt for prompt in prompts for _ in range(self.group_size)]
        number = list(numbers_of(slice(0, len(prompts)), len(prompts)))
        starts, last = self._starts(context, number, step), policy.num_steps - 1
        place = self.place(policy.num_steps, context.seed, step)
        with context.clock("rollout"):
            made = policy.chain(prompts, starts, Chain(0, policy.num_steps, 0))
        made.group = made.samples.group = torch.arange(len(prompts)) // self.group_size
        weight = self.preference.weigh(score(context, made, step).total.cpu(), made.group)
        if place < last:
            with context.clock("rollout"):
                made = replace(policy.chain(prompts, starts, self._stretch(place, 0)), group=made.group)
        rows = Weighted(made, weight, number)[~weight.isnan()]
        with context.clock("update"):
            self._teach(context, rows, step)
        return rows

    @property
    def _companions(self) -> list[Companion]:
        return [self.surrogate, self.tracker] if self.kl_coef else [self.surrogate]

    def _starts(self, context: Context, number: Sequence[int], step: int) -> list[int]:
        return [derive_seed(context.seed, "generate", step, row) for row in number]

    def _stretch(self, place: int, grad_steps: int) -> Chain:
        """From noise to the estimate of the clean output by the step at ``place``."""
        return Chain(0, place + 1, grad_steps, jump=True, decode=False)

    def _teach(self, context: Context, rows: Weighted, step: int) -> None:
        """One optimiser step of the surrogate and one of the tracker."""
        policy, quiet = context.policy, replace(context, tally=Tally())
        if not distributed.total(len(rows)):
            return
        with self.surrogate.training(policy.parameters, step):
            for update in self.preference.updates(quiet, rows, step):
                for micro_batch in update.micro_batches:
                    self.preference.loss(quiet, micro_batch).backward()
        if not self.kl_coef:
            return
        divisor = distributed.total(len(rows))
        with self.tracker.training(policy.parameters, step):
            for chunk in row_chunks(len(rows), context.micro_batch_size):
                seeds = [derive_seed(context.seed, "track", step, row) for row in rows.number[chunk]]
                fit = policy.fit(rows.rollout[chunk], seeds)
                context.tally.mean("tracker/fit", fit)
                (fit.sum() / divisor).backward()

    def updates(self, context: Context, experience: Weighted, step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        yield Update(size, self._micro_batches(context, experience, size, step))

    def _micro_batches(self, context: Context, experience: Weighted, size: int, step: int) -> Iterator[MicroBatch]:
        place = self.place(context.policy.num_steps, context.seed, step)
        for chunk in row_chunks(len(experience), context.micro_batch_size):
            rows = experience[chunk]
            seeds = [derive_seed(context.seed, "climb", step, row) for row in rows.number]
            yield MicroBatch(rows, self._starts(context, rows.number, step), seeds, place, size)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        policy, rows, seeds = context.policy, micro_batch.rows, micro_batch.seeds
        prompts = rows.rollout.samples.prompts
        with context.clock("rollout"):
            made = policy.chain(prompts, micro_batch.starts, self._stretch(micro_batch.place, 1))
        at = policy.noised(made, seeds)
        base = again(context, rows, seeds, at)
        better = again(context, rows, seeds, at, self.surrogate.name)
        direction = self.reward_coef * (better - base)
        if self.kl_coef:
            direction = direction - self.kl_coef * (again(context, rows, seeds, at, self.tracker.name) - base)
        found = at.mean((mean_square(base - at.target) - mean_square(better - at.target)).detach())
        # Positive where the surrogate has the order of its groups right.
        context.tally.mean("surrogate/agreement", rows.weight.to(found) * found)
        per_sample = at.mean(distribution_matching_loss(at, direction, base))
        return per_sample.sum() / micro_batch.divisor
