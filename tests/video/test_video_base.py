"""The video base model that is shipped: plain diffusers loads it, it is small, and it leaves room to improve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmrl.world.motion import FRAMES, PARTS, SIDE, all_targets, film, place, rows, vocabulary
from mmrl.world.motion_verify import marks_of, score
from pipelines.quickstart.making import build_t5_tokenizer
from pipelines.quickstart.video_base import MAX_TOKENS

FOLDER = Path(__file__).parents[2] / "pipelines" / "quickstart" / "wan-moving-shapes"


@pytest.fixture(scope="module")
def pipe():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_files_are_small_and_name_no_machine():
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 4e6
    assert sum(path.stat().st_size for path in files) < 6e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
    assert not [path for path in files if path.suffix == ".json" and "_name_or_path" in path.read_text()]


def test_autoencoder_keeps_colour_and_motion(pipe):
    targets = all_targets()[::3]
    rng = np.random.default_rng(7)
    clips = film([place(target, rng) for target in targets])
    with torch.no_grad():
        latents = pipe.vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean
        again = pipe.vae.decode(latents).sample.transpose(1, 2) / 2 + 0.5
    assert latents.shape[1:] == (16, 2, 2, 2)
    marks = marks_of(again, targets)
    for part in set(PARTS) - {"shape"}:
        assert np.mean([mark[part] for mark in marks]) > 0.95
    mean, std = (torch.tensor(pipe.vae.config[name])[:, None, None, None] for name in ("latents_mean", "latents_std"))
    scaled = (latents - mean) / std
    assert scaled.mean().abs() < 0.15
    assert 0.8 < scaled.std() < 1.2


def test_held_out_score_leaves_room(pipe):
    asked = list(rows(27, "eval"))
    clips = pipe(
        [row["text"] for row in asked],
        num_inference_steps=8,
        height=SIDE,
        width=SIDE,
        num_frames=FRAMES,
        guidance_scale=1.0,
        max_sequence_length=MAX_TOKENS,
        output_type="pt",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert clips.shape == (27, FRAMES, 3, SIDE, SIDE)
    assert 0.1 < np.mean(score(clips, [row["target"] for row in asked])) < 0.6


def test_words_are_single_tokens(pipe):
    for tokenizer in (build_t5_tokenizer(vocabulary(), MAX_TOKENS), pipe.tokenizer):
        assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
        assert all(len(tokenizer(row["text"]).input_ids) <= MAX_TOKENS for row in rows(100))
