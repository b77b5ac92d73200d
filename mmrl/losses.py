"""Policy-gradient losses as pure functions of tensors.

A loss is three independent choices: an *objective* per decision, an *aggregation* (a weight per decision) and a *KL*.
Shapes: log-probs, ratios and losses ``[N, t]``; advantages broadcast to that; Gaussian means ``[N, t, ...]``.
Everything is to be minimised.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["sequence", "token", "constant", "blocks"]
SampledKL = Literal["k1", "k2", "k3"]
KLGradient = Literal["value", "k2"]


def clipped_loss(
    ratio: Tensor,
    advantage: Tensor,
    clip_low: float | Tensor,
    clip_high: float | Tensor,
    dual_clip: float | None = None,
) -> Tensor:
    """PPO's pessimistic clip (arXiv 1707.06347) with separate bounds (DAPO, arXiv 2503.14476).

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)``; the bounds may be ``[N, t]``. With ``dual_clip=c`` (> 1) the
    loss of a negative advantage is at most ``-c A`` (arXiv 1912.09729). That is also what INTELLECT-2's two-sided
    ``delta = c`` does.
    """
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_low, 1 + clip_high))
    if dual_clip is not None:
        loss = torch.where(advantage < 0, torch.minimum(loss, -dual_clip * advantage), loss)
    return loss


def clipped_fraction(ratio: Tensor, advantage: Tensor, clip_low: float | Tensor, clip_high: float | Tensor) -> Tensor:
    """1.0 where the clip stops the gradient, else 0.0."""
    return (((ratio > 1 + clip_high) & (advantage > 0)) | ((ratio < 1 - clip_low) & (advantage < 0))).float()


def cispo_loss(logp: Tensor, ratio: Tensor, advantage: Tensor, ratio_min: float, ratio_max: float) -> Tensor:
    """CISPO (arXiv 2506.13585): ``-sg(clamp(r, ratio_min, ratio_max)) A logp``. The bounds are on the ratio itself."""
    return -ratio.clamp(ratio_min, ratio_max).detach() * advantage * logp


def reinforce_loss(logp: Tensor, advantage: Tensor) -> Tensor:
    """``-A logp``."""
    return -advantage * logp


def soft_clipped_loss(ratio: Tensor, advantage: Tensor, positive: float = 1.0, negative: float = 1.05) -> Tensor:
    """SAPO (arXiv 2511.20347): ``-A (4 / tau) sigmoid(tau (r - 1))``, a clip without an edge.

    ``tau`` is ``positive`` for advantages above 0, else ``negative``; the gradient at r = 1 is that of ``-A r``.
    """
    tau = torch.where(advantage > 0, positive, negative)
    return -advantage * torch.sigmoid(tau * (ratio - 1)) * 4 / tau


def geometric_mean_loss(
    log_ratio: Tensor, advantage: Tensor, mask: Tensor, clip_low: float | Tensor, clip_high: float | Tensor
) -> Tensor:
    """GMPO (arXiv 2507.20673): minus A times the geometric mean of a sample's clipped ratios, for each decision.

    The pessimistic clip is on the log-ratio, to ``[-clip_low, clip_high]``. With per-sample advantages and the
    ``sequence`` aggregation this is the published loss.
    """
    clipped = log_ratio.clamp(-clip_low, clip_high)
    bounded = torch.where(advantage > 0, torch.minimum(log_ratio, clipped), torch.maximum(log_ratio, clipped))
    return -advantage * _masked_mean(bounded, mask).exp()


def regression_loss(log_ratio: Tensor, advantage: Tensor, mask: Tensor, scale: float, centre: Tensor) -> Tensor:
    """Reg-GRPO: regress a sample's advantage on its log-ratio (DeepVideo-R1, arXiv 2506.07464), for each decision.

    ``(scale (s - centre) - A)^2 / (2 scale)`` with ``s`` the sample's mean log-ratio: at the optimum of the
    KL-regularised objective the reward is the scaled log-ratio up to a constant of the prompt. ``centre`` ``[N, 1]`` is
    the group's mean of ``s``, a constant: its own gradient vanishes, since residuals sum to 0 in a group. On-policy the
    gradient is that of REINFORCE with the sample's mean log-prob; no clip is needed.
    """
    residual = scale * (_masked_mean(log_ratio, mask) - centre) - advantage
    return residual.square() / (2 * scale)


def negative_aware_loss(ratio: Tensor, advantage: Tensor, floor: float = 1.0) -> Tensor:
    """NFT on decisions (Negative-aware Fine-Tuning, arXiv 2505.18116).

    With a prompt's success rate p, a right answer's loss is ``-w log r`` and a wrong one's ``-w log((1 - p r) / (1 -
    p))``, the log-ratio of the implicit negative policy; ``w = sqrt((1 - p) / p)``. Normalised by its group, the
    advantage of a right answer is w and that of a wrong one -1/w, which is all that the loss depends on: ``-A log r``
    for ``A > 0`` and ``-log(1 - A^2 (r - 1)) / |A|`` for ``A < 0``. So it takes graded rewards as well. The argument of
    the second logarithm is at least ``floor``, with the gradient as if it were not bounded. On-policy it is GRPO.
    """
    size = advantage.abs().clamp(min=1e-6)
    inner = 1 - advantage.square() * (ratio.clamp(max=math.exp(10)) - 1)
    inner = inner + (inner.clamp(min=floor) - inner).detach()
    return torch.where(advantage > 0, -advantage * ratio.log(), torch.where(advantage < 0, -inner.log() / size, 0.0))


def sequence_log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """GSPO (arXiv 2507.18071): mean log-ratio of a sample's decisions, the same for each of them: ``[N, t]``."""
    return _masked_mean(logp - old_logp, mask)


def sequence_token_log_ratio(logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
    """GSPO-token: the value of :func:`sequence_log_ratio`, the gradient of each decision's own log-prob."""
    return sequence_log_ratio(logp, old_logp, mask).detach() + logp - logp.detach()


def guard_log_ratio(action: Tensor, mean: Tensor, old_mean: Tensor, std: Tensor) -> Tensor:
    """GRPO-Guard's standardised log-ratio (arXiv 2510.22319), ``[N, t]``.

    ``(logp - old_logp + mean((mu - mu_old)^2) / (2 std^2)) * std`` equals ``mean(z (mu - mu_old))`` with
    ``z = (action - mu_old) / std``; the second form has no cancellation. Zero-mean under the old policy at every step.
    """
    noise = (action - old_mean) / _align(std, mean)
    return (noise * (mean - old_mean)).flatten(2).mean(2)


def gaussian_kl(mean: Tensor, other_mean: Tensor, std: Tensor, other_std: Tensor | None = None) -> Tensor:
    """KL between Gaussians, mean over elements: ``mean((mu - mu')^2) / (2 std'^2)``, ``[N, t]``.

    Where ``other_std`` is given and not equal, ``log(std' / std) + (std^2 / std'^2 - 1) / 2`` is added.
    """
    distance = (mean - other_mean).square().flatten(2).mean(2)
    if other_std is None:
        return distance / (2 * std.square())
    ratio = std / other_std
    return distance / (2 * other_std.square()) + (ratio.square() - 1) / 2 - ratio.log()


def divergence_masked_loss(ratio: Tensor, advantage: Tensor, divergence: Tensor, threshold: float) -> Tensor:
    """Flow-DPPO: ``-A r``, dropped where the policy has moved ``threshold`` away and the update would move it further.

    ``divergence`` is :func:`gaussian_kl` to the behaviour policy.
    """
    further = ((ratio > 1) & (advantage > 0)) | ((ratio < 1) & (advantage < 0))
    return torch.where((divergence.detach() >= threshold) & further, 0.0, -advantage * ratio)


def sampled_kl(logp: Tensor, ref_logp: Tensor, estimator: SampledKL, gradient: KLGradient = "value") -> Tensor:
    """Estimators of KL(policy || reference) from samples of the policy (Schulman 2020), ``[N, t]``.

    ``k1 = d``, ``k2 = d^2 / 2``, ``k3 = exp(-d) - 1 + d`` with ``d = logp - ref_logp``. As losses: the gradient of k1
    has zero mean, that of k2 is right on-policy, that of k3 is biased. ``gradient="k2"`` gives any of them k2's
    gradient and leaves its value.
    """
    if gradient == "k2" and estimator != "k2":
        right = sampled_kl(logp, ref_logp, "k2")
        return right + (sampled_kl(logp, ref_logp, estimator) - right).detach()
    difference = logp - ref_logp
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference.square() / 2
    if estimator == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {estimator!r}")


def importance_weights(
    logp: Tensor,
    behaviour_logp: Tensor,
    mask: Tensor,
    level: Literal["token", "sequence"],
    mode: Literal["truncate", "mask"],
    maximum: float,
    minimum: float = 0.0,
) -> Tensor:
    """Weights ``pi / mu`` for decisions that another policy took, bounded, ``[N, t]``, without gradient.

    Args:
        logp, behaviour_logp: under the policy to be corrected to (before the update) and the one that acted.
        level: one weight a decision, or the product over a sample's decisions for all of them.
        mode: ``truncate`` clamps to [minimum, maximum]; ``mask`` sets what lies outside to 0.
    """
    log_weight = (logp - behaviour_logp).detach() * mask
    if level == "sequence":
        log_weight = log_weight.sum(1, keepdim=True).expand_as(log_weight)
    weight = log_weight.exp()
    if mode == "truncate":
        return weight.clamp(minimum, maximum)
    return torch.where((weight >= minimum) & (weight <= maximum), weight, 0.0)


def value_loss(
    value: Tensor, old_value: Tensor, returns: Tensor, clip: float | None, huber: float | None = None
) -> Tensor:
    """PPO's value loss per decision: ``max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / 2``, unclipped for None.

    With ``huber=d`` an error e beyond d costs ``d (|e| - d / 2)`` in place of ``e^2 / 2``.
    """
    loss = _half_square(value - returns, huber)
    if clip is not None:
        clipped = old_value + (value - old_value).clamp(-clip, clip)
        loss = torch.maximum(loss, _half_square(clipped - returns, huber))
    return loss


def _half_square(error: Tensor, huber: float | None) -> Tensor:
    half = error.square() / 2
    return half if huber is None else torch.where(error.abs() <= huber, half, huber * (error.abs() - huber / 2))


def aggregation_weights(
    mask: Tensor, how: Aggregation, rows: int, decisions: int, max_decisions: int, block_rows: int = 1, blocks: int = 1
) -> Tensor:
    """Weight of each decision, ``[N, T]``, such that the loss of an optimiser step is ``sum(weight * loss)``.

    The totals are of the *whole* step, over all micro-batches and processes, so the gradient cannot depend on how the
    step is cut.

    Args:
        mask: bool ``[N, T]`` of the rows at hand.
        how: ``sequence`` (GRPO): mean over a sample's decisions, then over samples; ``token`` (DAPO): mean over all
            decisions; ``constant`` (Dr.GRPO): sum over ``rows * max_decisions``; ``blocks`` (BNPO): mean over the
            decisions of ``block_rows`` adjacent rows, then over blocks. ``mask`` must then hold all rows of a process.
        rows, decisions, blocks: samples, unmasked decisions and blocks of rows of the whole step.
        max_decisions: T, or the length limit.
    """
    weight = mask.float()
    if how == "sequence":
        return weight / weight.sum(1, keepdim=True).clamp(min=1) / rows
    if how == "token":
        return weight / max(decisions, 1)
    if how == "constant":
        return weight / (rows * max_decisions)
    if how == "blocks":
        per_block = torch.cat([block.sum().clamp(min=1).expand(len(block)) for block in weight.split(block_rows)])
        return weight / per_block[:, None] / blocks
    raise ValueError(f"unknown aggregation {how!r}")


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over a row's unmasked decisions, the same for each of them: ``[N, t]``."""
    weight = mask.to(values.dtype)
    mean = (values * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(values)


def _align(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.reshape(*scalar.shape, *[1] * (like.ndim - scalar.ndim))
