"""Reward backprop: differentiate the reward through the sampler."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import numbers_of, row_chunks, tally_scores
from mmrl.errors import UserError
from mmrl.policy import ChainPolicy
from mmrl.scoring import Scores
from mmrl.seeding import derive_seed, generator
from mmrl.types import Chain, Prompt, Rollout, Samples, mean_square

Share = Annotated[float, Field(ge=0, le=1)]


@dataclass
class MicroBatch:
    """Prompts with the seed of each sample; ``samples_in_update`` divides the loss.

    Attributes:
        chain: the stretch of the sampler.
        source: what the chain starts from, where it does not start from noise.
        made: what came out, without gradient; set by the loss.
    """

    prompts: list[Prompt]
    seeds: list[int]
    samples_in_update: int
    step: int
    chain: Chain
    source: Samples | Rollout | None = None
    made: Rollout | None = None


class RewardBackprop:
    """The loss is minus the reward, the gradient flows through a stretch of the deterministic sampler.

    Which stretch makes the difference between the published methods; the names of the registry set it:

    * DRaFT and DRaFT-K (arXiv 2309.17400): from noise to the end, with gradient in the last K steps. DRaFT-LV also
      noises what came out to the level of the last step, ``renoise`` times, and takes that step again.
    * AlignProp (2310.03739): K is drawn anew at every training step.
    * ReFL (2304.05977): one step with gradient at a random late place, whose estimate of the clean output is scored.
    * ControlNet++ (2404.07987): the row's target, noised a little, is cleaned in one step; InstructVideo (2312.12490)
      runs the sampler from there to its end.

    Args:
        group_size: samples per prompt.
        grad_steps: K; ``all``, or ``random`` for a uniform draw from 1 to all.
        begin: where the chain starts from the row's noised target, as shares of the sampler's steps between which a
            place is drawn at every training step; not given, it starts from noise.
        stop: shares between which a place is drawn (the upper one included) to jump from to the estimate of the clean
            output; not given, the sampler runs to its end. At least one step is taken.
        renoise: DRaFT-LV's further gradients of the last step; the published number is 2. The loss is their mean.
        hinge: a sample's loss is ``max(0, hinge - reward)``; ReFL's is 2.
        uncertainty: Ctrl-U (2410.11236): with U this number times the distance of a sample's reward to the mean reward
            of the others of its group, the loss is ``exp(-U) loss + U``. Its loss is meant to be positive: use a hinge.
        fit_coef: weight of the error of ``fit`` on the rows' targets: ReFL's and ControlNet++'s pre-training loss.
        distance_coef: weight of the mean squared distance to the base model's predictions on what was sampled, noised
            again.
    """

    needs_gradient_of_reward = True
    needs_rewards = True

    def __init__(
        self,
        group_size: Annotated[int, Field(ge=1)] = 1,
        grad_steps: Annotated[int, Field(ge=1)] | Literal["all", "random"] = 1,
        begin: tuple[Share, Share] | None = None,
        stop: tuple[Share, Share] | None = None,
        renoise: Annotated[int, Field(ge=0)] = 0,
        hinge: float | None = None,
        uncertainty: Annotated[float, Field(gt=0)] | None = None,
        fit_coef: Annotated[float, Field(ge=0)] = 0.0,
        distance_coef: Annotated[float, Field(ge=0)] = 0.0,
    ):
        for name, value in (("begin", begin), ("stop", stop)):
            if value is not None and value[0] > value[1]:
                raise UserError(f"algorithm.{name} is {list(value)}, but the first number must be the smaller")
        if renoise and (begin is not None or stop is not None or grad_steps != 1):
            raise UserError("algorithm.renoise repeats the sampler's last step: leave begin, stop and grad_steps out")
        if uncertainty is not None and group_size < 2:
            raise UserError("algorithm.uncertainty compares the samples of a group: set group_size to 2 or more")
        self.group_size = group_size
        self.grad_steps = grad_steps
        self.begin, self.stop, self.renoise = begin, stop, renoise
        self.hinge, self.uncertainty = hinge, uncertainty
        self.fit_coef, self.distance_coef = fit_coef, distance_coef
        self.needs_reference = distance_coef > 0
        self.verbs = frozenset({"chain"} | ({"fit"} if fit_coef else set()) | ({"denoise"} if distance_coef else set()))

    def network_calls(self, num_steps: int) -> tuple[int, int]:
        """At most so many calls per sample, and so many of them with gradient, with a sampler of ``num_steps``."""
        first = 0 if self.begin is None else min(math.ceil(self.begin[0] * num_steps), num_steps - 1)
        last = num_steps if self.stop is None else max(math.ceil(self.stop[1] * num_steps), first + 1)
        taken = last - first
        grad = taken if self.grad_steps in ("all", "random") else min(self.grad_steps, taken)
        return taken + self.renoise, grad + self.renoise

    def chain(self, num_steps: int, seed: int, step: int) -> Chain:
        """The stretch that training step ``step`` differentiates through; a function of its arguments alone."""
        draw = generator(seed, "chain", step)
        begin, end = 0, num_steps
        if self.begin is not None:
            begin = _draw(math.ceil(self.begin[0] * num_steps), math.ceil(self.begin[1] * num_steps), draw)
            begin = min(begin, num_steps - 1)
        if self.stop is not None:
            end = _draw(math.floor(self.stop[0] * num_steps) + 1, math.ceil(self.stop[1] * num_steps), draw)
            end = min(max(end, begin + 1), num_steps)
        grad_steps = end - begin
        if self.grad_steps == "random":
            grad_steps = _draw(1, grad_steps, draw)
        elif self.grad_steps != "all":
            grad_steps = min(self.grad_steps, grad_steps)
        return Chain(begin, end, grad_steps, jump=self.stop is not None)

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raise ``UserError``, which names the row, where a target is needed and is not there or no file."""
        if self.begin is None and not self.fit_coef:
            return
        for prompt in prompts:
            if prompt.target is None or (isinstance(prompt.target, str) and not Path(prompt.target).is_file()):
                raise UserError(
                    f"row '{prompt.id}': target is {prompt.target!r}, but the algorithm starts from a picture or clip: "
                    "name a file beside the rows"
                )

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
        return [prompt for prompt in prompts for _ in range(self.group_size)]

    def updates(self, context: Context, experience: list[Prompt], step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        yield Update(size, self._micro_batches(context, experience, size, step))

    def _micro_batches(self, context: Context, prompts: list[Prompt], size: int, step: int) -> Iterator[MicroBatch]:
        policy: ChainPolicy = context.policy
        chain = self.chain(policy.num_steps, context.seed, step)
        # An uncertainty is that of a whole group.
        groups = self.group_size if self.uncertainty is not None else 1
        for rows in row_chunks(len(prompts), max(groups, context.micro_batch_size // groups * groups)):
            part = prompts[rows]
            seeds = [derive_seed(context.seed, "generate", step, row) for row in numbers_of(rows, len(prompts))]
            first = MicroBatch(part, seeds, size, step, chain, Samples(part) if self.begin is not None else None)
            yield first
            last = Chain(policy.num_steps - 1, policy.num_steps, 1)
            for draw in range(self.renoise):
                again = [derive_seed(seed, "renoise", draw) for seed in seeds]
                yield MicroBatch(part, again, size, step, last, first.made)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        policy: ChainPolicy = context.policy
        with context.clock("rollout"):
            made = policy.chain(micro_batch.prompts, micro_batch.seeds, micro_batch.chain, micro_batch.source)
        micro_batch.made = made.detached()
        with context.clock("reward"):
            scores = context.scorer(made.samples, step=micro_batch.step, grad=True)
        tally_scores(context.tally, scores)
        per_sample = self._per_sample(scores)
        context.tally.mean("loss", per_sample)
        if self.fit_coef:
            fit = policy.fit(Samples(micro_batch.prompts), micro_batch.seeds)
            context.tally.mean("fit", fit)
            per_sample = per_sample + self.fit_coef * fit
        if self.distance_coef:
            distance = self._distance(context, micro_batch)
            context.tally.mean("distance", distance)
            per_sample = per_sample + self.distance_coef * distance
        return per_sample.sum() / (micro_batch.samples_in_update * (1 + self.renoise))

    def _per_sample(self, scores: Scores) -> Tensor:
        """``[N]``; a sample to which no reward applies has a NaN total, and no loss and no gradient."""
        applies = ~scores.total.isnan()
        total = torch.where(applies, scores.total, 0.0)
        loss = -total if self.hinge is None else (self.hinge - total).relu()
        if self.uncertainty is not None:
            group = total.view(-1, self.group_size)
            others = (group.sum(1, keepdim=True) - group) / (self.group_size - 1)
            unsure = self.uncertainty * (group - others).abs().flatten()
            loss = (-unsure).exp() * loss + unsure
        return torch.where(applies, loss, 0.0)

    def _distance(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        """``[N]``: how far the policy's predictions on its own noised samples are from the base model's."""
        policy = context.policy
        now = policy.denoise(micro_batch.made, micro_batch.seeds)
        with torch.no_grad(), policy.reference():
            base = policy.denoise(micro_batch.made, micro_batch.seeds, at=now)
        return now.mean(mean_square(now.prediction - base.prediction))


def _draw(low: int, high: int, draw: torch.Generator) -> int:
    """A whole number from ``low`` to ``high``, both included."""
    return int(torch.randint(low, max(high, low) + 1, (1,), generator=draw))
