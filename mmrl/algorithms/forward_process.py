"""Methods on the forward process: noise what was sampled again, and move predictions by reward.

Only the clean output is needed, so any sampler will do and no log-probs are kept.
"""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from mmrl import forward_losses, losses
from mmrl.advantages import AdvantageMethod
from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import sample_advantages
from mmrl.algorithms.online_fit import MicroBatch, OnlineFit, Weighted, nan_where
from mmrl.forward_losses import Weighting
from mmrl.policy import Parameters
from mmrl.types import Denoising, Prompt, mean_square

OLD = "old"
SAMPLER = "sampler"
SLOW = "slow"


@dataclass(frozen=True)
class Lag:
    """How a copy of the policy follows it: once a step ``copy <- d copy + (1 - d) policy``.

    At training step n, ``d = min(start + rate max(0, n - flat), cap)``; where d is 0 the copy is the policy.
    """

    start: Annotated[float, Field(ge=0, lt=1)] = 0.0
    flat: Annotated[int, Field(ge=0)] = 0
    rate: Annotated[float, Field(ge=0)] = 0.0
    cap: Annotated[float, Field(ge=0, lt=1)] = 0.999

    @property
    def none(self) -> bool:
        """Whether the copy is the policy at every step."""
        return self.start == 0 and self.rate == 0

    def decay(self, step: int) -> float:
        """d at a step."""
        return min(self.start + self.rate * max(0, step - self.flat), self.cap)

    def follow(self, parameters: Parameters, name: str, step: int) -> bool:
        """Move the copy ``name``; whether it now equals the policy."""
        decay = self.decay(step)
        if decay == 0 or name not in parameters.snapshots:
            parameters.take_snapshot(name)
            return True
        parameters.update_average(name, decay)
        return False


@dataclass
class ForwardProcess(OnlineFit):
    """What these methods share: advantages, the old policy, and a KL to the reference.

    The old policy is a copy that lags behind; while it equals the current one its prediction is the current one without
    gradient, and costs nothing.

    Args:
        advantage: see :func:`mmrl.advantages.group_advantages`.
        advantage_clip: bound on advantages.
        old: how the old policy follows.
        kl_coef: weight of the mean squared difference of predictions from the reference's.
    """

    advantage: AdvantageMethod = "batch"
    advantage_clip: Annotated[float, Field(gt=0)] = 5.0
    old: Lag = Lag()
    kl_coef: Annotated[float, Field(ge=0)] = 0.0

    verbs: ClassVar[frozenset[str]] = frozenset({"rollout", "denoise"})
    compares_with_old: ClassVar[bool] = True
    """The loss looks at predictions of the old policy."""

    def __post_init__(self) -> None:
        self.needs_reference = self.kl_coef > 0
        self._old_is_current = True

    @property
    def keeps_old(self) -> bool:
        """Whether the old policy is ever another than the current one, so that a copy is needed."""
        return not self.old.none or (self.compares_with_old and self.epochs * self.minibatches > 1)

    @abstractmethod
    def objective(self, context: Context, rows: Weighted, seeds: Sequence[int], now: Denoising, old: Tensor) -> Tensor:
        """Losses ``[n]`` of samples; ``old`` is the prediction of the old policy at the same states."""

    def weigh(self, scores: Tensor, group: Tensor) -> Tensor:
        advantage = sample_advantages(scores, group, self.advantage)
        return nan_where(scores.isnan(), advantage.clamp(-self.advantage_clip, self.advantage_clip))

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Weighted:
        if self.keeps_old:
            self._old_is_current = self.old.follow(context.policy.parameters, OLD, step)
        return super().collect(context, prompts, step)

    def sampling(self, context: Context, step: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._old_is_current else context.policy.parameters.swapped(OLD)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        policy, rows, seeds = context.policy, micro_batch.rows, micro_batch.seeds
        now = policy.denoise(rows.rollout, seeds)
        old = now.prediction.detach()
        if self.keeps_old and self.compares_with_old and not (micro_batch.first and self._old_is_current):
            old = again(context, rows, seeds, now, OLD)
        per_sample = self.objective(context, rows, seeds, now, old)
        context.tally.mean("loss", per_sample)
        context.tally.mean("fit", now.mean(now.error))
        context.tally.mean("old/distance", mean_square(now.prediction - old))
        if self.kl_coef > 0:
            kl = now.mean(mean_square(now.prediction - again(context, rows, seeds, now)))
            context.tally.mean("kl", kl)
            per_sample = per_sample + self.kl_coef * self.kl_weight(rows.weight.to(kl)) * kl
        return per_sample.sum() / micro_batch.divisor

    def kl_weight(self, advantage: Tensor) -> Tensor:
        """By which the KL of each sample ``[n]`` counts."""
        return torch.ones_like(advantage)


def again(context: Context, rows: Weighted, seeds: Sequence[int], now: Denoising, copy: str | None = None) -> Tensor:
    """Predictions at the same states, without gradient, by a copy of the policy or (None) the reference."""
    policy = context.policy
    with torch.no_grad(), policy.reference() if copy is None else policy.parameters.swapped(copy):
        return policy.denoise(rows.rollout, seeds, at=now).prediction


@dataclass
class DiffusionNFT(ForwardProcess):
    """DiffusionNFT (arXiv 2509.16117): pull implicit positive and negative predictions towards what was sampled.

    Args:
        beta: see :func:`mmrl.forward_losses.nft_loss`.
        adaptive: divide each error by its size.
    """

    beta: Annotated[float, Field(gt=0)] = 1.0
    adaptive: bool = True

    def objective(self, context: Context, rows: Weighted, seeds: Sequence[int], now: Denoising, old: Tensor) -> Tensor:
        optimal = forward_losses.optimality(rows.weight, self.advantage_clip).to(old)
        loss = forward_losses.nft_loss(now, old, now.spread(optimal), self.beta, self.adaptive)
        return self.advantage_clip * now.mean(loss)


@dataclass
class AdvantageMatching(ForwardProcess):
    """AWM (arXiv 2509.25050): PPO's clipped ratio with minus the denoising error for a log-prob.

    Args:
        clip_range: bound on the ratio's distance from 1.
        weighting, power: of the error by noise level; see :func:`mmrl.forward_losses.matching_logp`.
        slow: how a slow copy of the policy follows.
        slow_kl_coef: weight of the mean squared difference of predictions from those of the slow copy.
    """

    clip_range: Annotated[float, Field(gt=0)] = 1.0
    weighting: Weighting = "uniform"
    power: Annotated[float, Field(gt=0)] = 0.25
    slow: Lag = Lag(start=0.9)
    slow_kl_coef: Annotated[float, Field(ge=0)] = 0.0

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Weighted:
        if self.slow_kl_coef > 0:
            self.slow.follow(context.policy.parameters, SLOW, step)
        return super().collect(context, prompts, step)

    def objective(self, context: Context, rows: Weighted, seeds: Sequence[int], now: Denoising, old: Tensor) -> Tensor:
        errors = now.error, mean_square(old - now.target)
        logp, old_logp = (forward_losses.matching_logp(e, now.time, self.weighting, self.power) for e in errors)
        ratio = now.mean(logp - old_logp).exp()
        context.tally.mean("ratio/clipped", ((ratio - 1).abs() > self.clip_range).float())
        loss = losses.clipped_loss(ratio, rows.weight.to(ratio), self.clip_range, self.clip_range)
        if self.slow_kl_coef > 0:
            distance = now.mean(mean_square(now.prediction - again(context, rows, seeds, now, SLOW)))
            context.tally.mean("kl/slow", distance)
            loss = loss + self.slow_kl_coef * distance
        return loss


@dataclass
class GroupPreference(ForwardProcess):
    """DGPO (arXiv 2510.08425): DPO between the better and the worse part of a group, at shared noise.

    A micro-batch holds whole groups, so memory grows with ``group_size``.

    Args:
        beta: of the preference.
        clip_range: samples whose denoising error moved further than this from that of the old policy, in the direction
            that their advantage wants, count no more.
    """

    beta: Annotated[float, Field(gt=0)] = 10.0
    clip_range: Annotated[float, Field(gt=0)] | None = None

    whole_groups: ClassVar[bool] = True
    shared_noise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.needs_reference = True
        self.compares_with_old = self.clip_range is not None

    def objective(self, context: Context, rows: Weighted, seeds: Sequence[int], now: Denoising, old: Tensor) -> Tensor:
        error, advantage = now.mean(now.error), rows.weight.to(old)
        reference = now.mean(mean_square(again(context, rows, seeds, now) - now.target))
        loss = forward_losses.group_preference_loss(error, reference, advantage, rows.group, self.beta)
        if self.clip_range is None:
            return loss
        ratio = (now.mean(mean_square(old - now.target)) - error.detach()).exp()
        far = torch.where(advantage > 0, ratio > 1 + self.clip_range, ratio < 1 - self.clip_range)
        context.tally.mean("ratio/clipped", far.float())
        return torch.where(far, loss.detach(), loss)


@dataclass
class CentredReward(ForwardProcess):
    """CRD (arXiv 2603.14128): denoising errors fall below the old policy's as far as rewards say, up to a constant.

    A micro-batch holds whole groups, so memory grows with ``group_size``.

    Args:
        beta, temperature: see :func:`mmrl.forward_losses.centred_reward_loss`.
        adaptive: divide each error by its size.
        sampler: how the policy that samples follows, which here is not the old one.
        kl_by_reward: let the KL of a sample count by its reward.
    """

    beta: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] | None = None
    adaptive: bool = True
    old: Lag = Lag(start=0.25, rate=0.005)
    sampler: Lag = Lag(flat=75, rate=0.0075)
    kl_by_reward: bool = True

    whole_groups: ClassVar[bool] = True

    def sampling(self, context: Context, step: int) -> contextlib.AbstractContextManager[None]:
        parameters = context.policy.parameters
        current = self.sampler.follow(parameters, SAMPLER, step)
        return contextlib.nullcontext() if current else parameters.swapped(SAMPLER)

    def objective(self, context: Context, rows: Weighted, seeds: Sequence[int], now: Denoising, old: Tensor) -> Tensor:
        after, before = (forward_losses.clean_error(now, p, self.adaptive) for p in (now.prediction, old))
        optimal = forward_losses.optimality(rows.weight, self.advantage_clip).to(old)
        return forward_losses.centred_reward_loss(
            now.mean(before - after), optimal, rows.group, self.beta, self.advantage_clip, self.temperature
        )

    def kl_weight(self, advantage: Tensor) -> Tensor:
        if not self.kl_by_reward:
            return super().kl_weight(advantage)
        return forward_losses.optimality(advantage, self.advantage_clip)
