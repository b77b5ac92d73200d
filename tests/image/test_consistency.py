"""Latent consistency models: steps against diffusers' own scheduler, then a tiny pipeline as a policy."""

from __future__ import annotations

import pytest
import torch
from test_diffusion_policy import PROMPTS, nudge
from zoo import EXTRA

from mmrl import UserError
from pipelines import DiffusionPolicy
from pipelines.scheduler_seam import Kernel, base_scheduler, make_grid
from pipelines.step_kernel import step_mean


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_steps_are_those_of_the_lcm_scheduler(prediction):
    from diffusers import LCMScheduler

    theirs = LCMScheduler(prediction_type=prediction)
    base = base_scheduler(theirs, "some")
    for scheduler in (theirs, base):
        scheduler.set_timesteps(4)
    grid = make_grid(base, None)
    assert len(grid) == 4
    draw = torch.Generator().manual_seed(0)
    for index, timestep in enumerate(theirs.timesteps):
        x, output = torch.randn(2, 1, 4, 8, 8, generator=draw)
        previous, clean = theirs.step(output, timestep, x, torch.Generator().manual_seed(index), return_dict=False)
        endpoints = grid.endpoints(index, x, output)
        torch.testing.assert_close(endpoints[0], clean, rtol=1e-4, atol=1e-5)
        c = grid.coefficients(index, Kernel("cps", 1.0), stochastic=index < 3)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(index))
        torch.testing.assert_close(step_mean(*endpoints, c) + c.C * noise, previous, rtol=1e-4, atol=1e-5)


def test_between_the_estimate_and_fresh_noise_the_variance_is_kept():
    from diffusers import DDIMScheduler

    base = base_scheduler(DDIMScheduler(clip_sample=False), "some")
    base.set_timesteps(4)
    grid = make_grid(base, None)
    for index in range(3):
        c = grid.coefficients(index, Kernel("cps", 0.6), stochastic=True)
        assert pytest.approx(1 - grid.alphas[index + 1]) == c.B**2 + c.C**2
        still, ddim = (grid.coefficients(index, Kernel(step, 0.6), stochastic=False) for step in ("cps", "ddim"))
        assert pytest.approx((ddim.A, ddim.B, 0.0)) == (still.A, still.B, still.C)


def test_a_consistency_model_is_a_policy():
    entry = EXTRA["LatentConsistency"]()
    options = {"num_steps": 4, "step": "cps", "noise_level": 1.0, "log_prob": "gaussian", "batch_size": 4}
    policy = DiffusionPolicy(entry.pipe, call=entry.call, **options)
    nudge(policy, 0.01)
    rollout = policy.rollout(PROMPTS, 2, seed=1)
    assert rollout.logp.shape == (4, 3)
    replay = policy.decisions(rollout)
    assert torch.equal(replay.logp, rollout.logp)
    replay.logp.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters)
    pictures = policy.generate(PROMPTS, [1, 2]).images
    torch.testing.assert_close(policy.generate(PROMPTS[1:], [2]).images, pictures[1:], rtol=0, atol=1e-4)
    assert (policy.generate(PROMPTS, [1, 3]).images[1] - pictures[1]).abs().max() > 1e-3
    # The last step is the model's estimate, as its own pipeline decodes it.
    last = policy.complete(rollout, 2)
    assert last.images.shape == rollout.samples.images.shape


def test_steps_of_flows_are_refused():
    entry = EXTRA["LatentConsistency"]()
    with pytest.raises(UserError, match="use ddim, cps or ode"):
        DiffusionPolicy(entry.pipe, call=entry.call, step="dance")
