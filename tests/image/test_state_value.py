"""A value head on the states of a sampler: PPO on pictures and clips."""

from __future__ import annotations

import diffusers
import pytest
import torch
from table_policy import resumes_bit_exactly
from test_denoising_credit import brightness
from test_diffusion_policy import PROMPTS, make, nudge
from tiny_run import save_pipeline, tiny_config
from training import training_step

from mmrl import UserError
from mmrl.algorithms.base import Context
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.algorithms.regularisers import ValueHead
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from pipelines.branching import Branching
from pipelines.state_value import StateValue

PPO = {"advantage": "gae", "group_size": 8, "whiten": True, "clip_range": 1e-2}


def context_of(policy) -> Context:
    return Context(policy, Scorer([brightness]), 0, 8, Clock(), Tally(), PromptSampler(PROMPTS, 2))


@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "LTX"])
def test_values_replay_exactly_and_their_gradient_stays_in_the_head(name):
    policy = make(name, num_steps=3, value_head=True)
    nudge(policy)
    rollout = policy.rollout(PROMPTS, 2, 1)
    assert "values" in policy.verbs
    assert rollout.value.shape == rollout.logp.shape == (4, 2)
    assert len(rollout.value.unique()) == 8
    for steps in ([0], [1], None):
        columns = [0, 1] if steps is None else steps
        found = policy.decisions(rollout, steps)
        assert torch.equal(found.value, rollout.value[:, columns])
        assert torch.equal(found.logp, rollout.logp[:, columns])
    found.value.sum().backward()
    reached = {name for name, p in policy.parameters.named.items() if p.grad is not None and p.grad.any()}
    assert reached == {name for name in policy.parameters.named if name.startswith("value.")}


def test_values_read_state_estimate_time_and_text():
    torch.manual_seed(0)
    value = StateValue((4, 6, 8), 5)
    torch.nn.init.normal_(value.head[-1].weight)
    text, x, x0hat = torch.randn(2, 5), torch.randn(2, 4, 6, 8), torch.randn(2, 4, 6, 8)
    start = value(text, x, x0hat, 0.5)
    for other in ((text + torch.randn(5), x, x0hat, 0.5), (text, -x, x0hat, 0.5), (text, x, -x0hat, 0.5)):
        assert (value(*other) - start).abs().min() > 1e-3
    assert (value(text, x, x0hat, 0.9) - start).abs().min() > 1e-3
    # Where a thing is matters, how large the latents are does not.
    assert (value(text, x.flip(3), x0hat.flip(3), 0.5) - start).abs().min() > 1e-4
    assert value(text, x[..., :4], x0hat[..., :4], 0.5).shape == (2,)


def test_a_critic_learns_what_the_clean_estimate_shows():
    torch.manual_seed(0)
    value = StateValue((4, 4, 4), 3)
    text, x, x0hat = torch.randn(64, 3), torch.randn(64, 4, 4, 4), torch.randn(64, 4, 4, 4)
    reward = x0hat[:, 0].mean((1, 2)) + 0.1 * text[:, 1]
    assert not value(text, x, x0hat, 0.3).any()
    optimizer = torch.optim.Adam(value.parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        error = (value(text, x, x0hat, 0.3) - reward).square().mean()
        error.backward()
        optimizer.step()
    assert error < 0.1 * reward.var()


def test_ppo_makes_pictures_brighter():
    policy = make(num_steps=5, guidance=1.0, lora=None, batch_size=8, value_head=True, value_lr_scale=3.0)
    assert [group["scale"] for group in policy.parameters.groups()] == [1.0, 3.0]
    algorithm = PolicyGradient(**PPO, advantage_clip=3.0, value=ValueHead(warmup=1))
    context = context_of(policy)
    optimizer = torch.optim.Adam(list(policy.parameters), lr=3e-3)

    def held_out() -> torch.Tensor:
        return brightness(policy.generate(PROMPTS * 2, [1, 2, 3, 4])).mean()

    start = held_out()
    for step in range(5):
        training_step(algorithm, context, optimizer, step)
        if step < 1:
            assert held_out() == start
    assert held_out() > start + 0.004
    assert context.tally.result()["ratio/max_abs_dev"] == 0.0


def test_a_run_resumes_bit_for_bit_and_exports_what_diffusers_loads(tmp_path):
    model = save_pipeline(tmp_path / "sd3")

    def config(run_dir, algorithm):
        lora = {"lora": {"rank": 2}, "value_head": True, "num_steps": 3}
        trainer = {"steps": 4, "save_every": 2, "eval_every": 0}
        return tiny_config(model, run_dir, pipeline=lora, algorithm=algorithm, trainer=trainer)

    resumes_bit_exactly(tmp_path, {"type": "ppo", "value": {"warmup": 1}}, config)
    found = [file.name for file in (tmp_path / "straight" / "model").iterdir()]
    assert found == ["pytorch_lora_weights.safetensors"]
    diffusers.StableDiffusion3Pipeline.from_pretrained(model).load_lora_weights(tmp_path / "straight" / "model")


def test_what_does_not_go_together_is_refused(tmp_path):
    config = tiny_config(save_pipeline(tmp_path / "sd3"), tmp_path / "run")
    config["algorithm"] = {"type": "ppo"}
    with pytest.raises(UserError, match=r"pipeline\.value_head: true"):
        parse_config(config)
    config["pipeline"]["value_head"] = True
    parse_config(config)
    with pytest.raises(UserError, match="leave out branching"):
        make(value_head=True, branching=Branching(at="first"))
