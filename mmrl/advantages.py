"""From scores to advantages: pure functions over a batch of groups.

Scores may hold NaN, "does not apply": such a sample is left out of every statistic and gets advantage 0.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

AdvantageMethod = Literal["group", "mean", "batch", "global", "rloo", "none"]


def group_sums(values: Tensor, group: Tensor) -> Tensor:
    """Sum of ``values`` ``[N]`` within each group, given back per sample ``[N]``. ``group`` is long ``[N]``, from 0."""
    sums = values.new_zeros(int(group.max()) + 1).index_add_(0, group, values)
    return sums[group]


def group_advantages(scores: Tensor, group: Tensor, method: AdvantageMethod = "group", eps: float = 1e-4) -> Tensor:
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
            ``none``   R.
        eps: keeps a tiny spread from blowing up.

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


def _std(values: Tensor) -> Tensor:
    return values.std() if values.numel() > 1 else values.new_zeros(())
