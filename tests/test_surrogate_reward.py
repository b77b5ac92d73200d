"""TDM-R1: a surrogate with a gradient for a reward without one, in closed form and on a tiny Stable Diffusion 3."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gaussian_flow import GaussianFlow, Trace, context, gradients, train
from table_policy import resumes_bit_exactly
from test_forward_process import flow_config
from training import training_step
from zoo import ZOO

from mmrl.algorithms.base import Context
from mmrl.algorithms.companion import Companion
from mmrl.algorithms.surrogate_reward import SurrogateReward
from mmrl.data import PromptSampler
from mmrl.forward_losses import distribution_matching_loss
from mmrl.scoring import Scorer
from mmrl.seeding import generator
from mmrl.tally import Clock, Tally
from mmrl.types import Denoising, Prompt, Rollout, Samples
from pipelines import DiffusionPolicy, LoRA
from pipelines.scheduler_seam import DiffusionGrid
from pipelines.step_kernel import diffusion_endpoints

HERE = Path(__file__).resolve()


class FewStep(GaussianFlow):
    """Its sampler is exact, so that every estimate on the way to an output is the output."""

    verbs = GaussianFlow.verbs | {"chain"}
    num_steps = 2

    def chain(self, prompts, seeds, chain, source=None):
        noise = torch.cat([torch.randn(1, generator=generator(seed, "start")) for seed in seeds])[:, None]
        with torch.set_grad_enabled(chain.grad_steps > 0):
            x0 = self.mean + self.std * noise
        group, none = torch.arange(len(x0)), torch.zeros(len(x0), 0)
        images = x0.detach()[:, :, None, None] if chain.decode else None
        return Rollout(Samples(list(prompts), images=images, group=group), none, none.bool(), group, Trace(x0))

    def noised(self, samples, seeds):
        with torch.no_grad():
            at = self.denoise(samples, seeds)
        noise, time = at.target + samples.trace.x0.detach(), at.time[:, None]
        x0 = samples.trace.x0
        return Denoising(noise - x0, (1 - time) * x0 + time * noise, at.time, at.x0_scale)


def number(samples):
    """The number itself, as a list, through which no gradient flows."""
    return samples.images[:, 0, 0, 0].tolist()


def log_density(policy, x, time):
    return torch.distributions.Normal(
        (1 - time) * policy.mean, ((1 - time) ** 2 * policy.std**2 + time**2).sqrt()
    ).log_prob(x)


def test_the_loss_climbs_the_log_ratio_of_two_models():
    better, base = GaussianFlow(mean=1.0, std=0.5), GaussianFlow(mean=-0.5, std=1.5)
    x = torch.randn(64, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    time = torch.linspace(0.1, 0.9, 64)[:, None]
    ratio = log_density(better, x, time) - log_density(base, x, time)
    (climb,) = torch.autograd.grad(ratio.sum(), x)
    with torch.no_grad():
        found, wanted = base.velocity(x, time), better.velocity(x, time)
    now = Denoising(found + 2.0, x, time[:, 0], time[:, 0])
    (gradient,) = torch.autograd.grad(distribution_matching_loss(now, wanted - found, found).sum(), x)
    # A score is -(x + (1 - t) v) / t; estimates of the clean output are t^2 / (1 - t) times as far apart.
    torch.testing.assert_close(gradient, -(time**2 / (1 - time) * climb / (2.0 * time)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_clean_estimates_fall_with_the_prediction(prediction):
    """By ``x0_scale``, whatever is predicted; models to climb differ by that much."""
    levels = torch.linspace(0.99, 0.01, 10)
    grid = DiffusionGrid((0.5, 1.0), torch.tensor([5]), levels, prediction, None, 10)
    x, output = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    for time in (torch.tensor([0.3]), torch.tensor([0.8])):
        level = float(levels[grid.timesteps_at(time)])
        (before, _), (after, _) = (diffusion_endpoints(x, output + rise, level, prediction) for rise in (0.0, 0.1))
        torch.testing.assert_close(after, before - 0.1 * grid.x0_scale(time), rtol=1e-4, atol=1e-5)


def test_a_companion_is_a_model_with_an_adam_of_its_own():
    policy, other = GaussianFlow(mean=0.0), GaussianFlow(mean=0.0)
    companion, adam = Companion("beside", 0.1), torch.optim.Adam(list(other.parameters), lr=0.1)
    companion.start(policy.parameters)
    data = torch.linspace(-1, 3, 9)[:, None]
    for step in range(4):
        with companion.training(policy.parameters, step):
            (-policy.log_prob(data)).mean().backward()
        (-other.log_prob(data)).mean().backward()
        adam.step()
        adam.zero_grad()
        companion.start(policy.parameters)
    for name, parameter in other.parameters.named.items():
        assert torch.equal(policy.parameters.snapshots["beside"][name], parameter)
    assert policy.mean.item() == 0.0
    assert all(p.grad is None for p in policy.parameters)


def test_gradient_does_not_depend_on_micro_batches():
    found = [
        gradients(SurrogateReward(4, surrogate_lr=0.05), context(FewStep(), 3, number, micro_batch_size=size))
        for size in (4, 4096)
    ]
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_a_sampler_at_rest_stays_where_it_is():
    """Where its own model is the surrogate's, reward and KL are in balance."""
    lent = context(FewStep(), 2, number)
    algorithm = SurrogateReward(4)
    with torch.no_grad():
        rows = algorithm.collect(lent, lent.prompts.batch(0), 0)
    snapshots = lent.policy.parameters.snapshots
    for coefs, balanced in (((1.0, 1.0), True), ((2.0, 1.0), False)):
        algorithm.reward_coef, algorithm.kl_coef = coefs
        snapshots["surrogate"] = {"mean": torch.tensor([0.5]), "log_std": torch.tensor([0.0])}
        snapshots["tracker"] = snapshots["surrogate"]
        lent.policy.mean.grad = None
        (update,) = algorithm.updates(lent, rows, 0)
        for micro_batch in update.micro_batches:
            algorithm.loss(lent, micro_batch).backward()
        assert lent.policy.mean.grad.item() == 0.0 if balanced else lent.policy.mean.grad.item() < 0


def test_it_learns_from_a_reward_without_gradient_and_the_kl_holds_it():
    free, held = (
        train(
            SurrogateReward(16, surrogate_lr=0.02, tracker_lr=0.15, kl_coef=coef),
            context(FewStep(), reward=number),
            40,
            0.03,
        )
        for coef in (0.0, 4.0)
    )
    assert free[0] > 0.5
    assert 0 < held[0] < free[0] / 2
    # Without the KL the spread falls as well.
    assert abs(held[1] - 1) < abs(free[1] - 1)


def few_step_config(run_dir, algorithm):
    pipeline, rewards = {"type": f"{HERE}:FewStep"}, [{"type": f"{HERE}:number"}]
    return flow_config(run_dir, algorithm, pipeline=pipeline, rewards=rewards)


def test_resume_is_bit_exact_with_both_models(tmp_path):
    resumes_bit_exactly(tmp_path, {"type": "tdm_r1", "group_size": 4}, config=few_step_config)


@pytest.mark.parametrize(("name", "lora"), [("StableDiffusion3", None), ("StableDiffusion", LoRA(rank=4))])
def test_a_pipeline_learns_and_decodes_each_picture_once(name, lora):
    entry, unguided = ZOO[name](), {"guidance_scale": 1.0}
    policy = DiffusionPolicy(entry.pipe, num_steps=2, call={**entry.call, **unguided}, batch_size=8, lora=lora)
    if lora is None:
        policy.parameters.take_snapshot("reference")
    rows = [Prompt(text, id=text) for text in ("a red circle", "a blue square")]

    def brightness(samples):
        return samples.images.flatten(1).mean(1).tolist()

    def score():
        return torch.tensor(brightness(policy.generate(rows * 8, list(range(16))))).mean().item()

    lent = Context(policy, Scorer([brightness]), 7, 8, Clock(), Tally(), PromptSampler(rows, 2, shuffle=False))
    algorithm = SurrogateReward(4, surrogate_lr=5e-3, tracker_lr=5e-3)
    optimizer = torch.optim.Adam(list(policy.parameters), lr=2e-3)
    before = score()
    decoded = policy.counters["images_decoded"]
    training_step(algorithm, lent, optimizer, 0)
    assert policy.counters["images_decoded"] - decoded == 8
    for step in range(1, 6):
        training_step(algorithm, lent, optimizer, step)
    assert score() > before
