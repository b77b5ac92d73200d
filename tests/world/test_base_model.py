"""The base model that is shipped: plain diffusers loads it, it is small, and it leaves room to improve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmrl.world import draw, place, score
from mmrl.world.captions import TASKS, all_targets, caption, is_held_out, key_of, vocabulary
from mmrl.world.prompts import read
from pipelines.quickstart.image_base import MAX_TOKENS, T5_LENGTH, build_tokenizer, pretraining_prompts
from pipelines.quickstart.making import build_t5_tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "pipelines" / "quickstart" / "sd3-shapes"


@pytest.fixture(scope="module")
def pipe():
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, prompts, seed=0, **call):
    arguments = {"num_inference_steps": 10, "guidance_scale": 1.0, "max_sequence_length": T5_LENGTH, **call}
    generator = torch.Generator().manual_seed(seed)
    return pipe([p.text for p in prompts], output_type="pt", generator=generator, **arguments).images


def test_files_are_small():
    sizes = [path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()]
    assert max(sizes) < 4e6
    assert sum(sizes) < 8e6
    assert not [path for path in FOLDER.rglob("*") if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


def test_autoencoder_keeps_what_counts(pipe):
    rng = np.random.default_rng(5)
    targets = [all_targets(task)[i] for task in TASKS for i in rng.integers(len(all_targets(task)), size=24)]
    pictures = draw([place(target, rng) for target in targets])
    with torch.no_grad():
        latents = pipe.vae.encode(pictures * 2 - 1).latent_dist.mean
        again = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    scaled = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    assert np.mean(score(again, targets, strict=True)) >= 0.97
    assert scaled.mean().abs() < 0.1
    assert 0.9 < scaled.std() < 1.1


def test_held_out_score_leaves_room(pipe):
    prompts = read(ROOT / "configs" / "quickstart" / "shapes_eval.jsonl")
    targets = [p.target for p in prompts]
    pictures = [sample(pipe, prompts, seed) for seed in range(2)]
    graded = np.mean([score(p, targets) for p in pictures])
    assert 0.45 < graded < 0.70
    # Two pictures of one prompt differ about as much as two true scenes of it.
    scenes = [draw([place(t, np.random.default_rng([s, i])) for i, t in enumerate(targets)]) for s in range(2)]
    spread, true_spread = ((a - b).square().mean().sqrt() for a, b in (pictures, scenes))
    assert 0.7 < spread / true_spread < 1.3


def test_long_padding_does_little_harm(pipe):
    """A plain call pads the text to 256 tokens; the model has learnt to overlook them."""
    prompts = read(ROOT / "configs" / "quickstart" / "shapes_eval.jsonl")
    targets = [p.target for p in prompts]
    short = np.mean(score(sample(pipe, prompts), targets))
    long = np.mean(score(sample(pipe, prompts, max_sequence_length=256), targets))
    assert long > short - 0.1


def test_words_are_single_tokens(pipe):
    for tokenizer in (
        build_tokenizer(),
        build_t5_tokenizer(vocabulary(), MAX_TOKENS),
        pipe.tokenizer,
        pipe.tokenizer_2,
    ):
        assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
        assert len(tokenizer.tokenize("zebra")) > 1
        assert tokenizer.unk_token not in tokenizer.tokenize("zebra")


def test_nothing_held_out_is_trained_on():
    train = {key_of(p.target) for p in read(ROOT / "configs" / "quickstart" / "shapes_train.jsonl")}
    held_out = read(ROOT / "configs" / "quickstart" / "shapes_eval.jsonl")
    assert not any(is_held_out(p.target) for p in read(ROOT / "configs" / "quickstart" / "shapes_train.jsonl"))
    assert all(is_held_out(p.target) and key_of(p.target) not in train for p in held_out)
    assert len(held_out) == 64
    assert len({p.text for p in held_out}) > 60  # the few held-out counts come more than once
    told = {p.text for p in pretraining_prompts(pictures=500)}
    assert told <= {p.text for p in read(ROOT / "configs" / "quickstart" / "shapes_train.jsonl")} | {""}


def test_prompt_files_are_what_the_generator_writes(tmp_path):
    from mmrl.world.prompts import write

    write(tmp_path)
    for name in ("shapes_train.jsonl", "shapes_eval.jsonl"):
        assert (tmp_path / name).read_text() == (ROOT / "configs" / "quickstart" / name).read_text()


def test_captions_fit_the_text_encoders():
    rng = np.random.default_rng(0)
    tokenizer = build_tokenizer()
    for task in TASKS:
        for target in all_targets(task)[::7]:
            assert len(tokenizer(caption(target, rng)).input_ids) <= MAX_TOKENS
