"""Losses on outputs that were noised again, as pure functions of tensors.

M things are denoised, N samples own them (:class:`mmrl.types.Denoising`); all losses are to be minimised.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmrl.types import Denoising, mean_square

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]


def optimality(advantage: Tensor, clip: float) -> Tensor:
    """Advantages as probabilities of being optimal, ``clamp(A / (2 clip) + 1/2, 0, 1)`` (DiffusionNFT, 2509.16117)."""
    return (advantage / (2 * clip) + 0.5).clamp(0, 1)


def clean_error(at: Denoising, prediction: Tensor, adaptive: bool) -> Tensor:
    """``[M]``: mean squared error of the clean output that a prediction stands for.

    With ``adaptive`` it is divided by the mean absolute error, held constant and at least 1e-5: errors of all noise
    levels then weigh alike.
    """
    scale = at.x0_scale.view(-1, *[1] * (prediction.ndim - 1))
    error = scale * (prediction - at.target)
    size = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return mean_square(error) / size if adaptive else mean_square(error)


def nft_loss(now: Denoising, old: Tensor, optimal: Tensor, beta: float, adaptive: bool = True) -> Tensor:
    """DiffusionNFT (arXiv 2509.16117) ``[M]``: ``q L+ / beta + (1 - q) L- / beta``.

    L+ is the error of the implicit positive prediction ``beta v + (1 - beta) v_old`` and L- that of the negative one,
    ``(1 + beta) v_old - beta v``. At ``v = v_old`` the gradient is ``(2 q - 1)`` times that of the error.

    Args:
        now: with the prediction v.
        old: ``[M, ...]``, v_old of the policy that sampled, without gradient.
        optimal: ``[M]``, q in [0, 1].
        beta: strength of guidance; small values take larger steps.
    """
    positive = beta * now.prediction + (1 - beta) * old
    negative = (1 + beta) * old - beta * now.prediction
    better, worse = clean_error(now, positive, adaptive), clean_error(now, negative, adaptive)
    return (optimal * better + (1 - optimal) * worse) / beta


def matching_logp(error: Tensor, time: Tensor, weighting: Weighting = "uniform", power: float = 0.25) -> Tensor:
    """AWM's stand-in for a log-prob (arXiv 2509.25050), ``[M]``: minus the weighted denoising error.

    Args:
        error: ``[M]``, mean squared difference of prediction and target.
        time: ``[M]``, t.
        weighting: ``uniform``, ``t``, ``t2`` multiply; ``huber`` is ``t sqrt(error)`` and ``ghuber``
            ``t error^power / power``, each made smooth at 0.
    """
    if weighting == "uniform":
        return -error
    if weighting == "t":
        return -time * error
    if weighting == "t2":
        return -time.square() * error
    tiny = 1e-10
    if weighting == "huber":
        return -time * ((error + tiny).sqrt() - tiny**0.5)
    if weighting == "ghuber":
        return -time * ((error + tiny) ** power - tiny**power) / power
    raise ValueError(f"unknown weighting {weighting!r}")


def group_preference_loss(
    error: Tensor, reference_error: Tensor, advantage: Tensor, group: Tensor, beta: float
) -> Tensor:
    """DGPO (arXiv 2510.08425) ``[N]``: ``sigmoid(S) A error``.

    S, held constant, is ``beta`` times the group's mean of ``A (error - reference_error)``: the gradient is that of
    ``-log sigmoid(-S) / beta``, so a group that is told apart already counts less.

    Args:
        error, reference_error: ``[N]`` denoising errors under policy and reference, at the same noise.
        advantage: ``[N]``.
        group: long ``[N]``; whole groups.
    """
    gap = advantage * (error - reference_error).detach()
    return (beta * group_mean(gap, group)).sigmoid() * advantage * error


def centred_reward_loss(
    log_ratio: Tensor, optimal: Tensor, group: Tensor, beta: float, clip: float, temperature: float | None = None
) -> Tensor:
    """CRD (arXiv 2603.14128) ``[N]``: ``(beta (r - mean r) - (q - mean q))^2 clip / beta``, means over the group.

    Centring removes the normaliser of the tilted distribution. At ``r = 0`` the gradient is that of ``-A r``.

    Args:
        log_ratio: ``[N]``, r: by how much denoising errors fell below those of the old policy.
        optimal: ``[N]``, q (:func:`optimality`).
        group: long ``[N]``; whole groups.
        beta: strength of the KL to the old policy.
        clip: of the advantages that q was made from.
        temperature: of two weighted centrings that are averaged, by ``softmax(q / temperature)`` and
            ``softmax(-q / temperature)`` in place of equal weights.
    """
    residual = beta * log_ratio - optimal
    same = (group[:, None] == group[None]).to(optimal.device)
    tilts = [0.0] if temperature is None else [1 / temperature, -1 / temperature]
    shares = [torch.where(same, tilt * optimal, -torch.inf).softmax(1) for tilt in tilts]
    return sum((residual - share @ residual).square() for share in shares) / len(shares) * clip / beta


def distribution_matching_loss(now: Denoising, direction: Tensor, base: Tensor) -> Tensor:
    """Diff-Instruct (arXiv 2305.18455), DMD (2311.18828) ``[M]``: move outputs by a difference of two models' scores.

    The gradient by the noised outputs is minus the difference of the two models' estimates of the clean output, divided
    by the mean size of the base model's error.

    Args:
        now: outputs noised again, with gradient in ``x``.
        direction: ``[M, ...]``, difference of predictions, of the model to go to less the model to come from.
        base: ``[M, ...]``, predictions of the base model.
    """
    scale = now.x0_scale.view(-1, *[1] * (direction.ndim - 1))
    size = (scale * (base - now.target)).abs().flatten(1).mean(1).clamp(min=1e-5)
    step = (scale * direction).flatten(1) / size[:, None]
    return (step.detach() * now.x.flatten(1)).mean(1)


def reward_difference_errors(log_ratio: Tensor, clipped: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """PRDP (arXiv 2402.08714): squared errors ``[P]`` of reward differences, one for each pair within a group.

    The larger of the error with log-ratios as they are and with clipped ones counts.

    Args:
        log_ratio: ``[N]``, log of policy over reference, summed over a sample.
        clipped: ``[N]``, the same with each decision kept near the policy that sampled.
        target: ``[N]``, rewards over beta.
        group: long ``[N]``.
    """
    one, other = (group[:, None] == group[None]).triu(1).nonzero(as_tuple=True)
    errors = [(x - target)[one] - (x - target)[other] for x in (log_ratio, clipped)]
    return torch.maximum(errors[0].square(), errors[1].square())


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean over each group, given back per sample ``[N]``, with gradient."""
    names = group.unique(return_inverse=True)[1].to(values.device)
    count = int(names.max()) + 1
    total = values.new_zeros(count).index_add(0, names, values)
    return (total / names.bincount(minlength=count))[names]
