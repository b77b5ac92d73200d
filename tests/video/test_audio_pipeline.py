"""A text-to-audio flow pipeline goes through the same seam; its reward is exact."""

from __future__ import annotations

import json
import math
import wave

import pytest
import torch
from zoo.audio import longcat_audio

from mmrl.errors import UserError
from mmrl.evaluation import Evaluation
from mmrl.scoring import Scorer
from mmrl.types import Chain, Prompt, Samples
from pipelines import DiffusionPolicy
from rewards import load_reward

PROMPTS = [Prompt("a dog barks twice", id="0"), Prompt("rain", id="1")]


@pytest.fixture(scope="module")
def policy():
    entry = longcat_audio()
    return DiffusionPolicy(entry.pipe, num_steps=4, call=entry.call, batch_size=4)


def test_waveforms_replay_exactly(policy):
    rollout = policy.rollout(PROMPTS, group_size=2, seed=7)
    audios = rollout.samples.audios
    assert audios.shape == (4, 1, 256)
    assert rollout.samples.sample_rate.tolist() == [800] * 4
    assert (audios[0] - audios[1]).abs().max() > 1e-2
    logp = policy.decisions(rollout).logp
    assert torch.equal(logp.detach(), rollout.logp)
    error = policy.fit(rollout, seeds=[1, 2, 3, 4])
    for value in (logp.sum(), error.sum()):
        gradients = torch.autograd.grad(value, list(policy.parameters), allow_unused=True)
        assert sum(float(g.norm()) for g in gradients if g is not None) > 0


def test_an_evaluation_writes_sound_files(policy, tmp_path):
    Evaluation(PROMPTS, 1, 0, Scorer([load_reward("loudness")]))(policy, 0, tmp_path)
    assert [row["file"] for row in json.loads((tmp_path / "scores.json").read_text())] == ["000-0.wav", "001-0.wav"]
    with wave.open(str(tmp_path / "000-0.wav")) as file:
        assert (file.getframerate(), file.getnframes()) == (800, 256)


def test_backprop_makes_it_louder():
    """A few steps of DRaFT-1 on one sound."""
    entry = longcat_audio()
    policy = DiffusionPolicy(entry.pipe, num_steps=3, call=entry.call)
    optimiser = torch.optim.Adam(list(policy.parameters), lr=3e-3)
    loudness, levels = load_reward("loudness"), []
    for _ in range(4):
        level = loudness(policy.chain(PROMPTS[:1], [1], Chain(0, 3, 1)).samples).mean()
        optimiser.zero_grad()
        (-level).backward()
        optimiser.step()
        levels.append(level.item())
    assert levels[-1] > levels[0] + 0.1


def test_loudness_is_the_level_of_the_waveform():
    time = torch.arange(800) / 800
    tones = torch.stack([a * torch.sin(2 * math.pi * 20 * time) for a in (1.0, 0.1)])[:, None]
    samples = Samples(PROMPTS, audios=tones)
    torch.testing.assert_close(load_reward("loudness")(samples), torch.tensor([-3.0103, -23.0103]), atol=1e-3, rtol=0)
    near = load_reward("loudness", target=-23.0)(samples)
    torch.testing.assert_close(near, torch.tensor([-19.9897, -0.0103]), atol=1e-3, rtol=0)
    silent = Samples(PROMPTS[:1], audios=torch.zeros(1, 2, 8))
    assert load_reward("loudness")(silent).item() == pytest.approx(-100)
    with pytest.raises(UserError, match="scores audios"):
        load_reward("loudness")(Samples(PROMPTS, images=torch.zeros(2, 3, 4, 4)))
