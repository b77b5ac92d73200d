"""The loss of a micro-batch: objective, KL, entropy bonus and value loss, each with its own weight per decision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mmrl import losses
from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import Experience, ReferenceScores
from mmrl.algorithms.objectives import Objective
from mmrl.algorithms.regularisers import EntropyBonus, ValueHead
from mmrl.types import Decisions

KLName = Literal["exact", "exact_dt", "k1", "k2", "k3"]


@dataclass
class MicroBatch:
    """Some rows and some decisions (``columns``) of an experience.

    Attributes:
        weight: ``[n, t]`` of each decision in the update's loss.
        token_weight: ``[n, t]`` the same for the terms that are means over decisions: entropy and value.
        centre: ``[n, 1]`` mean log-ratio of each row's group, for Reg-GRPO.
        first: the policy is still the one that sampled.
    """

    experience: Experience
    columns: list[int]
    weight: Tensor
    token_weight: Tensor
    centre: Tensor
    reference: ReferenceScores
    first: bool


@dataclass
class PolicyLoss:
    """What a micro-batch costs; see :class:`mmrl.algorithms.policy_gradient.PolicyGradient` for the options.

    Attributes:
        kl_coef: of the KL in the loss; 0 where there is none or it is part of the reward.
        kl: None is exact for Gaussian decisions and k3 for tokens.
    """

    objective: Objective
    kl_coef: float
    kl: KLName | None
    kl_gradient: losses.KLGradient
    kl_ratio_weight: bool
    entropy: EntropyBonus
    value: ValueHead | None

    def __call__(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        batch, columns, rollout = micro_batch.experience, micro_batch.columns, micro_batch.experience.rollout
        decisions = context.policy.decisions(rollout, columns)
        device = decisions.logp.device
        weight, token_weight = micro_batch.weight.to(device), micro_batch.token_weight.to(device)
        mask, advantage = batch.mask[:, columns].to(device), batch.advantage[:, columns].to(device)
        old_logp = rollout.logp[:, columns].to(device)
        # What a policy returns where there was no decision must not matter, not even as infinity times 0.
        decisions = replace(decisions, logp=torch.where(mask, decisions.logp, old_logp))

        old_mean = rollout.mean[:, columns].to(device) if self.objective.needs_means else None
        centre = micro_batch.centre.to(device)
        clip_scale = None if batch.clip_scale is None else batch.clip_scale[:, columns].to(device)
        policy_loss, ratio = self.objective(decisions, old_logp, mask, advantage, old_mean, centre, clip_scale)
        if batch.factor is not None:
            policy_loss = policy_loss * batch.factor[:, columns].to(device)
        loss = (weight * policy_loss).sum()
        if self.kl_coef > 0:
            kl = self._reference_kl(context, micro_batch, decisions, mask)
            loss = loss + self.kl_coef * (weight * (kl * ratio if self.kl_ratio_weight else kl)).sum()
        else:
            kl = losses.sampled_kl(old_logp, decisions.logp, "k3")
        if decisions.entropy is not None:
            if self.entropy.used:
                loss = loss - self.entropy.coefficient * (token_weight * decisions.entropy).sum()
                self.entropy.observe(decisions.entropy, mask)
            context.tally.mean("entropy", decisions.entropy, mask.float())
        if self.value is not None:
            returns, old_value = batch.returns[:, columns].to(device), rollout.value[:, columns].to(device)
            value_loss = self.value.loss(decisions, old_value, returns)
            loss = loss + self.value.coef * (token_weight * value_loss).sum()
            context.tally.mean("value/loss", value_loss, mask.float())

        tally = context.tally
        if micro_batch.first:
            tally.max("ratio/max_abs_dev", (ratio - 1).abs())
        low, high = self.objective.bounds(decisions.mean is not None)
        if clip_scale is not None:
            low, high = low * clip_scale, high * clip_scale
        tally.mean("ratio/clip_fraction", losses.clipped_fraction(ratio, advantage, low, high), mask.float())
        tally.mean("kl", kl, weight)
        tally.mean("loss", policy_loss, weight)
        return loss

    def _reference_kl(self, context: Context, micro_batch: MicroBatch, decisions: Decisions, mask: Tensor) -> Tensor:
        kind = self.kl or ("exact" if decisions.mean is not None else "k3")
        if kind in ("k1", "k2", "k3"):
            known = micro_batch.experience.reference_logp
            if known is not None:
                reference = known[:, micro_batch.columns].to(decisions.logp.device)
            else:
                reference = micro_batch.reference.columns(context.policy, micro_batch.columns).logp
            reference = torch.where(mask, reference, decisions.logp.detach())
            return losses.sampled_kl(decisions.logp, reference, kind, self.kl_gradient)
        found = micro_batch.reference.columns(context.policy, micro_batch.columns)
        exact = losses.gaussian_kl(decisions.mean, found.mean, decisions.std, found.std)
        return exact * decisions.dt if kind == "exact_dt" else exact
