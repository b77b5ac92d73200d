"""A complete training run small enough for tests: a random SD3 pipeline on disk and a config that trains it."""

from pathlib import Path
from typing import Any

import yaml
from zoo import ZOO

from mmrl.overrides import merge

PROMPTS = ["a red circle", "a blue square", "two green triangles", "a yellow cross"]


def save_pipeline(folder: Path) -> Path:
    """A random ``StableDiffusion3Pipeline`` that trains in milliseconds."""
    ZOO["StableDiffusion3"]().pipe.save_pretrained(folder)
    return folder


def tiny_config(model: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """Flow-GRPO for brightness; ``changes`` are laid over it, section by section."""
    base = {
        "run_dir": str(run_dir),
        "seed": 3,
        "pipeline": {
            "type": "diffusion",
            "model": str(model),
            "num_steps": 4,
            "batch_size": 4,
            "call": {"height": 16, "width": 16, "guidance_scale": 1.0, "max_sequence_length": 16},
        },
        "data": {"prompts": PROMPTS, "eval_prompts": PROMPTS[:2], "batch_size": 2},
        "rewards": [{"type": "pixels", "measure": "brightness"}],
        "algorithm": {"type": "grpo", "group_size": 4},
        "trainer": {"steps": 6, "lr": 1e-3, "save_every": 3, "eval_every": 3, "device": "cpu", "tensorboard": False},
    }
    return merge(base, changes)


def write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path
