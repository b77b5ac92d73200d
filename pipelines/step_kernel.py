"""One denoising step, for every sampler: ``x' = A x0hat + B x1hat + C z``.

Flow matching puts ``x_s = (1 - s) x0 + s e`` with sigma ``s`` in [0, 1] (1 is noise) and velocity ``v = e - x0``, so
that ``x0hat = x - s v`` and ``x1hat = x + (1 - s) v``. Diffusion models (DDPM) put ``x = sqrt(abar) x0 + sqrt(1 - abar)
e`` and predict ``e``, ``x0`` or ``v = sqrt(abar) e - sqrt(1 - abar) x0``. Samplers differ in three numbers only. Those
are computed in float64 on the host; the tensors are float32 whatever the network's precision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StepKind = Literal["ode", "flow_sde", "dance", "cps", "wan", "ddim"]
LogProbKind = Literal["auto", "gaussian", "squared_error"]


@dataclass(frozen=True)
class StepCoefficients:
    """One step: weights of the clean and the noise estimate, std of fresh noise, size of the step.

    Numbers for a batch at one step, tensors that broadcast for rows at different ones (:func:`steps_at`).
    """

    A: float | Tensor
    B: float | Tensor
    C: float | Tensor
    dt: float | Tensor


def flow_coefficients(
    kind: StepKind, sigma: float, sigma_next: float, noise_level: float, sigma_second: float, first: bool = False
) -> StepCoefficients:
    """Coefficients of a flow-matching step from ``sigma`` down to ``sigma_next``.

    With h = sigma - sigma_next and a = noise_level, the marginals of the ODE are kept by any g in

        B = sigma_next - h g^2 / (2 sigma),  C = g sqrt(h)

    * ``flow_sde``: g = a sqrt(s / (1 - s)) (Flow-GRPO, arXiv:2505.05470). The very first step starts at or next to
      pure noise, where this has a pole; there ``sigma_second``, the second sigma of the schedule, stands in the
      denominator.
    * ``dance``: g = a (DanceGRPO, arXiv:2505.07818).
    * ``wan``: g = sigma_second * s, as Flow-GRPO does for Wan; the noise level is not used.
    * ``cps``: B = sigma_next cos(a pi / 2), C = sigma_next sin(a pi / 2) (Flow-CPS, arXiv:2509.05952).
    * ``ode``: B = sigma_next, C = 0.
    """
    h = sigma - sigma_next
    if kind == "ode" or sigma_next == 0:
        return StepCoefficients(1 - sigma_next, sigma_next, 0.0, h)
    if kind == "cps":
        angle = noise_level * math.pi / 2
        return StepCoefficients(1 - sigma_next, sigma_next * math.cos(angle), sigma_next * math.sin(angle), h)
    if kind == "flow_sde":
        near_pole = sigma >= 1 or (first and sigma > 0.99)
        g = noise_level * math.sqrt(sigma / (1 - (sigma_second if near_pole else sigma)))
    elif kind == "dance":
        g = noise_level
    elif kind == "wan":
        g = sigma_second * sigma
    else:
        raise ValueError(f"'{kind}' is not a step of flow-matching models")
    return StepCoefficients(1 - sigma_next, sigma_next - h * g * g / (2 * sigma), g * math.sqrt(h), h)


def ddim_coefficients(alpha_bar: float, alpha_bar_next: float, eta: float, dt: float) -> StepCoefficients:
    """Coefficients of a DDIM step with ``eta`` in [0, 1] (arXiv:2010.02502, eq. 12, 16); x1hat is the noise estimate.

    ``eta`` 0 is deterministic, 1 has the variance of DDPM. A step to ``alpha_bar_next`` = 1 adds no noise.
    """
    variance = (1 - alpha_bar_next) / (1 - alpha_bar) * (1 - alpha_bar / alpha_bar_next)
    noise = eta * eta * variance
    return StepCoefficients(
        math.sqrt(alpha_bar_next), math.sqrt(max(0.0, 1 - alpha_bar_next - noise)), math.sqrt(noise), dt
    )


def diffusion_cps_coefficients(alpha_bar_next: float, noise_level: float, dt: float) -> StepCoefficients:
    """Coefficients of a step of a diffusion model that puts fresh noise in the place of the estimated one.

    The counterpart of Flow-CPS: of the noise that is left, ``cos(a pi / 2)`` is the estimate and ``sin(a pi / 2)``
    fresh. At ``noise_level`` a = 1 this is how consistency models are sampled (arXiv:2303.01469, algorithm 1): go to
    the clean estimate, add noise again.
    """
    angle, noise = noise_level * math.pi / 2, math.sqrt(1 - alpha_bar_next)
    return StepCoefficients(math.sqrt(alpha_bar_next), noise * math.cos(angle), noise * math.sin(angle), dt)


def step_table(steps: Sequence[StepCoefficients]) -> Tensor:
    """The coefficients of several steps as a float32 tensor ``[S, 4]``, for :func:`steps_at`."""
    return torch.tensor([[step.A, step.B, step.C, step.dt] for step in steps])


def steps_at(table: Tensor, index: Tensor, ndim: int) -> StepCoefficients:
    """Coefficients of the steps ``index`` (long ``[n]``), to broadcast against ``[n, ...]`` of ``ndim`` axes."""
    return StepCoefficients(*table[index].view(-1, *[1] * (ndim - 1), 4).unbind(-1))


def cosine_alpha_bars(count: int) -> list[float]:
    """Signal levels abar of ``count`` diffusion steps, least noisy first (arXiv:2102.09672, eq. 17; betas up to 0.999).

    What diffusers calls ``squaredcos_cap_v2``, the usual schedule of diffusion policies.
    """

    def level(place: float) -> float:
        return math.cos((place + 0.008) / 1.008 * math.pi / 2) ** 2

    bars, bar = [], 1.0
    for step in range(count):
        bar *= 1 - min(1 - level((step + 1) / count) / level(step / count), 0.999)
        bars.append(bar)
    return bars


def flow_endpoints(x: Tensor, velocity: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """Estimates (x0hat, x1hat) of clean sample and noise, from float32 ``x`` and velocity of one shape."""
    return x - sigma * velocity, x + (1 - sigma) * velocity


def diffusion_endpoints(x: Tensor, output: Tensor, alpha_bar: float | Tensor, prediction: str) -> tuple[Tensor, Tensor]:
    """Estimates (x0hat, ehat) from a network that predicts ``epsilon``, ``v_prediction`` or ``sample`` (x0)."""
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    if prediction == "epsilon":
        return (x - noise * output) / signal, output
    if prediction == "v_prediction":
        return signal * x - noise * output, signal * output + noise * x
    if prediction == "sample":
        return output, (x - signal * output) / noise
    raise ValueError(f"prediction type '{prediction}' is none of epsilon, v_prediction, sample")


def step_mean(x0hat: Tensor, x1hat: Tensor, step: StepCoefficients) -> Tensor:
    """Where the step goes on average: ``A x0hat + B x1hat``."""
    return step.A * x0hat + step.B * x1hat


def gaussian_logp(action: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """Log density ``[N]`` of ``action [N, ...]`` under N(mean, std^2), averaged over the elements of a sample.

    The average instead of the sum is the convention of Flow-GRPO and DDPO; published clip ranges assume it.
    ``std`` is a number or broadcasts against ``action``.
    """
    return gaussian_log_density(action, mean, std).flatten(1).mean(1)


def gaussian_log_density(action: Tensor, mean: Tensor, std: float | Tensor) -> Tensor:
    """Log density of each element of ``action`` under N(mean, std^2)."""
    log_std = torch.log(torch.as_tensor(std, dtype=torch.float32, device=action.device))
    return -((action - mean) ** 2) / (2 * std**2) - log_std - 0.5 * math.log(2 * math.pi)


def squared_error_logp(action: Tensor, mean: Tensor) -> Tensor:
    """``-mean((action - mean)^2)`` per sample: what Flow-CPS publishes in place of a log density."""
    return -((action - mean) ** 2).flatten(1).mean(1)


def step_logp(action: Tensor, mean: Tensor, std: float, kind: LogProbKind, step: StepKind) -> Tensor:
    """Log-prob ``[N]`` by the named convention; ``auto`` is the published one: squared error for CPS, else Gaussian."""
    if kind == "squared_error" or (kind == "auto" and step == "cps"):
        return squared_error_logp(action, mean)
    return gaussian_logp(action, mean, std)
