"""The (A, B, C) kernel against each published formula, log-probs and KL against float64, marginals by Monte Carlo."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mmrl import losses
from mmrl.seeding import generator
from pipelines.step_kernel import (
    ddim_coefficients,
    diffusion_endpoints,
    flow_coefficients,
    flow_endpoints,
    gaussian_logp,
    squared_error_logp,
    step_logp,
    step_mean,
)

SIGMAS = [1.0, 0.9642857, 0.9230769, 0.875, 0.8181818, 0.75, 0.6666667, 0.5625, 0.4285714, 0.25, 0.0]
STEPS = range(len(SIGMAS) - 2)


def tensors(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = generator(0, "kernel")
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def take(kind: str, index: int, level: float, x: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, float]:
    s, s_next = SIGMAS[index], SIGMAS[index + 1]
    c = flow_coefficients(kind, s, s_next, level, SIGMAS[1], index == 0)
    return step_mean(*flow_endpoints(x, v, s), c), c.C


@pytest.mark.parametrize("index", STEPS)
def test_flow_sde_is_the_published_step(index):
    x, v = tensors(2, 4, 3, 3)
    s, dt = SIGMAS[index], SIGMAS[index + 1] - SIGMAS[index]
    g = 0.7 * math.sqrt(s / (1 - (SIGMAS[1] if s == 1 else s)))
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    ours, std = take("flow_sde", index, 0.7, x, v)
    torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-6)
    assert std == pytest.approx(g * math.sqrt(-dt), abs=1e-12)


@pytest.mark.parametrize("index", STEPS)
def test_dance_is_the_published_step(index):
    x, v = tensors(2, 4, 3, 3)
    s, dt, eta = SIGMAS[index], SIGMAS[index + 1] - SIGMAS[index], 0.3
    score = -(x - (1 - s) * (x - s * v)) / s**2
    mean = x + dt * (v - 0.5 * eta**2 * score)
    ours, std = take("dance", index, eta, x, v)
    torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-6)
    assert std == pytest.approx(eta * math.sqrt(-dt), abs=1e-12)


@pytest.mark.parametrize("index", STEPS)
def test_wan_is_the_published_step(index):
    x, v = tensors(2, 4, 3, 3)
    s, dt = SIGMAS[index], SIGMAS[index + 1] - SIGMAS[index]
    low, high = SIGMAS[-1], SIGMAS[1]
    g = low + (high - low) * s
    mean = x * (1 + g**2 / (2 * s) * dt) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    ours, std = take("wan", index, 0.0, x, v)
    torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-6)
    assert std == pytest.approx(g * math.sqrt(-dt), abs=1e-12)


@pytest.mark.parametrize("index", STEPS)
def test_cps_is_the_published_step(index):
    x, v = tensors(2, 4, 3, 3)
    s, s_next = SIGMAS[index], SIGMAS[index + 1]
    std = s_next * math.sin(0.8 * math.pi / 2)
    mean = (1 - s_next) * (x - s * v) + math.sqrt(s_next**2 - std**2) * (x + (1 - s) * v)
    ours, our_std = take("cps", index, 0.8, x, v)
    torch.testing.assert_close(ours, mean, atol=1e-6, rtol=1e-6)
    assert our_std == pytest.approx(std, abs=1e-12)


@pytest.mark.parametrize("index", range(len(SIGMAS) - 1))
def test_ode_is_an_euler_step(index):
    x, v = tensors(2, 4, 3, 3)
    ours, std = take("ode", index, 0.7, x, v)
    torch.testing.assert_close(ours, x + (SIGMAS[index + 1] - SIGMAS[index]) * v, atol=1e-6, rtol=1e-6)
    assert std == 0


@pytest.mark.parametrize("kind", ["ode", "flow_sde", "dance", "cps", "wan"])
def test_the_last_flow_step_ends_at_the_clean_estimate(kind):
    x, v = tensors(2, 4)
    ours, std = take(kind, len(SIGMAS) - 2, 0.7, x, v)
    torch.testing.assert_close(ours, x - SIGMAS[-2] * v)
    assert std == 0


def test_the_first_step_next_to_pure_noise_stays_bounded():
    """Some schedulers start at 1 - 1e-6 instead of 1; the pole there must not blow the noise up."""
    exact = flow_coefficients("flow_sde", 1.0, 0.96, 0.7, 0.96, first=True)
    near = flow_coefficients("flow_sde", 1 - 1e-6, 0.96, 0.7, 0.96, first=True)
    assert pytest.approx(exact.C, rel=1e-4) == near.C


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_the_step_of_diffusers(prediction, eta):
    from diffusers import DDIMScheduler

    theirs = DDIMScheduler(prediction_type=prediction, clip_sample=False, beta_schedule="scaled_linear")
    theirs.set_timesteps(10)
    x, output = tensors(2, 4, 3, 3)
    z = torch.randn(x.shape, generator=generator(1, "z"))
    for t in theirs.timesteps[:-1].tolist():
        expected = theirs.step(output, t, x, eta=eta, variance_noise=z if eta else None).prev_sample
        now, after = theirs.alphas_cumprod[t].double().item(), theirs.alphas_cumprod[t - 100].double().item()
        c = ddim_coefficients(now, after, eta, 0.1)
        ours = step_mean(*diffusion_endpoints(x, output, now, prediction), c) + c.C * z
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=2e-6)


def test_log_probs_agree_with_float64():
    action, mean = tensors(3, 4, 5, 5)
    normal = torch.distributions.Normal(mean.double(), 0.37)
    torch.testing.assert_close(
        gaussian_logp(action, mean, 0.37).double(),
        normal.log_prob(action.double()).flatten(1).mean(1),
        rtol=0,
        atol=1e-5,
    )
    error = ((action.double() - mean.double()) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(squared_error_logp(action, mean).double(), -error, rtol=0, atol=1e-6)


def test_auto_is_the_published_convention_of_each_step():
    action, mean = tensors(2, 6)
    assert torch.equal(step_logp(action, mean, 0.5, "auto", "cps"), squared_error_logp(action, mean))
    assert torch.equal(step_logp(action, mean, 0.5, "gaussian", "cps"), gaussian_logp(action, mean, 0.5))
    assert torch.equal(step_logp(action, mean, 0.5, "auto", "flow_sde"), gaussian_logp(action, mean, 0.5))


def test_exact_kl_is_its_definition():
    mean, other = (t.double() for t in tensors(2, 7))
    p, q = torch.distributions.Normal(mean, 0.3), torch.distributions.Normal(other, 0.3)
    expected = torch.distributions.kl_divergence(p, q).mean(1)
    std = torch.full((2, 1), 0.3, dtype=torch.float64)
    torch.testing.assert_close(losses.gaussian_kl(mean[:, None], other[:, None], std)[:, 0], expected)
    torch.testing.assert_close(losses.gaussian_kl(other[:, None], mean[:, None], std)[:, 0], expected)
    draws = p.sample((20000,))
    sampled = (p.log_prob(draws) - q.log_prob(draws)).mean((0, 2))
    torch.testing.assert_close(sampled, expected, rtol=0.05, atol=0.05)


def run_gaussian(kind: str, level: float, steps: int, mean: float, std: float, count: int) -> dict[float, torch.Tensor]:
    """Sample data ~ N(mean, std^2) with the exact velocity of that problem; states by sigma."""
    g = generator(7, kind, steps)
    sigmas = [1 - i / steps for i in range(steps)] + [0.0]
    x = torch.randn(count, generator=g, dtype=torch.float64)
    states = {}
    for i in range(steps):
        s = sigmas[i]
        variance = ((1 - s) * std) ** 2 + s**2
        centred = x - (1 - s) * mean
        x0hat = mean + (1 - s) * std**2 / variance * centred
        x1hat = s / variance * centred
        c = flow_coefficients(kind, s, sigmas[i + 1], level, sigmas[1], i == 0)
        x = step_mean(x0hat, x1hat, c) + c.C * torch.randn(count, generator=g, dtype=torch.float64)
        states[sigmas[i + 1]] = x
    return states


@pytest.mark.parametrize(("kind", "level"), [("flow_sde", 0.7), ("dance", 0.3), ("wan", 0.0)])
def test_sdes_keep_the_marginals_of_the_ode(kind, level):
    """Data N(0.8, 0.5^2): at every sigma the state must be N(0.8 (1-s), ((1-s) 0.5)^2 + s^2)."""
    mean, std, steps = 0.8, 0.5, 400
    states = run_gaussian(kind, level, steps, mean, std, 20000)
    for at in (0.75, 0.5, 0.25, 0.0):
        x = states[min(states, key=lambda s: abs(s - at))]
        expected = math.sqrt(((1 - at) * std) ** 2 + at**2)
        assert x.mean().item() == pytest.approx((1 - at) * mean, abs=0.03)
        assert x.std().item() == pytest.approx(expected, rel=0.03)


def test_cps_keeps_the_variance_that_interpolation_prescribes():
    """Fresh noise replaces part of the noise estimate, so that B^2 + C^2 is the square of the next sigma."""
    for s, s_next in itertools.pairwise(SIGMAS):
        c = flow_coefficients("cps", s, s_next, 0.8, SIGMAS[1])
        assert pytest.approx(s_next**2) == c.B**2 + c.C**2
        assert pytest.approx(1 - s_next) == c.A
