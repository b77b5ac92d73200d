"""Memory of a training step on a video pipeline does not grow with the number of denoising steps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from zoo import EXTRA, ZOO

from mmrl.types import Prompt
from pipelines import DiffusionPolicy

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "video_memory.py"


@pytest.fixture(scope="module")
def peaks():
    """Peak bytes by method and number of steps."""
    benchmark = runpy.run_path(str(BENCHMARK))
    benchmark["CALL"].update(height=16, width=16, num_frames=5)
    return {name: {count: benchmark["measure"](name, count) for count in (2, 6)} for name in benchmark["STEPS"]}


@pytest.mark.parametrize("name", ["Flow-GRPO, window of 1", "DRaFT-1"])
def test_one_step_with_gradient_needs_the_same_memory_in_any_sampler(name, peaks):
    assert peaks[name][6] <= 1.02 * peaks[name][2]


def test_the_measure_sees_memory_that_grows(peaks):
    assert peaks["DRaFT, all steps"][6] > 1.5 * peaks["DRaFT, all steps"][2]


def test_offloaded_states_replay_exactly():
    entry = ZOO["Wan"]()
    policy = DiffusionPolicy(entry.pipe, num_steps=3, call=entry.call, batch_size=4, offload_states=True)
    rollout = policy.rollout([Prompt("a"), Prompt("b")], group_size=2, seed=3)
    assert rollout.trace.states.device.type == "cpu"
    assert torch.equal(policy.decisions(rollout).logp.detach(), rollout.logp)


@pytest.mark.parametrize("name", ["LTX", "HunyuanVideo", "Mochi", "CogVideoX", "Wan"])
def test_clips_are_decoded_in_parts(name):
    """Tiles of the tiny clips are larger than the clips, so what is decoded in parts is what is decoded at once."""
    clips = []
    for tiled in (False, True):
        entry = {**ZOO, **EXTRA}[name]()
        policy = DiffusionPolicy(entry.pipe, num_steps=2, call=entry.call, vae_tiling=tiled)
        clips.append(policy.generate([Prompt("a"), Prompt("b")], seeds=[1, 2]).videos)
        assert entry.pipe.vae.use_slicing == tiled
        assert getattr(entry.pipe.vae, "use_framewise_decoding", True) or not tiled
    torch.testing.assert_close(*clips, atol=2e-5, rtol=0)
