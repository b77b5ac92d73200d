"""Cells of the table of algorithms and modalities: tiny real models, each trained until its reward rises.

``python tests/cells.py [modality ...]`` trains all cells that are not recorded yet and writes the table into the docs.
"""

import functools
import json
import sys
import tempfile
from pathlib import Path

import torch
from training import training_step

from mmrl.algorithms.base import Context
from mmrl.components import algorithm_component, build_algorithm
from mmrl.coverage import MODALITIES, refusal, table
from mmrl.data import PromptSampler
from mmrl.registry import ALGORITHMS
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt

RESULTS = Path(__file__).with_name("algorithm_cells.json")
PAGE = Path(__file__).parents[1] / "docs" / "algorithms.md"
BEGIN, END = "<!-- table of algorithms: begin -->", "<!-- table of algorithms: end -->"
REACH = {"max_steps": 6, "reward": "shaped"}
LEARNING_RATE = {"image": 5e-3, "video": 5e-3, "VLM": 1e-2, "robot": 3e-3}
OPTIONS = {
    "raft": {"keep": 2},
    "rwr": {"beta": 0.02},
    "awr": {"beta": 0.5},
    "dapo": {"mask_truncated": False, "dynamic_sampling": None},
    "kto": {"source": "online"},
    "prdp": {"beta": 0.01},
    "refl": {"hinge": None},
    "ctrl_u": {"hinge": 2.0},
}


def brightness(samples):
    media = samples.images if samples.images is not None else samples.videos
    return media.flatten(1).mean(1)


brightness.differentiable = True


def vowels(samples):
    """Share of letters that are vowels."""
    return [sum(letter in "aeiou" for letter in text) / (1 + len(text)) for text in samples.texts]


def returns(samples):
    """Return per turn."""
    return [float(episode.rewards.sum()) / episode.turns for episode in samples.episodes]


def diffusion(name):
    from zoo import ZOO

    from pipelines import DiffusionPolicy

    entry = ZOO[name]()
    return DiffusionPolicy(entry.pipe, num_steps=2, call={**entry.call, **unguided(entry)}, batch_size=8)


def unguided(entry):
    return {"guidance_scale": 1.0} if "guidance_scale" in entry.call else {}


@functools.cache
def world(modality):
    """Policy, prompts and reward."""
    if modality in ("image", "video"):
        policy = diffusion({"image": "StableDiffusion3", "video": "LTX"}[modality])
        shape = policy.rollout([Prompt("a")], 1, 0).samples
        media = shape.images if modality == "image" else shape.videos
        texts = ["a red circle", "a blue square"]
        return policy, [Prompt(text, id=text, target=torch.ones_like(media[0])) for text in texts], brightness
    if modality == "VLM":
        from zoo.vlms import build_vlm

        from pipelines import VLMPolicy

        policy = VLMPolicy(*build_vlm("qwen2_5_vl"), max_new_tokens=6, value_head=True, batch_size=16)
        texts = ["say something", "count to two"]
        return policy, [Prompt(text, id=text, target="aeiou a e i o u") for text in texts], vowels
    from pipelines import RobotPolicy
    from pipelines.robot.demonstrations import demonstrations, starts

    torch.manual_seed(0)
    policy = RobotPolicy("mlp", "planar:reach", "flow", horizon=2, envs=32, env_options=REACH, value_head=True)
    rows = starts("planar:reach", 4)
    taught = demonstrations("planar:reach", 4, horizon=2, options=REACH)
    return policy, [*rows, *taught], returns


@functools.cache
def beginning(modality):
    return {name: tensor.clone() for name, tensor in world(modality)[0].parameters.state().items()}


@functools.cache
def teacher(modality):
    """A pipeline section for a copy of the model that has been trained for the reward."""
    policy, _, _ = world(modality)
    train("awr", modality, steps=20 if modality == "robot" else 8, rise=1.0)
    folder = tempfile.mkdtemp()
    policy.export(folder)
    options = {"diffusion": {"num_steps": 2}, "vlm": {"max_new_tokens": 6}}.get(MODALITIES[modality], {})
    if MODALITIES[modality] == "diffusion":
        options["call"] = dict(policy.train.kwargs)
    if modality == "robot":
        options |= {"env": "planar:reach", "env_options": REACH}
    return {"type": MODALITIES[modality], "model": folder, **options}


def build(name, modality):
    fields = set(algorithm_fields(name))
    options = {key: value for key, value in OPTIONS.get(name, {}).items() if key in fields}
    if "teacher" in fields:
        options["teacher"] = teacher(modality)
    if "group_size" in fields:
        options["group_size"] = 8
    return build_algorithm(algorithm_component({"type": name, **options}, where="cell", path="algorithm"))


def algorithm_fields(name):
    from mmrl.components import component_model

    return component_model("algorithm", name).model_fields


def mean_reward(modality):
    policy, rows, reward = world(modality)
    with torch.no_grad():
        rollout = policy.rollout(rows[: 4 if modality == "robot" else 2], 16, 999)
    return float(torch.as_tensor(reward(rollout.samples)).float().mean())


def train(name, modality, steps=40, rise=0.001):
    """Mean reward before and after; training ends when it has risen by ``rise``, or after ``steps``."""
    policy, rows, reward = world(modality)
    algorithm = build(name, modality)
    policy.parameters.load(beginning(modality))
    policy.parameters.snapshots.clear()
    if algorithm.needs_reference:
        policy.parameters.take_snapshot("reference")
    if modality == "robot":
        rows = rows[4:] if name in ("sft", "soar") else rows[:4]
    context = Context(policy, Scorer([reward]), 7, 8, Clock(), Tally(), PromptSampler(rows, len(rows), shuffle=False))
    optimizer = torch.optim.Adam(list(policy.parameters), lr=LEARNING_RATE[modality])
    before = after = mean_reward(modality)
    for step in range(steps):
        training_step(algorithm, context, optimizer, step)
        after = mean_reward(modality)
        if after > before + rise:
            break
    policy.keep_mean = policy.keep_entropy = False
    return before, after


def main(modalities):
    for modality in modalities or MODALITIES:
        for name in ALGORITHMS:
            gains = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            if refusal(name, modality) is None and modality not in gains.get(name, {}):
                try:
                    found = [round(x, 4) for x in train(name, modality)]
                except Exception as error:  # noqa: BLE001 (what fails is shown, and its cell stays missing)
                    sys.stderr.write(f"{modality} {name} {type(error).__name__}: {str(error)[:200]}\n")
                    continue
                sys.stderr.write(f"{modality} {name} {found}\n")
                if found[1] <= found[0]:
                    continue
                gains = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
                gains.setdefault(name, {})[modality] = found
                RESULTS.write_text(json.dumps(gains, indent=1, sort_keys=True) + "\n")
    write_table()


def write_table():
    text = PAGE.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    gains = json.loads(RESULTS.read_text())
    PAGE.write_text(f"{head}{BEGIN}\n{table(gains)}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
