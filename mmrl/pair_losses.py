"""Losses on pairs of outputs as pure functions of tensors, each ``[N]`` and to be minimised.

For a pair's *better* and *worse* output: ``better_ratio``, ``worse_ratio`` are ``log pi - log pi_ref`` summed over the
output (for denoisers minus the difference of denoising errors), ``*_logp`` the log-probs, ``*_length`` the number of
decisions. ``z = beta (better_ratio - worse_ratio)``. Defined on log-probs alone are the losses in ``NEED_LOGP``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

PairLoss = Literal[
    "sigmoid",
    "robust",
    "ipo",
    "hinge",
    "sigmoid_norm",
    "bco_pair",
    "nca_pair",
    "exo_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "simpo",
    "orpo",
    "sft",
]
PAIR_LOSSES: tuple[str, ...] = get_args(PairLoss)
NEED_LOGP = frozenset({"ipo", "sigmoid_norm", "simpo", "orpo"})
REFERENCE_FREE = frozenset({"simpo", "orpo", "sft"})


@dataclass
class PairScores:
    """What a pair loss sees, each ``[N]``; see the module. Ratios are 0 where no reference is needed."""

    better_logp: Tensor
    worse_logp: Tensor
    better_ratio: Tensor
    worse_ratio: Tensor
    better_length: Tensor
    worse_length: Tensor


def preference_loss(margin: Tensor, beta: float, label_smoothing: float | Tensor = 0.0) -> Tensor:
    """DPO (arXiv 2305.18290): ``-log sigmoid(beta * margin)``, with conservative label smoothing e (cDPO), ``[N]``.

    The margin is ``(ref_w - l_w) - (ref_l - l_l)`` with l the ``fit`` loss of winner and loser and ref the same under
    the reference. Diffusion-DPO (arXiv 2311.12908) writes ``beta / 2`` where this has ``beta``.
    """
    z = beta * margin
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def pair_loss(
    kind: PairLoss, pair: PairScores, beta: float, smoothing: float | Tensor = 0.0, gamma: float = 0.5
) -> Tensor:
    """One loss of a pair ``[N]``.

    Args:
        kind: ``sigmoid`` DPO, with ``smoothing`` cDPO; ``robust`` (arXiv 2403.00409); ``ipo`` (2310.12036) on averages
            per decision; ``hinge`` SLiC (2305.10425); ``sigmoid_norm`` DPO on averages; ``bco_pair`` (2404.04656);
            ``nca_pair`` (2402.05369); ``exo_pair`` (2402.00856), ``smoothing`` > 0; ``sppo_hard`` (2405.00675);
            ``apo_zero``, ``apo_down`` (2408.06266); ``simpo`` (2405.14734) with target margin ``gamma`` on averages,
            without reference; ``orpo`` (2403.07691) without reference; ``sft`` the better output's mean NLL.
        smoothing: chance that a label is wrong, of sigmoid, robust and exo_pair; one number, or one a pair.
    """
    better, worse = beta * pair.better_ratio, beta * pair.worse_ratio
    z = better - worse
    if kind == "sigmoid":
        return preference_loss(pair.better_ratio - pair.worse_ratio, beta, smoothing)
    if kind == "robust":
        flipped = (1 - smoothing) * F.logsigmoid(z) - smoothing * F.logsigmoid(-z)
        return -flipped / (1 - 2 * smoothing)
    if kind == "ipo":
        return (_mean_ratio_margin(pair) - 1 / (2 * beta)).square()
    if kind == "hinge":
        return (1 - z).relu()
    if kind == "sigmoid_norm":
        return preference_loss(_mean_ratio_margin(pair), beta)
    if kind == "bco_pair":
        return -F.logsigmoid(better) - F.logsigmoid(-worse)
    if kind == "nca_pair":
        return -F.logsigmoid(better) - (F.logsigmoid(-better) + F.logsigmoid(-worse)) / 2
    if kind == "exo_pair":
        flip = torch.as_tensor(smoothing)
        log_label, log_flip = torch.log1p(-flip), flip.log()
        right = z.sigmoid() * (F.logsigmoid(z) - log_label)
        return right + (-z).sigmoid() * (F.logsigmoid(-z) - log_flip)
    if kind == "sppo_hard":
        return (pair.better_ratio - 1 / (2 * beta)).square() + (pair.worse_ratio + 1 / (2 * beta)).square()
    if kind == "apo_zero":
        return 1 - better.sigmoid() + worse.sigmoid()
    if kind == "apo_down":
        return better.sigmoid() + 1 - z.sigmoid()
    better_mean, worse_mean = pair.better_logp / pair.better_length, pair.worse_logp / pair.worse_length
    if kind == "simpo":
        return -F.logsigmoid(beta * (better_mean - worse_mean) - gamma)
    if kind == "orpo":
        return -better_mean - beta * F.logsigmoid(_log_odds(better_mean) - _log_odds(worse_mean))
    if kind == "sft":
        return -better_mean
    raise ValueError(f"unknown pair loss {kind!r}")


def mixed_pair_loss(
    weights: Mapping[str, float],
    pair: PairScores,
    beta: float,
    smoothing: float | Tensor = 0.0,
    gamma: float = 0.5,
) -> Tensor:
    """Weighted sum of pair losses; MPO (arXiv 2411.10442) is ``{sigmoid: 0.8, bco_pair: 0.2, sft: 1.0}``."""
    return sum(weight * pair_loss(kind, pair, beta, smoothing, gamma) for kind, weight in weights.items())


def kto_loss(
    ratio: Tensor, desirable: Tensor, kl: Tensor, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """KTO (arXiv 2402.01306), ``[N]``: ``1 - sigmoid(beta (ratio - kl))`` for desirable outputs, turned for others.

    Args:
        ratio: ``[N]``, ``log pi - log pi_ref`` of each output.
        desirable: bool ``[N]``.
        kl: the reference point, not negative, without gradient.
    """
    away = torch.where(desirable, ratio - kl, kl - ratio)
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return weight * (1 - (beta * away).sigmoid())


def _mean_ratio_margin(pair: PairScores) -> Tensor:
    return pair.better_ratio / pair.better_length - pair.worse_ratio / pair.worse_length


def _log_odds(mean_logp: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of the mean probability ``p = exp(mean_logp)`` of a decision."""
    return mean_logp - torch.log(-torch.expm1(mean_logp))
