"""KTO: outputs that are good or bad each by itself, without pairs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.advantages import group_sums
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import numbers_of, roll_out, row_chunks, score
from mmrl.algorithms.pairs import answer_of, given_outputs
from mmrl.errors import UserError
from mmrl.pair_losses import kto_loss
from mmrl.policy import Policy
from mmrl.seeding import derive_seed
from mmrl.types import Prompt, Rollout, Rows, Samples


@dataclass(eq=False)
class Labelled(Rows):
    """Outputs with their labels.

    Attributes:
        output: N of them.
        desirable: bool ``[N]`` on the CPU.
        names: numbers that no other row of the batch of all processes has; noise is seeded by them.
    """

    output: Rollout | Samples
    desirable: Tensor
    names: list[int]

    def __len__(self) -> int:
        return len(self.names)


@dataclass
class MicroBatch:
    """Some rows; ``kl`` is the update's, ``rows_in_update`` divides the loss."""

    rows: Labelled
    seeds: list[int]
    kl: Tensor
    rows_in_update: int


class UnpairedPreference:
    """KTO (arXiv 2402.01306): raise what is desirable above a reference point, lower what is not below it.

    With r the log-ratio of policy and reference, the loss is ``1 - sigmoid(beta (r - KL))`` for desirable outputs and
    ``1 - sigmoid(beta (KL - r))`` for others. KL is the mean of r over mismatched pairs (each prompt with the output of
    another one) of the whole update in all processes, or 0 if that is negative, without gradient. For denoisers r is
    the reference's denoising error less the policy's.

    Args:
        source: ``offline`` takes the columns ``completion`` and ``label`` (true for desirable) of the data; ``online``
            rolls out groups.
        group_size: samples per prompt, online.
        threshold: online, the score above which an output is desirable; not given, the mean of its group, and an output
            that scores just that takes no part.
        beta: when not given 0.1 for tokens and 100 for denoisers.
        desirable_weight, undesirable_weight: of the two kinds of rows.
        noise_draws: noise and timestep draws per row; each is a term of its own.
        refresh_reference: every so many steps the reference becomes the current policy; never when not given.
        epochs: passes over the rows of a rollout.
    """

    needs_gradient_of_reward = False
    needs_reference = True

    def __init__(
        self,
        source: Literal["online", "offline"] = "offline",
        group_size: Annotated[int, Field(ge=2)] = 8,
        threshold: float | None = None,
        beta: Annotated[float, Field(gt=0)] | None = None,
        desirable_weight: Annotated[float, Field(gt=0)] = 1.0,
        undesirable_weight: Annotated[float, Field(gt=0)] = 1.0,
        noise_draws: Annotated[int, Field(ge=1)] = 1,
        refresh_reference: Annotated[int, Field(ge=1)] | None = None,
        epochs: Annotated[int, Field(ge=1)] = 1,
    ):
        self.online = source == "online"
        self.group_size = group_size if self.online else 1
        self.threshold = threshold
        self.beta = beta
        self.weights = desirable_weight, undesirable_weight
        self.noise_draws = noise_draws
        self.refresh_reference = refresh_reference
        self.epochs = epochs
        self.verbs = frozenset({"rollout", "fit"} if self.online else {"fit"})
        self.needs_rewards = self.online

    def defaults_for(self, verbs: frozenset[str]) -> dict[str, Any]:
        """What options that are not given stand for, with a policy that offers ``verbs``."""
        return {"beta": 100.0 if "means" in verbs else 0.1}

    def check_prompts(self, prompts: Iterable[Prompt]) -> None:
        """Raise ``UserError``, which names the row, for one without output or label."""
        if not self.online:
            for prompt in prompts:
                answer_of(prompt, "completion")
                _label(prompt)

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Labelled:
        if len({prompt.id for prompt in prompts}) < 2:
            raise UserError("algorithm kto compares with outputs of other prompts: set data.batch_size to 2 or more")
        if self.refresh_reference and step > 0 and step % self.refresh_reference == 0:
            context.policy.parameters.take_snapshot("reference")
        if not self.online:
            output = given_outputs(context.policy, prompts, [answer_of(prompt, "completion") for prompt in prompts])
            names = list(numbers_of(slice(0, len(prompts)), len(prompts)))
            return Labelled(output, torch.tensor([_label(prompt) for prompt in prompts]), names)
        rollout = roll_out(context, prompts, self.group_size, step)
        scores = score(context, rollout, step).total.cpu()
        scored, group = ~scores.isnan(), rollout.group.cpu()
        if self.threshold is None:
            border = group_sums(scores.nan_to_num(), group) / group_sums(scored.float(), group)
            scored &= scores != border
        else:
            border = self.threshold
        rows = scored.nonzero().flatten()
        names = (rows + distributed.rank() * len(rollout)).tolist()
        return Labelled(rollout[rows], (scores > border)[rows], names)

    def updates(self, context: Context, experience: Labelled, step: int) -> Iterator[Update]:
        size = int(distributed.total(len(experience)))
        for epoch in range(self.epochs):
            yield Update(size, self._micro_batches(context, experience, size, step, epoch))

    def _micro_batches(
        self, context: Context, rows: Labelled, size: int, step: int, epoch: int
    ) -> Iterator[MicroBatch]:
        def seeds(names: list[int], draw: int) -> list[int]:
            return [derive_seed(context.seed, "fit", step, epoch, draw, name) for name in names]

        kl = self._kl(context, rows, seeds(rows.names, 0))
        context.tally.mean("kl", kl)
        for chunk in row_chunks(len(rows), context.micro_batch_size):
            for draw in range(self.noise_draws):
                yield MicroBatch(rows[chunk], seeds(rows.names[chunk], draw), kl, size)

    @torch.no_grad()
    def _kl(self, context: Context, rows: Labelled, seeds: list[int]) -> Tensor:
        """Mean log-ratio of mismatched pairs in all processes, at least 0."""
        total, policy = 0.0, context.policy
        other = mismatched(policy, rows.output) if len(rows) else rows.output
        for chunk in row_chunks(len(rows), context.micro_batch_size):
            total += _ratio(policy, other[chunk], seeds[chunk])[0].sum().item()
        return torch.tensor(max(distributed.total(total) / distributed.total(len(rows)), 0.0))

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        policy, rows = context.policy, micro_batch.rows
        ratio, fit = _ratio(policy, rows.output, micro_batch.seeds)
        desirable = rows.desirable.to(ratio.device)
        beta = self.beta or self.defaults_for(policy.verbs)["beta"]
        per_row = kto_loss(ratio, desirable, micro_batch.kl.to(ratio), beta, *self.weights)
        context.tally.mean("loss", per_row)
        context.tally.mean("ratio/desirable", beta * ratio, desirable)
        context.tally.mean("ratio/undesirable", beta * ratio, ~desirable)
        context.tally.mean("fit/desirable", fit, desirable)
        return per_row.sum() / (micro_batch.rows_in_update * self.noise_draws)


def _ratio(policy: Policy, output: Rollout | Samples, seeds: list[int]) -> tuple[Tensor, Tensor]:
    """``log pi - log pi_ref`` and ``fit``, ``[N]`` each."""
    fit = policy.fit(output, seeds)
    with torch.no_grad(), policy.reference():
        reference = policy.fit(output, seeds)
    return reference - fit, fit


def mismatched(policy: Policy, output: Rollout | Samples) -> Rollout | Samples:
    """Each prompt with the output of the next other prompt."""
    samples = output.samples if isinstance(output, Rollout) else output
    prompts, count = samples.prompts, len(samples)
    following = []
    for row, prompt in enumerate(prompts):
        others = ((row + shift) % count for shift in range(1, count))
        following.append(next((k for k in others if prompts[k].id != prompt.id), row))
    if "given" in policy.verbs:
        said = policy.completions(output)
        return policy.given(prompts, [said[k] for k in following], score=False)
    if isinstance(output, Rollout):
        turned = output[following]
        return replace(turned, samples=replace(turned.samples, prompts=prompts))
    return Samples([replace(prompt, target=prompts[k].target) for prompt, k in zip(prompts, following, strict=True)])


def _label(prompt: Prompt) -> bool:
    value = prompt.metadata.get("label")
    if not isinstance(value, bool):
        raise UserError(f"row '{prompt.id}': column 'label' is {value!r}, but should be true or false")
    return value
