"""Cells of the table of algorithms and modalities: tiny real models, all trained by one protocol for their modality.

``python tests/cells.py [modality ...]`` trains the cells that are not recorded yet and writes the tables into the docs
and the README; ``python tests/cells.py tables`` only writes them. To train a cell anew, delete its record.
"""

import functools
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import torch
from training import training_step

from mmrl.algorithms.base import Context
from mmrl.components import algorithm_component, build_algorithm, component_model
from mmrl.coverage import MODALITIES, marks, numbers, place, risen
from mmrl.data import PromptSampler
from mmrl.policy import Policy
from mmrl.registry import ALGORITHMS
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("algorithm_cells.json")
BEGIN, END = "<!-- table of algorithms: begin -->", "<!-- table of algorithms: end -->"

STEPS = {"image": 12, "video": 8, "VLM": 16, "robot": 16}
LEARNING_RATE = {"image": 3e-3, "video": 3e-3, "VLM": 1e-2, "robot": 2e-3}
RUNS = 4
"""Trainings of a cell, from the same weights with seeds of their own: even scores drawn by lot move a model, and its
reward with it, so that the samples of one training alone would not tell a gain from chance."""
TRIALS = 16
"""Samples by which a run is judged, from the same seeds before and after."""

OPTIONS = {
    # Rewards of these models differ by hundredths, on which the default temperatures would weigh all samples alike.
    "rwr": {"beta": 0.02},
    "awr": {"beta": 0.5},
    "prdp": {"beta": 0.01},
    # Answers of a random model end at the limit of length, and its rewards are never all equal.
    "dapo": {"mask_truncated": False, "dynamic_sampling": None},
    # There is no data with labels; and one draw of noise says next to nothing of how likely a picture is.
    "kto": {"source": "online", "noise_draws": 4},
    # Of each group one sample teaches, or two: too few of eight to see a trend in a few steps.
    "pass_at_k": {"group_size": 32},
    "dpo": {"pairs": "ranked"},
    "d3po": {"pairs": "ranked"},
    "raft": {"keep": 2},
    # Hinges are set for rewards above 1, which brightness never reaches.
    "refl": {"hinge": None},
    "ctrl_u": {"hinge": 2.0},
    # In a few steps the surrogate learns only if it is as fast as the model.
    "tdm_r1": {"surrogate_lr": 5e-3, "tracker_lr": 5e-3},
    # There are few steps to collect in, episodes of three turns, and no prior data that would be worth it.
    "residual_rl": {"prior_steps": 1, "critic_steps": 1, "prior_share": 0.0, "discount": 0.9, "updates_per_step": 32},
}
REACH = {"max_steps": 6, "reward": "shaped"}


@dataclass
class World:
    """What a cell trains on.

    Attributes:
        prompts: to roll out, in training and when the model is judged.
        taught: the same or others, with targets.
    """

    policy: Policy
    reward: Callable
    prompts: list[Prompt]
    taught: list[Prompt]


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


def drawing_world(name):
    """Pictures or clips, for their brightness."""
    from zoo import ZOO

    from pipelines import DiffusionPolicy

    entry = ZOO[name]()
    call = entry.call | ({"guidance_scale": 1.0} if "guidance_scale" in entry.call else {})
    policy = DiffusionPolicy(entry.pipe, num_steps=2, call=call, batch_size=16, value_head=True)
    shape = policy.rollout([Prompt("a")], 1, 0).samples
    bright = torch.ones_like((shape.images if shape.images is not None else shape.videos)[0])
    prompts = [Prompt(text, id=text, target=bright) for text in ("a red circle", "a blue square")]
    return World(policy, brightness, prompts, prompts)


def answering_world():
    """Texts, for their vowels."""
    from zoo.vlms import build_vlm

    from pipelines import VLMPolicy

    policy = VLMPolicy(*build_vlm("qwen2_5_vl"), max_new_tokens=6, value_head=True, batch_size=16)
    prompts = [Prompt(text, id=text, target="aeiou a e i o u") for text in ("say something", "count to two")]
    return World(policy, vowels, prompts, prompts)


def acting_world(pipeline):
    """Episodes of reaching, for their return."""
    from pipelines import RobotPolicy
    from pipelines.robot.demonstrations import demonstrations, starts
    from pipelines.robot.residual import ResidualPolicy

    torch.manual_seed(0)
    common = {"env": "planar:reach", "envs": 64, "env_options": REACH}
    policy = RobotPolicy("mlp", action_head="flow", horizon=2, value_head=True, **common)
    if pipeline == "residual_robot":
        policy = ResidualPolicy(ResidualPolicy.load(exported(policy)), scale=1.0, **common)
    taught = list(demonstrations("planar:reach", 4, horizon=2, options=REACH))
    return World(policy, returns, starts("planar:reach", 16 if pipeline == "residual_robot" else 8), taught)


@functools.cache
def world(modality, pipeline):
    if modality in ("image", "video"):
        return drawing_world({"image": "StableDiffusion3", "video": "Wan"}[modality])
    return answering_world() if modality == "VLM" else acting_world(pipeline)


@functools.cache
def beginning(modality, pipeline):
    return {name: tensor.clone() for name, tensor in world(modality, pipeline).policy.parameters.state().items()}


def exported(policy):
    folder = tempfile.mkdtemp()
    policy.export(folder)
    return folder


@functools.cache
def teacher(modality, pipeline):
    """A pipeline section for a copy of the model that has been trained for the reward."""
    train_once("awr", modality, RUNS)
    policy = world(modality, pipeline).policy
    options = {"vlm": {"max_new_tokens": 6}, "robot": {"env": "planar:reach", "env_options": REACH}}.get(pipeline)
    options = options or {"num_steps": 2, "call": dict(policy.train.kwargs)}
    return {"type": pipeline, "model": exported(policy), **options}


def build(name, modality, pipeline):
    fields = component_model("algorithm", name).model_fields
    options = {"group_size": 8} if "group_size" in fields else {}
    if "teacher" in fields:
        options["teacher"] = teacher(modality, pipeline)
    options |= OPTIONS.get(name, {})
    return build_algorithm(algorithm_component({"type": name, **options}, where="cell", path="algorithm"))


@torch.no_grad()
def trial(world, run):
    """Mean reward of the samples by which a model is judged."""
    rollout = world.policy.rollout(world.prompts, TRIALS // len(world.prompts), 999 + run)
    return torch.as_tensor(world.reward(rollout.samples)).double().mean().item()


def begin(modality, pipeline):
    """Undo all training."""
    policy = world(modality, pipeline).policy
    policy.keep_mean = policy.keep_entropy = False
    policy.parameters.load(beginning(modality, pipeline))
    policy.parameters.snapshots.clear()


@functools.cache
def before(modality, pipeline, run):
    begin(modality, pipeline)
    return trial(world(modality, pipeline), run)


def train_once(name, modality, run):
    """Mean reward after the training of one run."""
    pipeline = place(name, modality)[0]
    algorithm = build(name, modality, pipeline)
    here = world(modality, pipeline)
    begin(modality, pipeline)
    if algorithm.needs_reference:
        here.policy.parameters.take_snapshot("reference")
    rows = here.prompts if "rollout" in algorithm.verbs or algorithm.needs_rewards else here.taught
    prompts = PromptSampler(rows, len(rows), shuffle=False)
    context = Context(here.policy, Scorer([here.reward]), run, 16, Clock(), Tally(), prompts)
    optimizer = torch.optim.Adam(list(here.policy.parameters), lr=LEARNING_RATE[modality])
    for step in range(STEPS[modality]):
        training_step(algorithm, context, optimizer, step)
    return trial(here, run)


def train(name, modality):
    """Mean reward before and after training, and the standard error of the gain over the runs."""
    pipeline = place(name, modality)[0]
    first = [before(modality, pipeline, run) for run in range(RUNS)]
    last = [train_once(name, modality, run) for run in range(RUNS)]
    error = stdev(after - begun for begun, after in zip(first, last, strict=True)) / RUNS**0.5
    return [round(x, 6) for x in (fmean(first), fmean(last), error)]


def recorded():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def record(name, modality):
    if place(name, modality)[1] is not None or modality in recorded().get(name, {}):
        return
    try:
        found = train(name, modality)
    except Exception as error:  # noqa: BLE001 (what fails is shown, and its cell stays missing)
        sys.stderr.write(f"{modality} {name} {type(error).__name__}: {str(error)[:200]}\n")
        return
    sys.stderr.write(f"{modality} {name} {found}{'' if risen(*found) else ' did not rise'}\n")
    results = recorded()
    results.setdefault(name, {})[modality] = found
    RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def detailed(gains):
    """The numbers, and by what protocol."""
    steps = (f"{modality} {count} at {LEARNING_RATE[modality]:g}" for modality, count in STEPS.items())
    return f"Steps of Adam and learning rate: {', '.join(steps)}.\n\n{numbers(gains)}"


PAGES = {ROOT / "docs" / "algorithms.md": detailed, ROOT / "README.md": marks}


def with_table(page, table):
    """The text of a page with a table between its marks."""
    head, rest = page.read_text(encoding="utf-8").split(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}"


def main(modalities):
    for modality in modalities or MODALITIES:
        if modality in MODALITIES:
            for name in ALGORITHMS:
                record(name, modality)
    for page, table in PAGES.items():
        page.write_text(with_table(page, table(recorded())), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
