"""The initial noise as the policy (FIND): exact replay, the gradient in closed form, learning, files."""

from __future__ import annotations

import pytest
import torch
from table_policy import resumes_bit_exactly
from test_denoising_credit import brightness
from test_diffusion_policy import PROMPTS, nudge
from tiny_run import save_pipeline, tiny_config
from training import training_step
from zoo import ZOO

from mmrl import Prompt, UserError, losses
from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import Experience
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.data import PromptSampler
from mmrl.policy import Policy
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from pipelines.initial_noise import InitialNoise, InitialNoisePolicy


def noise_policy(name: str = "StableDiffusion3", **options) -> InitialNoisePolicy:
    entry = ZOO[name]()
    return InitialNoisePolicy(entry.pipe, **{"num_steps": 2, "rank": 4, "call": entry.call, "batch_size": 4, **options})


def context_of(policy, prompts=PROMPTS) -> Context:
    return Context(policy, Scorer([brightness]), 0, 8, Clock(), Tally(), PromptSampler(prompts, len(prompts)))


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "LTX"])
@pytest.mark.parametrize("learn_std", [False, True])
def test_the_draw_is_one_decision_that_replays_exactly(name, learn_std):
    policy = noise_policy(name, keep_mean=True, learn_std=learn_std)
    nudge(policy)
    rollout = policy.rollout(PROMPTS, 2, 1)
    assert isinstance(policy, Policy)
    assert rollout.logp.shape == (4, 1)
    before = policy.counters["network_forwards"]
    replay = policy.decisions(rollout)
    assert policy.counters["network_forwards"] == before
    assert torch.equal(replay.logp, rollout.logp)
    assert torch.equal(replay.mean, rollout.mean)
    assert (rollout.std[0] == 1) == (not learn_std)
    normal = torch.distributions.Normal(replay.mean, replay.std.view(-1, *[1] * (replay.mean.ndim - 1)))
    expected = normal.log_prob(replay.action).flatten(2).mean(2)
    torch.testing.assert_close(replay.logp, expected)
    # One prompt's distribution is its own.
    assert torch.equal(replay.mean[0], replay.mean[1])
    assert not torch.equal(replay.mean[0], replay.mean[2])
    replay.logp.sum().backward()
    assert all(parameter.grad.any() for parameter in policy.parameters)
    networks = [part for part in policy.pipe.components.values() if isinstance(part, torch.nn.Module)]
    assert not any(parameter.requires_grad for part in networks for parameter in part.parameters())


def test_untrained_noise_is_the_pipelines_own_and_training_moves_evaluation():
    policy = noise_policy()
    start = policy.generate(PROMPTS, [1, 2]).images
    assert torch.equal(policy.initial_states(PROMPTS, [1, 2]), policy.start(PROMPTS, [1, 2]))
    nudge(policy)
    trained = policy.generate(PROMPTS, [1, 2]).images
    assert not torch.equal(trained, start)
    with policy.reference():
        assert torch.equal(policy.generate(PROMPTS, [1, 2]).images, start)
    pair = policy.initial_states(PROMPTS, [1, 2])
    assert torch.equal(policy.initial_states(PROMPTS[1:], [2])[0], pair[1])


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_gradient_leads_to_the_tilted_distribution(beta):
    """For reward ``w x_T`` the optimum of reward less ``beta`` KL to N(0, 1) is N(w / beta, 1)."""
    policy = noise_policy(num_steps=1, batch_size=64)
    prompts = [Prompt("one", id="one")]
    row = policy.noise.mean.shape[1:]
    w = torch.randn(row, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        policy.noise.mean[0] = w / beta
    rollout = policy.rollout(prompts, 64, 0)
    x = rollout.trace.states[:, 0]
    reward = (w * x).flatten(1).sum(1)
    advantage = (reward - reward.mean()) * 64 / 63
    algorithm = PolicyGradient(group_size=64, objective="reinforce", kl_coef=beta)
    experience = Experience(rollout, advantage[:, None], rollout.mask)
    lent = context_of(policy, prompts)
    lent.micro_batch_size = 64
    for update in algorithm.updates(lent, experience, 0):
        for micro_batch in update.micro_batches:
            algorithm.loss(lent, micro_batch).backward()
    score = advantage.view(-1, 1, 1, 1) * (x - w / beta)
    expected = (beta * w / beta - score.mean(0)) / w.numel()
    torch.testing.assert_close(policy.noise.mean.grad[0], expected, rtol=1e-4, atol=1e-6)
    # On average the two terms cancel here: 64 draws show it along w, where reward pulls with |w|^2.
    assert abs((score.mean(0) * w).sum() / w.square().sum() - 1) < 0.4


def test_the_kl_of_unequal_stds_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean, other = torch.randn(2, 3, 1, 5, generator=generator)
    std, other_std = torch.rand(2, 3, 1, generator=generator) + 0.5
    normals = [torch.distributions.Normal(m, s[..., None]) for m, s in ((mean, std), (other, other_std))]
    expected = torch.distributions.kl_divergence(*normals).mean(2)
    torch.testing.assert_close(losses.gaussian_kl(mean, other, std, other_std), expected)
    assert torch.equal(losses.gaussian_kl(mean, other, std, std), losses.gaussian_kl(mean, other, std))


def test_pictures_get_brighter_with_the_network_as_it_was():
    policy = noise_policy(learn_std=True, batch_size=16)
    network = {name: tensor.clone() for name, tensor in policy.pipe.transformer.state_dict().items()}
    algorithm = PolicyGradient(group_size=8, kl_coef=1e-3)
    context = context_of(policy)
    optimizer = torch.optim.Adam(list(policy.parameters), lr=2e-2)

    def held_out() -> torch.Tensor:
        return brightness(policy.generate(PROMPTS * 4, range(8))).mean()

    start = held_out()
    for step in range(10):
        training_step(algorithm, context, optimizer, step)
    assert held_out() > start + 0.004
    assert context.tally.result()["ratio/max_abs_dev"] == 0.0
    assert context.tally.result()["kl"] > 0
    assert all(torch.equal(tensor, network[name]) for name, tensor in policy.pipe.transformer.state_dict().items())


def test_a_run_resumes_bit_for_bit_and_its_export_loads(tmp_path):
    model = save_pipeline(tmp_path / "sd3")

    def config(run_dir, algorithm):
        trainer = {"steps": 4, "save_every": 2, "eval_every": 0}
        found = tiny_config(model, run_dir, algorithm=algorithm, trainer=trainer)
        found["pipeline"] |= {"type": "initial_noise", "num_steps": 2, "rank": 4}
        return found

    resumes_bit_exactly(tmp_path, {"type": "grpo", "kl_coef": 0.01}, config)
    weights = tmp_path / "straight" / "model" / "initial_noise.safetensors"
    assert [file.name for file in weights.parent.iterdir()] == [weights.name]
    call = tiny_config(model, tmp_path)["pipeline"]["call"]
    assert noise_policy(weights=str(weights), call=call).noise.mean.any()
    with pytest.raises(UserError, match="was learned with another pipeline, call, rank or learn_std"):
        noise_policy(weights=str(weights), call=call, rank=3)
    with pytest.raises(UserError, match="is no file"):
        InitialNoisePolicy.validate(weights=str(tmp_path / "none"))


def test_without_text_and_with_other_sizes():
    noise = InitialNoise((2, 3, 3), 0, 8, True)
    mean, std = noise(torch.zeros(0))
    assert mean.shape == (2, 3, 3)
    assert std == 1
    policy = noise_policy()
    with pytest.raises(UserError, match="but initial noise is learned for"):
        policy.rollout([Prompt("tall", inputs={"height": 32})], 2, 0)
