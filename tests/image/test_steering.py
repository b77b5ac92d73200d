"""Rollouts that rewards steer (Euphonium): against formulas worked out by hand on a tiny Stable Diffusion 3."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from table_policy import resumes_bit_exactly
from test_diffusion_policy import PROMPTS, make
from tiny_run import save_pipeline, tiny_config
from training import training_step

from mmrl import UserError
from mmrl.advantages import group_advantages
from mmrl.algorithms.base import Context
from mmrl.algorithms.credit import Credit
from mmrl.algorithms.distillation import Distillation, PredictionDistillation
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.data import PromptSampler
from mmrl.scoring import Scorer, Scores
from mmrl.tally import Clock, Tally
from pipelines.steering import Steering
from rewards.pixels import luma

BRIGHT = [{"type": "pixels", "measure": "brightness"}]


def steered(scale: float, begin: int = 0, name: str = "StableDiffusion3", **options):
    steering = Steering(BRIGHT, scale, begin)
    return make(name, 1.0, steering=steering, keep_mean=True, keep_states="all", **options)


def brightness(samples):
    return luma(samples.images).mean((1, 2))


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion"])
def test_scale_0_is_the_plain_rollout_bit_for_bit(name):
    plain = make(name, 1.0, keep_states="all").rollout(PROMPTS, 2, seed=1)
    found = steered(0.0, begin=1, name=name).rollout(PROMPTS, 2, seed=1)
    assert torch.equal(found.samples.images, plain.samples.images)
    assert torch.equal(found.trace.states, plain.trace.states)
    assert torch.equal(found.logp, plain.logp)
    assert torch.equal(found.aim, found.mean)


def test_means_move_by_the_variance_times_the_gradient():
    policy = steered(30.0, begin=1)
    found = policy.rollout(PROMPTS, 2, seed=1)
    assert torch.equal(policy.decisions(found).logp, found.logp)
    assert torch.equal(found.aim[:, 0], found.mean[:, 0])
    assert found.process[:, 0].isnan().all()
    for column in (1, 2):
        x = found.trace.at(column).clone().requires_grad_()
        states = found.trace.states.clone()
        states[:, column] = x
        moved = replace(found, trace=replace(found.trace, states=states))
        score = brightness(policy.jump_to_x0(moved, column))
        (climb,) = torch.autograd.grad(score.sum(), x)
        std = found.std[0, column].double()
        expected = (30.0 * std**2).float() * climb
        torch.testing.assert_close(found.aim[:, column] - found.mean[:, column], expected, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(found.process[:, column], score.detach(), rtol=1e-4, atol=1e-6)
    # Noise is the plain rollout's: the first step, which is not steered, arrives at the same state.
    plain = make("StableDiffusion3", 1.0, keep_states="all").rollout(PROMPTS, 2, seed=1)
    assert torch.equal(found.trace.at(1), plain.trace.at(1))
    assert found.samples.images.mean() > plain.samples.images.mean()


def test_process_rewards_are_compared_column_by_column():
    policy = steered(1.0, begin=1)
    rollout = policy.rollout(PROMPTS, 4, seed=2)
    total = brightness(rollout.samples)
    scores = Scores(total, total[:, None], torch.ones(1), {}, {})
    plain, both = (
        Credit("group", None, False, 1.0, 0.95, (0.0, 0.0), (1.0, 1.0), None, coef)(scores, rollout, rollout.mask)[0]
        for coef in (0.0, 0.5)
    )
    assert torch.equal(both[:, 0], plain[:, 0])
    for column in (1, 2):
        earned = group_advantages(rollout.process[:, column], rollout.group)
        torch.testing.assert_close(both[:, column] - plain[:, column], 0.5 * earned)


LEARNERS = {"distill": Distillation("steering", 4), "grpo": PolicyGradient(4, process_coef=1.0)}


@pytest.mark.parametrize("algorithm", LEARNERS.values(), ids=LEARNERS.keys())
def test_what_steering_finds_is_learnt_for_sampling_without_it(algorithm):
    policy = steered(300.0, num_steps=3, lora=None, batch_size=8)

    def score():
        return brightness(policy.generate(PROMPTS * 4, list(range(8)))).mean().item()

    sampler = PromptSampler(PROMPTS, 2, shuffle=False)
    context = Context(policy, Scorer([brightness]), 7, 8, Clock(), Tally(), sampler)
    optimizer = torch.optim.Adam(list(policy.parameters), lr=2e-3)
    before = score()
    for step in range(4):
        training_step(algorithm, context, optimizer, step)
    assert score() > before


def test_a_run_resumes_bit_for_bit(tmp_path):
    model = save_pipeline(tmp_path / "model")

    def config(run_dir, algorithm):
        trainer = {"steps": 2, "save_every": 1, "eval_every": 0}
        steering = {"rewards": BRIGHT, "scale": 10.0, "begin": 1}
        return tiny_config(model, run_dir, algorithm=algorithm, pipeline={"steering": steering}, trainer=trainer)

    resumes_bit_exactly(tmp_path, {"process_coef": 1.0, "group_size": 2}, config=config)


def test_what_cannot_be_steered_is_refused():
    with pytest.raises(UserError, match="step: ode has not"):
        make(steering=Steering(BRIGHT), step="ode")
    with pytest.raises(UserError, match="gradients do not flow"):
        make(steering=Steering([{"type": "jpeg"}]))
    with pytest.raises(UserError, match="there is no reward 'pixel'"):
        make(steering=Steering([{"type": "pixel"}]))
    with pytest.raises(UserError, match="use distill"):
        PredictionDistillation("steering")
    policy = make()
    sampler = PromptSampler(PROMPTS, 2, shuffle=False)
    context = Context(policy, Scorer([brightness]), 7, 8, Clock(), Tally(), sampler)
    with pytest.raises(UserError, match="where pipeline"):
        PolicyGradient(process_coef=1.0).collect(context, PROMPTS, 0)
