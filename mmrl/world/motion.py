"""Moving shapes: what a clip is asked to show, in which words, and clips that show it.

A *target* is plain JSON: ``{"colour": "red", "shape": "circle", "direction": "left", "speed": "fast"}``. One shape
moves in a straight line at constant speed and stays inside. The verifier is :mod:`mmrl.world.motion_verify`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError, nearest
from mmrl.seeding import derive_seed
from mmrl.types import Prompt
from mmrl.world.drawing import draw
from mmrl.world.scenes import COLOURS, SHAPES, Object, Scene

FRAMES = 5
SIDE = 16

DIRECTIONS: Mapping[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: Mapping[str, tuple[float, float]] = {"slowly": (0.14, 0.22), "fast": (0.44, 0.52)}
"""How far a shape travels in the course of a clip, as a range of fractions of the picture's side."""

ASKED_COLOURS = ("red", "green", "blue", "yellow", "purple")
ASKED_SHAPES = ("circle", "square", "triangle", "cross")
MIN_SIZE, MAX_SIZE = 0.17, 0.20
PARTS = ("colour", "shape", "direction", "speed")

_CHOICES = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS), "speed": tuple(SPEEDS)}

Target = dict[str, str]


def all_targets() -> list[Target]:
    """Every target, each once."""
    choices = itertools.product(ASKED_COLOURS, ASKED_SHAPES, DIRECTIONS, SPEEDS)
    return [dict(zip(PARTS, values, strict=True)) for values in choices]


def is_held_out(target: Mapping[str, str], percent: int = 20) -> bool:
    """Whether a target belongs to the held-out split: a fixed hash of what it asks for."""
    key = " ".join(target[part] for part in PARTS)
    return derive_seed(0, "held out motion", key) % 100 < percent


def caption(target: Mapping[str, str], rng: np.random.Generator) -> str:
    """One of several wordings of a target, e.g. "a red circle moves slowly left"."""
    article = ("a", "one")[rng.integers(2)]
    way = [target["direction"], target["speed"]]
    if rng.random() < 0.5:
        way.reverse()
    return f"{article} {target['colour']} {target['shape']} moves {' '.join(way)}"


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    return sorted({"a", "one", "moves", *COLOURS, *SHAPES, *DIRECTIONS, *SPEEDS})


def place(target: Mapping[str, str], rng: np.random.Generator) -> Scene:
    """A random scene at time 0 whose shape does what ``target`` asks for between times 0 and 1."""
    size = rng.uniform(MIN_SIZE, MAX_SIZE)
    travel = rng.uniform(*SPEEDS[target["speed"]])
    velocity = travel * np.array(DIRECTIONS[target["direction"]], dtype=float)
    low = size + 0.01 - np.minimum(velocity, 0)
    high = 0.99 - size - np.maximum(velocity, 0)
    x, y = low + (high - low) * rng.random(2)
    moving = Object(target["shape"], target["colour"], float(x), float(y), float(size), tuple(velocity.tolist()))
    return Scene((moving,))


def film(scenes: Sequence[Scene], frames: int = FRAMES, side: int = SIDE) -> Tensor:
    """Clips ``[N, frames, 3, side, side]`` in [0, 1] of the scenes between times 0 and 1."""
    moments = [scene.at(time) for scene in scenes for time in np.linspace(0, 1, frames)]
    return draw(moments, side).unflatten(0, (len(scenes), frames))


def rows(
    count: Annotated[int, Field(ge=1)] = 256,
    split: Literal["train", "eval"] = "train",
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of text, id and target of one split; no target comes again before all of the split have come once."""
    rng = np.random.default_rng([seed, 4, split == "eval"])
    choices = [target for target in all_targets() if is_held_out(target) == (split == "eval")]
    for k in range(count):
        if k % len(choices) == 0:
            rng.shuffle(choices)
        target = choices[k % len(choices)]
        yield {"text": caption(target, rng), "id": f"{split}-{seed}-{k}", "target": target}


def clips(
    count: Annotated[int, Field(ge=1)] = 8192,
    mistold: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    untold: Annotated[float, Field(ge=0, lt=1)] = 0.0,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Iterator[Prompt]:
    """Prompts of the training split for supervised training: the target is a clip ``[FRAMES, 3, SIDE, SIDE]``.

    Args:
        count: how many.
        mistold: share of the captions that tell of another clip, as captions gathered from the web do. The model learns
            to draw well and to listen badly, which is what reinforcement learning is there to mend.
        untold: share of the captions that are withheld, for classifier-free guidance.
        seed: of everything.
    """
    rng = np.random.default_rng([seed, 5])
    told = list(rows(count, "train", seed))
    for k, row in enumerate(told):
        text = row["text"]
        if rng.random() < mistold:
            text = told[rng.integers(count)]["text"]
        if rng.random() < untold:
            text = ""
        yield Prompt(text, id=f"clip-{seed}-{k}", target=film([place(row["target"], rng)])[0])


def check_target(target: Any, place: str) -> None:
    """Raise ``UserError`` naming ``place`` unless ``target`` is a request of the form given at the top."""
    if not isinstance(target, Mapping):
        example = '{"colour": "red", "shape": "circle", "direction": "left", "speed": "fast"}'
        raise UserError(f"{place}: target is {target!r}; moving shapes need one like {example}")
    for part, choices in _CHOICES.items():
        value = target.get(part)
        if value not in choices:
            raise UserError(f"{place}: target has {part} {value!r}{nearest(str(value), choices)}")
