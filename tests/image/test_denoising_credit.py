"""Credit for denoising steps: weights and advantages worked out by hand, then on a tiny Stable Diffusion 3."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_diffusion_policy import PROMPTS, make
from training import training_step

from mmrl import UserError
from mmrl.advantages import extremes, group_advantages
from mmrl.algorithms.base import Context
from mmrl.algorithms.credit import Credit
from mmrl.algorithms.denoising_credit import (
    NoiseCalibration,
    branch_advantages,
    column_advantages,
    noise_weights,
    reward_gains,
)
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.plan import step_cost
from mmrl.scoring import Scorer, Scores
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt, Rollout, Samples
from pipelines.branching import Branching
from pipelines.windows import noise_levels

GROUP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
# Each group is a tree: one decision, which all share, then two, then one of its own for every sample.
BRANCH = torch.tensor([[9, 5, 1], [9, 5, 2], [9, 6, 3], [9, 6, 4], [8, 7, 5], [8, 7, 6], [8, 4, 7], [8, 4, 8]])
SCORES = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.0, 3.0, 5.0, torch.nan])


def rollout_of(**fields) -> Rollout:
    samples = Samples([Prompt("p")] * 8, images=torch.zeros(8, 3, 2, 2), group=GROUP)
    return Rollout(samples, torch.zeros(8, 3), torch.ones(8, 3, dtype=torch.bool), GROUP, **fields)


def test_noise_weights_are_those_of_tempflow():
    # The std of the nine steps of Flow-GRPO's sampler of SD3.5: ten steps, shift 3, noise level 0.7.
    std = torch.tensor([0.70, 0.74, 0.53, 0.44, 0.39, 0.35, 0.32, 0.29, 0.26])
    mask = torch.ones(8, 9, dtype=torch.bool)
    found = noise_weights(rollout_of(std=std.expand(8, 9)), mask)
    torch.testing.assert_close(found[0], 2.25 * std, rtol=0.01, atol=0)
    torch.testing.assert_close(found.mean(), torch.tensor(1.0))
    with pytest.raises(UserError, match="'noise' needs a policy"):
        noise_weights(rollout_of(), mask)


def test_a_shared_decision_is_worth_the_mean_of_its_samples_and_is_compared_once():
    found = branch_advantages(SCORES, GROUP, BRANCH, torch.ones(8, 3, dtype=torch.bool))
    assert found[:, 0].tolist() == [0] * 8
    pair = 0.5**0.5  # two values one unbiased standard deviation apart
    values = torch.tensor([3.0, 1.0, 1.5, 5.0])
    spread = torch.tensor([2.0, 2.0, 3.5, 3.5])
    expected = (values - torch.tensor([2.0, 2.0, 3.25, 3.25])) / (spread * pair + 1e-4)
    torch.testing.assert_close(found[:, 1], expected[[0, 0, 1, 1, 2, 2, 3, 3]] * ~SCORES.isnan())
    torch.testing.assert_close(found[:, 2], group_advantages(SCORES, GROUP))


def test_a_node_with_many_samples_weighs_no_more_than_one_with_few():
    branch, group = torch.tensor([[1], [1], [1], [2]]), torch.zeros(4, dtype=torch.long)
    found = branch_advantages(torch.tensor([1.0, 1.0, 1.0, 0.0]), group, branch, torch.ones(4, 1, dtype=torch.bool))
    torch.testing.assert_close(found[:, 0], torch.tensor([1.0, 1.0, 1.0, -1.0]) * 0.5**0.5, rtol=1e-3, atol=0)


def test_gains_telescope():
    before = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    gains = reward_gains(before, SCORES)
    torch.testing.assert_close(gains.sum(1)[:7], (SCORES - before[:, 0])[:7])
    assert gains[:7, 0].tolist() == (before[:, 1] - before[:, 0])[:7].tolist()


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_gain_compares_each_step_with_the_same_step_of_the_group(gamma):
    before = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    scores = Scores(SCORES, SCORES[:, None], torch.ones(1), {}, {})
    credit = Credit("gain", None, False, gamma, 0.95, (0.0, 0.0), (1.0, 1.0))
    rollout = rollout_of()
    found, returns = credit(scores, rollout, rollout.mask, before=before)
    assert returns is None
    # Undiscounted, the gains to come are the score less the prospect; at 0 the step's own gain is left.
    after = torch.cat([before[:, 1:], SCORES[:, None]], 1) if gamma == 0 else SCORES[:, None].expand(8, 3)
    for column in range(3):
        gain = torch.where(SCORES.isnan(), torch.nan, after[:, column] - before[:, column])
        torch.testing.assert_close(found[:, column], group_advantages(gain, GROUP), rtol=1e-3, atol=1e-5)
    assert not found[7].any()


def test_masked_decisions_are_left_out_of_the_comparison():
    values = torch.tensor([[1.0], [2.0], [9.0], [3.0]])
    mask = torch.tensor([[True], [True], [False], [True]])
    found = column_advantages(values, torch.zeros(4, dtype=torch.long), mask)[:, 0]
    torch.testing.assert_close(found, torch.tensor([-1.0, 0.0, 0.0, 1.0]), rtol=1e-3, atol=1e-6)


def test_extremes_are_the_best_and_the_worst_of_a_group():
    assert extremes(SCORES, GROUP, 1).tolist() == [True, False, False, True, True, False, True, False]
    assert extremes(SCORES, GROUP, 2).tolist() == [True] * 7 + [False]
    scores = Scores(SCORES, SCORES[:, None], torch.ones(1), {}, {})
    rollout = rollout_of()
    plain, chosen = (
        Credit("group", 5.0, False, 1.0, 0.95, (0.0, 0.0), (1.0, 1.0), count)(scores, rollout, rollout.mask)[0]
        for count in (None, 1)
    )
    assert torch.equal(chosen, plain * extremes(SCORES, GROUP, 1)[:, None])


@pytest.mark.parametrize("advantage", ["gain", "tree"])
def test_options_that_make_no_sense_together_are_refused(advantage):
    with pytest.raises(UserError, match="no single reward"):
        PolicyGradient(advantage=advantage, kl_coef=0.1, kl_in="reward")
    with pytest.raises(UserError, match="group_size is 1"):
        PolicyGradient(advantage=advantage, group_size=1)


def test_noise_grows_where_gains_are_balanced_and_shrinks_elsewhere():
    options = {"calibrate_noise": NoiseCalibration(rate=0.1, bounds=(0.95, 4.0)), "advantage": "gain", "group_size": 2}
    algorithm = PolicyGradient(**options)
    policy = make(num_steps=3, guidance=1.0, noise_level=[0.5, 0.8])
    context = Context(policy, Scorer([brightness]), 0, 8, Clock(), Tally(), PromptSampler(PROMPTS, 2))
    experience = algorithm.collect(context, PROMPTS, 0)
    assert experience.rollout.trace.noise[0].tolist() == [0.5, 0.8]
    shares = [context.tally.result()[f"gain/positive/{column}"] for column in range(2)]
    scale = algorithm.state()["prospects"]["scale"]
    assert scale == [1.1 if share == 0.5 else 0.95 for share in shares]
    resumed = PolicyGradient(**options)
    resumed.load_state(algorithm.state())
    noise = resumed.collect(context, PROMPTS, 1).rollout.trace.noise
    assert noise[0].tolist() == pytest.approx([0.5 * scale[0], 0.8 * scale[1]])
    # Algorithms that know of no calibration have the noise of the config.
    plain = PolicyGradient(group_size=2).collect(context, PROMPTS, 2)
    assert plain.rollout.trace.noise[0].tolist() == [0.5, 0.8]
    with pytest.raises(UserError, match="calibrated for 2 decisions, but now there are 3"):
        noise_levels(0.5, [0, 1, 2], [1.0, 1.0])
    assert noise_levels(0.8, [0, 3], [1.5, 0.5], limit=1.0) == {0: 1.0, 3: 0.4}
    with pytest.raises(UserError, match="goes by the gains of steps"):
        PolicyGradient(calibrate_noise=NoiseCalibration())


@pytest.mark.parametrize(("completion", "each"), [("ode", 10 + 9 + 8 + 7 + 6 + 5 + 4 + 3 + 2), ("jump", 9)])
def test_the_plan_knows_what_completions_cost(completion, each):
    algorithm = {"type": "grpo", "advantage": "gain", "completion": completion, "group_size": 4}
    data = {"pipeline": {"type": "diffusion", "model": "some/model"}, "data": {"prompts": ["a", "b"], "batch_size": 2}}
    config = parse_config({**data, "rewards": ["jpeg"], "algorithm": algorithm})
    assert step_cost(config, config.stages[0])["completion forwards"] == 8 * each


def brightness(samples: Samples) -> torch.Tensor:
    return samples.images.mean((1, 2, 3))


METHODS = {
    "tempflow": (
        {"window": {"first": 3}, "branching": Branching(shape="fan")},
        {"step_weight": "noise", "group_size": 24},
    ),
    "densegrpo": ({"same_noise": True}, {"advantage": "gain", "gamma": 0.0}),
    "prospects": ({}, {"advantage": "gain", "completion": "jump"}),
    "branchgrpo": ({"branching": Branching(at=[0, 1, 2])}, {"advantage": "tree"}),
    "b2_diffurl": ({"window": {"backward": 2}, "branching": Branching(at="first", width=8)}, {"extremes": 2}),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_makes_pictures_brighter(name):
    options, chosen = METHODS[name]
    policy = make(num_steps=5, guidance=1.0, lora=None, batch_size=8, **options)
    algorithm = PolicyGradient(**{"group_size": 8, "clip_range": 1e-2, **chosen})
    sampler = PromptSampler([replace(prompt, id=str(k)) for k, prompt in enumerate(PROMPTS)], 2)
    context = Context(policy, Scorer([brightness]), 0, 8, Clock(), Tally(), sampler)
    optimizer = torch.optim.Adam(list(policy.parameters), lr=3e-3)

    def held_out() -> torch.Tensor:
        return brightness(policy.generate(PROMPTS * 2, [1, 2, 3, 4])).mean()

    start = held_out()
    for step in range(4):
        training_step(algorithm, context, optimizer, step)
    assert held_out() > start + 0.008
    result = context.tally.result()
    if chosen.get("advantage") == "gain":
        assert all(0 <= result[f"gain/positive/{column}"] <= 1 for column in range(4))
    # Samples without a lead are dropped from the batch that replays, and batch shapes change the last bits.
    assert result["ratio/max_abs_dev"] <= (1e-5 if "extremes" in chosen else 0.0)
