"""From scores to advantages: pure functions over a batch of groups.

Scores may hold NaN, "does not apply": such a sample is left out of every statistic and gets advantage 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

AdvantageMethod = Literal["group", "mean", "batch", "global", "rloo", "opo", "gpg", "pass_at_k", "none"]


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """Sum of ``values`` ``[N]`` within each group, given back per sample ``[N]``. ``group`` is long ``[N]``, from 0."""
    sums = values.new_zeros(int(group.max()) + 1).index_add_(0, group, values)
    return sums[group]


def group_advantages(
    scores: Tensor,
    group: Tensor,
    method: AdvantageMethod = "group",
    eps: float = 1e-4,
    lengths: Tensor | None = None,
) -> Tensor:
    """Advantage of each sample over a baseline.

    Args:
        scores: ``[N]``; NaN where no reward applies.
        group: long ``[N]``, numbered from 0.
        method: with R the score, g the sample's group, unbiased standard deviations throughout:
            ``group``  (R - mean_g) / (std_g + eps), GRPO (arXiv 2402.03300);
            ``mean``   R - mean_g, Dr.GRPO (arXiv 2503.20783);
            ``batch``  (R - mean_g) / (std over all samples + eps), Flow-GRPO's global std (arXiv 2505.05470);
            ``global`` (R - mean over all) / (std over all + eps), DDPO without per-prompt statistics;
            ``rloo``   R - mean of the others in the group (arXiv 2402.14740);
            ``opo``    R - mean_g weighted by length, the baseline of least variance (arXiv 2505.23585);
            ``gpg``    (R - mean_g) N / (number of samples in groups with a spread), GPG (arXiv 2504.02546);
            ``pass_at_k`` only the best of a group: (R_best - R_second) / (std_g + eps) (arXiv 2503.19595);
            ``none``   R.
        eps: keeps a tiny spread from blowing up.
        lengths: ``[N]`` decisions of each sample, for ``opo``.

    Returns:
        ``[N]`` float32. Exactly 0 for NaN scores and, for every method with a group baseline, in groups whose scores
        are all equal up to float32 rounding.
    """
    valid = ~scores.isnan()
    values = torch.where(valid, scores, 0.0).double()
    count = group_sums(valid.double(), group)
    mean = group_sums(values, group) / count.clamp(min=1)
    centred = torch.where(valid, values - mean, 0.0)
    constant = constant_groups(scores, group)
    if method == "group":
        std = (group_sums(centred.square(), group) / (count - 1).clamp(min=1)).sqrt()
        out = centred / (std + eps)
    elif method == "mean":
        out = centred
    elif method == "batch":
        out = centred / (_std(values[valid]) + eps)
    elif method == "rloo":
        out = centred * count / (count - 1).clamp(min=1)
    elif method == "global":
        overall = values[valid].mean() if valid.any() else 0.0
        return torch.where(valid, (values - overall) / (_std(values[valid]) + eps), 0.0).float()
    elif method == "opo":
        weight = torch.where(valid, lengths.to(values), 0.0)
        baseline = group_sums(weight * values, group) / group_sums(weight, group).clamp(min=1)
        out = values - baseline
    elif method == "gpg":
        alive = (valid & ~constant).sum().clamp(min=1)
        out = centred * valid.sum() / alive
    elif method == "pass_at_k":
        std = (group_sums(centred.square(), group) / (count - 1).clamp(min=1)).sqrt()
        out = _lead_of_the_best(values, valid, group) / (std + eps)
    elif method == "none":
        return values.float()
    else:
        raise ValueError(f"unknown advantage method {method!r}")
    return torch.where(valid & ~constant, out, 0.0).float()


def decoupled_advantages(
    scores: Tensor, weights: Tensor, group: Tensor, eps: float = 1e-4, batch_norm: bool = True
) -> Tensor:
    """GDPO: normalise each reward within its group, add up, then normalise over the batch (arXiv 2601.05242).

    Args:
        scores: ``[N, K]``, one column a reward; NaN where it does not apply.
        weights: ``[K]``.
        group: long ``[N]``.
        batch_norm: the last normalisation; without it this is MixGRPO's advantage aggregation.

    Returns:
        ``[N]`` float32; 0 for samples to which no reward applies.
    """
    parts = [group_advantages(column, group, "group", eps) for column in scores.unbind(1)]
    total = (torch.stack(parts, 1) * weights.to(parts[0])).sum(1)
    valid = ~scores.isnan().all(1)
    if batch_norm and valid.any():
        total = (total - total[valid].mean()) / (_std(total[valid]) + eps)
    return torch.where(valid, total, 0.0)


def last_decision_rewards(scores: Tensor, mask: Tensor) -> Tensor:
    """Rewards ``[N, T]`` that are 0 but for the last unmasked decision of each row, which gets the score (NaN: 0)."""
    rewards = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, columns, -1).amax(1)
    rows = (last >= 0).nonzero().flatten()
    rewards[rows, last[rows]] = scores.to(rewards)[rows].nan_to_num(nan=0.0)
    return rewards


def discounted_returns(rewards: Tensor, mask: Tensor, gamma: float = 1.0, final_value: Tensor | None = None) -> Tensor:
    """``G_t = r_t + gamma G_{t+1}`` ``[N, T]``; masked decisions take no part and do not discount.

    After the last decision G is ``final_value`` ``[N]``: what was still to come where a time limit cut, 0 elsewhere.
    """
    running = torch.zeros_like(rewards[:, 0]) if final_value is None else final_value.to(rewards)
    out = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        running = torch.where(mask[:, t], rewards[:, t] + gamma * running, running)
        out[:, t] = running
    return out * mask


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    final_value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """GAE (arXiv 1506.02438): ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``.

    V and A are carried unchanged across masked decisions, such as the tokens of a tool. After the last one A is 0 and V
    is ``final_value`` ``[N]``: 0 where the sample came to its end, the predicted return where a time limit cut it.

    Returns:
        Advantages and the returns ``A + V``, both ``[N, T]``, 0 where masked.
    """
    following = torch.zeros_like(rewards[:, 0]) if final_value is None else final_value.to(rewards)
    running = torch.zeros_like(rewards[:, 0])
    out = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        running = torch.where(mask[:, t], delta + gamma * lam * running, running)
        following = torch.where(mask[:, t], values[:, t], following)
        out[:, t] = running
    return out * mask, (out + values) * mask


def whiten(values: Tensor, mask: Tensor, total: Callable[[float], float] = float) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` over the unmasked decisions, variance unbiased; masked ones become 0.

    Args:
        values: ``[N, T]``.
        total: sums a number over processes, so that statistics are those of all of them.
    """
    kept = values[mask].double()
    count = total(len(kept))
    mean = total(kept.sum().item()) / max(count, 1)
    variance = total((kept - mean).square().sum().item()) / max(count - 1, 1)
    return ((values - mean) / (variance + 1e-8) ** 0.5 * mask).to(values.dtype)


def soft_advantages(advantage: Tensor, positive: float, negative: float) -> Tensor:
    """Bend advantages: ``log(1 + p A) / p`` above 0, ``-(exp(n |A|) - 1) / n`` below; slope 1 at 0, straight for 0.

    The large lead of a given answer is pressed together, differences among poor ones are pulled apart: the shape of
    TempSamp-R1 (arXiv 2509.18056), here around 0 instead of a reward threshold.
    """
    above, below = advantage.clamp(min=0), advantage.clamp(max=0)
    up = torch.log1p(positive * above) / positive if positive > 0 else above
    down = -torch.expm1(-negative * below) / negative if negative > 0 else below
    return up + down


def extremes(scores: Tensor, group: Tensor, count: int) -> Tensor:
    """Bool ``[N]``: among the ``count`` best or ``count`` worst of its group; earlier samples come first among equals.

    Samples with NaN, to which no reward applies, are not.
    """
    kept = torch.zeros(len(scores), dtype=torch.bool)
    for name in group.unique().tolist():
        rows = ((group == name) & ~scores.isnan()).nonzero().flatten()
        order = rows[scores[rows].argsort(stable=True, descending=True)]
        kept[order[:count]] = kept[order[-count:]] = True
    return kept


def constant_groups(scores: Tensor, group: Tensor, tolerance: float = 1e-6) -> Tensor:
    """Bool ``[N]``: the sample's group has no spread, so it carries no signal.

    The tolerance is relative to the largest score of the group and covers float32 rounding of equal scores.
    """
    number = int(group.max()) + 1
    high = scores.new_full((number,), -torch.inf)
    high = high.scatter_reduce(0, group, scores.nan_to_num(nan=-torch.inf), "amax")
    low = scores.new_full((number,), torch.inf)
    low = low.scatter_reduce(0, group, scores.nan_to_num(nan=torch.inf), "amin")
    spread = torch.where(high >= low, high - low, 0.0)
    return (spread <= tolerance * torch.maximum(high.abs(), low.abs()).clamp(min=1.0))[group]


def _lead_of_the_best(values: Tensor, valid: Tensor, group: Tensor) -> Tensor:
    """Best minus second best score of a group for its best sample (the first of equals), 0 for all others."""
    out = torch.zeros_like(values)
    for name in group.unique().tolist():
        rows = ((group == name) & valid).nonzero().flatten()
        if len(rows) > 1:
            first, second = values[rows].topk(2).values
            out[rows[values[rows].argmax()]] = first - second
    return out


def _std(values: Tensor) -> Tensor:
    return values.std() if values.numel() > 1 else values.new_zeros(())
