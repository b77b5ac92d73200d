"""On-policy distillation: a teacher corrects what the student itself samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed, losses
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import numbers_of, roll_out, row_chunks
from mmrl.components import build_policy, pipeline_component
from mmrl.errors import UserError
from mmrl.policy import Policy
from mmrl.seeding import derive_seed
from mmrl.types import Decisions, Prompt, Rollout, mean_square


@dataclass
class MicroBatch:
    """Some rows, the decisions of them that are at hand, and a seed of noise for each row."""

    rollout: Rollout
    columns: list[int]
    seeds: list[int]
    divisor: float


@dataclass
class Distillation:
    """The KL from student to teacher at each decision that the student took (arXiv 2306.13649, sampled tokens).

    Gaussian decisions have it in closed form. For tokens it is estimated from the token that was sampled, with the
    gradient of the KL of that token's distribution; what a token does to later ones is left out.

    Args:
        teacher: a pipeline section: its ``type``, ``model`` and options. It must be of the student's type and, for
            tokens, of its vocabulary. ``steering`` is the policy itself as ``pipeline.steering`` steers it: it learns
            to go by itself where rewards bent its steps to (Euphonium's distillation, arXiv 2602.04928).
        group_size: samples per prompt.
    """

    teacher: dict[str, Any] | Literal["steering"]
    group_size: Annotated[int, Field(ge=1)] = 1

    verbs: ClassVar[frozenset[str]] = frozenset({"rollout", "decisions"})
    needs_reference: ClassVar[bool] = False
    needs_gradient_of_reward: ClassVar[bool] = False
    needs_rewards: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.teacher == "steering":
            self.verbs = self.verbs | {"means", "steered"}
            return
        where = "algorithm.teacher"
        self._component = pipeline_component(self.teacher, where=where, path=where, folders=())
        self._policy: Policy | None = None

    def teacher_of(self, student: Policy) -> Policy:
        """The teacher, loaded when it is first needed."""
        if self._policy is None:
            if self._component.target is not type(student):
                raise UserError(
                    f"algorithm.teacher.type '{self._component.type}' is not that of the policy it should teach"
                )
            with torch.random.fork_rng(devices=[]):
                self._policy = build_policy(self._component).to(next(iter(student.parameters)).device)
        return self._policy

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Rollout:
        context.policy.keep_mean = self.teacher == "steering"
        return roll_out(context, prompts, self.group_size, step)

    def updates(self, context: Context, experience: Rollout, step: int) -> Iterator[Update]:
        yield Update(int(distributed.total(len(experience))), self._micro_batches(context, experience, step))

    def _micro_batches(self, context: Context, rollout: Rollout, step: int) -> Iterator[MicroBatch]:
        divisor = max(distributed.total(rollout.mask.sum().item()), 1.0)
        for rows in row_chunks(len(rollout), context.micro_batch_size):
            part = rollout[rows]
            for columns in context.policy.decision_chunks(part):
                yield MicroBatch(part, columns, [], divisor)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        rollout, columns = micro_batch.rollout, micro_batch.columns
        mask = rollout.mask[:, columns]
        now = context.policy.decisions(rollout, columns)
        if self.teacher == "steering":
            wanted = Decisions(rollout.logp[:, columns], mean=rollout.aim[:, columns].to(now.logp.device))
        else:
            with torch.no_grad():
                wanted = self.teacher_of(context.policy).decisions(rollout, columns)
        if now.mean is not None:
            kl = losses.gaussian_kl(now.mean, wanted.mean, now.std)
        else:
            kl = losses.sampled_kl(now.logp, wanted.logp, "k1", "k2")
        kl = torch.where(mask.to(kl.device), kl, 0.0)
        context.tally.mean("kl", kl, mask.float())
        return kl.sum() / micro_batch.divisor


@dataclass
class PredictionDistillation(Distillation):
    """The mean squared difference of predictions on the student's own outputs, noised again.

    Args:
        noise_draws: noise and timestep draws per sample.
    """

    noise_draws: Annotated[int, Field(ge=1)] = 1

    verbs: ClassVar[frozenset[str]] = frozenset({"rollout", "denoise"})

    def __post_init__(self) -> None:
        if self.teacher == "steering":
            raise UserError("algorithm.teacher 'steering' bends steps, not predictions on noised outputs: use distill")
        super().__post_init__()

    def _micro_batches(self, context: Context, rollout: Rollout, step: int) -> Iterator[MicroBatch]:
        divisor = distributed.total(len(rollout)) * self.noise_draws
        for rows in row_chunks(len(rollout), context.micro_batch_size):
            for draw in range(self.noise_draws):
                seeds = [derive_seed(context.seed, "fit", step, draw, row) for row in numbers_of(rows, len(rollout))]
                yield MicroBatch(rollout[rows], [], seeds, divisor)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        rollout, seeds = micro_batch.rollout, micro_batch.seeds
        now = context.policy.denoise(rollout, seeds)
        with torch.no_grad():
            wanted = self.teacher_of(context.policy).denoise(rollout, seeds, at=now).prediction
        distance = now.mean(mean_square(now.prediction - wanted))
        context.tally.mean("loss", distance)
        return distance.sum() / micro_batch.divisor
