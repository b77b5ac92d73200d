"""Policy-gradient losses as pure functions of tensors.

A loss is three independent choices: an *objective* per decision, an *aggregation* (a weight per decision) and a *KL*.
Shapes: log-probs, ratios and losses ``[N, t]``; advantages broadcast to that; Gaussian means ``[N, t, ...]``.
Everything is to be minimised.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Aggregation = Literal["sequence", "token", "constant"]
SampledKL = Literal["k1", "k2", "k3"]


def clipped_loss(
    ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float, dual_clip: float | None = None
) -> Tensor:
    """PPO's pessimistic clip (arXiv 1707.06347) with separate bounds (DAPO, arXiv 2503.14476).

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; with ``dual_clip=c`` (> 1) the loss of a negative advantage
    is at most ``-c A`` (arXiv 1912.09729).
    """
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss


def clipped_fraction(ratio: Tensor, advantage: Tensor, clip_low: float, clip_high: float) -> Tensor:
    """1.0 where the clip stops the gradient, else 0.0."""
    return (((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))).float()


def cispo_loss(logp: Tensor, ratio: Tensor, advantage: Tensor, ratio_min: float, ratio_max: float) -> Tensor:
    """CISPO (arXiv 2506.13585): ``-sg(clamp(r, ratio_min, ratio_max)) A logp``. The bounds are on the ratio itself."""
    return -ratio.clamp(ratio_min, ratio_max).detach() * advantage * logp


def reinforce_loss(logp: Tensor, advantage: Tensor) -> Tensor:
    """``-A logp``."""
    return -advantage * logp


def sequence_log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """GSPO (arXiv 2507.18071): mean log-ratio of a sample's decisions, the same for each of them: ``[N, t]``."""
    weight = mask.to(logp.dtype)
    mean = ((logp - old_logp) * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(logp)


def guard_log_ratio(action: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's standardised log-ratio (arXiv 2510.22319), ``[N, t]``.

    ``(logp - old_logp + mean((mu - mu_old)^2) / (2 std^2)) * std`` equals ``mean(z (mu - mu_old))`` with
    ``z = (action - mu_old) / std``; the second form has no cancellation. Zero-mean under the old policy at every step.
    """
    noise = (action - old_mean) / _align(std, mean)
    return (noise * (mean - old_mean)).flatten(2).mean(2)


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor) -> Tensor:
    """KL between Gaussians of equal ``std``, mean over elements: ``mean((mu - mu')^2) / (2 std^2)``, ``[N, t]``."""
    return (mean - other_mean).square().flatten(2).mean(2) / (2 * std.square())


def divergence_masked_loss(ratio: Tensor, advantage: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """Flow-DPPO: ``-A r``, dropped where the policy has moved ``threshold`` away and the update would move it further.

    ``divergence`` is :func:`gaussian_kl` to the behaviour policy.
    """
    further = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    return torch.where((divergence.detach() >= threshold) & further, 0.0, -advantage * ratio)


def sampled_kl(logp: Tensor, ref_logp: Tensor, estimator: SampledKL) -> Tensor:
    """Estimators of KL(policy || reference) from samples of the policy (Schulman 2020), ``[N, t]``.

    ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = exp(-d) - 1 + d`` with ``d = logp - ref_logp``. As losses: the gradient of k1
    has zero mean, that of k2 is right on-policy, that of k3 is biased.
    """
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}")


def aggregation_weights(mask: Tensor, how: Aggregation, rows: int, decisions: int, max_decisions: int) -> Tensor:
    """Weight of each decision, ``[N, T]``, such that the loss of an optimiser step is ``sum(weight * loss)``.

    The totals are of the *whole* step, over all micro-batches and processes, so the gradient cannot depend on how the
    step is cut.

    Args:
        mask: bool ``[N, T]`` of the rows at hand.
        how: ``sequence`` (GRPO): mean over a sample's decisions, then over samples; ``token`` (DAPO): mean over all
            decisions; ``constant`` (Dr.GRPO): sum over ``rows * max_decisions``.
        rows, decisions: samples and unmasked decisions of the whole step.
        max_decisions: T, or the length limit.
    """
    weight = mask.float()
    if how == "sequence":
        return weight / weight.sum(1, keepdim=True).clamp(min=1) / rows
    if how == "token":
        return weight / max(decisions, 1)
    if how == "constant":
        return weight / (rows * max_decisions)
    raise ValueError(f"unknown aggregation {how!r}")


def preference_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290): ``-log sigmoid(beta * margin)``, with conservative label smoothing e (cDPO), ``[N]``.

    The margin is ``(ref_w - l_w) - (ref_l - l_l)`` with l the ``fit`` loss of winner and loser and ref the same under
    the reference. Diffusion-DPO (arXiv 2311.12908) writes ``beta / 2`` where this has ``beta``.
    """
    z = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def _align(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.reshape(*scalar.shape, *[1] * (like.ndim - scalar.ndim))
