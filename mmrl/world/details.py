"""Questions about shapes too small to tell apart unless one looks closer, and dialogues to learn looking from.

    data: {prompts: "mmrl.world.details:rows", options: {count: 512}}
    data: {prompts: "mmrl.world.details:dialogues", options: {count: 2000, loose: 6}}

A picture has three small shapes of different colours; the quickstart's model is shown it at ``SIDE`` by ``SIDE``
pixels, where colours and places can be seen but hardly shapes. "What shape is the red one?" A dialogue calls the tool
``zoom`` with a box in pixels of the shown picture, gets that part of the picture at its full resolution, and answers.

Held out are pairs of kinds as in :mod:`mmrl.world.questions`: each picture of the eval split has such a pair, and the
question is about one of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrl.world.captions import KINDS, is_held_out
from mmrl.world.questions import SIDE, picture
from mmrl.world.scenes import Object, Scene

if TYPE_CHECKING:
    from PIL.Image import Image

LARGE = 128
"""Pixels of a picture's side unless told otherwise."""

MIN_HALF, MAX_HALF = 0.030, 0.045
APART = 0.22
"""Half-sides, and the distance of centres in x or y, as fractions of the picture's side."""

REACH = 8
"""Half the side of a box that is looked at, in pixels of the shown picture."""

TOOL = "zoom"

Split = Literal["train", "eval"]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=SIDE)]


def rows(count: Count = 1024, seed: Seed = 0, split: Split = "train", side: Side = LARGE) -> Iterator[dict[str, Any]]:
    """Rows of text, images (one PIL picture), target (a shape), task ``detail`` and id.

    Args:
        count: how many.
        seed: of everything; the splits differ at any seed.
        split: see the top of the file.
        side: pixels of a picture's side.
    """
    rng = np.random.default_rng([seed, 5, split == "eval"])
    for number in range(count):
        scene = scatter(rng, split)
        asked = scene.objects[0]
        yield {
            "id": f"{split}-{seed}-detail-{number}",
            "task": "detail",
            "text": f"What shape is the {asked.colour} one?",
            "images": [picture(scene, side)],
            "target": asked.shape,
        }


def dialogues(
    count: Count = 1024, seed: Seed = 0, split: Split = "train", loose: Annotated[int, Field(ge=0)] = 0
) -> Iterator[dict[str, Any]]:
    """The same as conversations that are held to their end, to learn from: rows of messages, images and id.

    Args:
        loose: boxes miss the middle of the shape by up to so many shown pixels in x and in y. A model that learns from
            such dialogues looks where it should, roughly, which is what reinforcement learning is there to mend.
    """
    rng = np.random.default_rng([seed, 6, split == "eval"])
    for number in range(count):
        scene = scatter(rng, split)
        asked, whole = scene.objects[0], picture(scene, LARGE)
        box = around(asked, *rng.integers(-loose, loose + 1, 2))
        question = {"type": "text", "text": f"What shape is the {asked.colour} one?"}
        yield {
            "id": f"{split}-{seed}-dialogue-{number}",
            "task": "detail",
            "images": [whole, cut(whole, box)],
            "messages": [
                {"role": "user", "content": [{"type": "image"}, question]},
                {"role": "assistant", "content": call(box)},
                {"role": "tool", "content": [{"type": "image"}]},
                {"role": "assistant", "content": f"<answer>{asked.shape}</answer>"},
            ],
        }


def scatter(rng: np.random.Generator, split: Split) -> Scene:
    """Three small shapes; the first is the one that is asked about, and none shares its colour."""
    while True:
        kinds = [KINDS[k] for k in rng.choice(len(KINDS), 3, replace=False)]
        if len({kind["colour"] for kind in kinds}) < 3:
            continue
        held_out = [is_held_out({"objects": [kinds[0], kind], "relation": None}) for kind in kinds[1:]]
        others = is_held_out({"objects": kinds[1:], "relation": None})
        if (split == "eval") != held_out[0] or (split == "train" and (any(held_out) or others)):
            continue
        halves = rng.uniform(MIN_HALF, MAX_HALF, 3)
        points = rng.uniform(0.08, 0.92, (3, 2))
        gaps = np.abs(points[:, None] - points[None]).max(-1)
        if gaps[np.triu_indices(3, 1)].min() < APART:
            continue
        return Scene(
            tuple(
                Object(kind["shape"], kind["colour"], float(x), float(y), float(half))
                for kind, (x, y), half in zip(kinds, points, halves, strict=True)
            )
        )


def around(thing: Object, right: int = 0, down: int = 0) -> list[int]:
    """The box to look at, moved by so many shown pixels, as far inside the picture as its size allows."""
    x, y = (
        int(np.clip(round(place * SIDE) + off, REACH, SIDE - REACH))
        for place, off in ((thing.x, right), (thing.y, down))
    )
    return [x - REACH, y - REACH, x + REACH, y + REACH]


def cut(whole: Image, box: list[int]) -> Image:
    """What the tool shows of a picture."""
    return whole.crop([edge * LARGE // SIDE for edge in box])


def call(box: list[int]) -> str:
    """The call of the tool."""
    written = json.dumps({"name": TOOL, "arguments": {"bbox": box}}, separators=(",", ":"))
    return f"<tool_call>{written}</tool_call>"
