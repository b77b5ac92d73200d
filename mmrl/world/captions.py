"""What can be asked for (targets), in which words (captions), and which targets are held out.

A *target* is plain JSON: ``{"objects": [{"colour": "red", "shape": "circle"}, ...], "relation": [0, "above", 1]}``, the
relation being null where the request has none.
The four tasks are those of GenEval (arXiv:2310.11513) that a world of shapes can pose: ``single``, ``count`` (two or
three alike), ``pair`` and ``relation``.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmrl.errors import UserError, nearest
from mmrl.seeding import derive_seed
from mmrl.world.scenes import COLOURS, OPPOSITE, RELATIONS, SHAPES

NUMBERS = {2: "two", 3: "three"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
ASKED_COLOURS = ("red", "green", "blue", "yellow")
ASKED_SHAPES = ("circle", "square", "triangle")
"""Part of what the world has: a tiny model learns to follow requests made of these in minutes."""

TASKS = ("single", "count", "pair", "relation")

Target = dict[str, Any]


def _kind(colour: str, shape: str) -> dict[str, str]:
    return {"colour": colour, "shape": shape}


KINDS = [_kind(c, s) for c in ASKED_COLOURS for s in ASKED_SHAPES]


def all_targets(task: str) -> list[Target]:
    """Every target of a task, each once: "A left of B" is also "B right of A", "A and B" also "B and A"."""
    if task == "single":
        return [{"objects": [k], "relation": None} for k in KINDS]
    if task == "count":
        return [{"objects": [k] * n, "relation": None} for n in NUMBERS for k in KINDS]
    if task == "pair":
        return [{"objects": [a, b], "relation": None} for a, b in itertools.combinations(KINDS, 2)]
    return [{"objects": [a, b], "relation": [0, r, 1]} for a, b in itertools.combinations(KINDS, 2) for r in RELATIONS]


def task_of(target: Target) -> str:
    """The task a target belongs to."""
    if target["relation"]:
        return "relation"
    objects = target["objects"]
    if len(objects) == 1:
        return "single"
    return "count" if all(o == objects[0] for o in objects) else "pair"


def key_of(target: Target) -> str:
    """A name that all wordings of one request share, e.g. ``blue square above red circle``."""
    names = [f"{o['colour']} {o['shape']}" for o in target["objects"]]
    if not target["relation"]:
        return " and ".join(sorted(names))
    i, relation, j = target["relation"]
    if relation in ("right of", "below"):
        i, relation, j = j, OPPOSITE[relation], i
    return f"{names[i]} {relation} {names[j]}"


def is_held_out(target: Target, percent: int = 18) -> bool:
    """Whether a target belongs to the held-out split: a fixed hash of its key, so it never changes.

    Single objects are never held out: there are too few, and each is part of every other task.
    """
    return task_of(target) != "single" and derive_seed(0, "held out", key_of(target)) % 100 < percent


def caption(target: Target, rng: np.random.Generator) -> str:
    """One of several wordings of a target. A pair or a relation may be told from either side."""
    objects = target["objects"]
    task = task_of(target)
    if task == "single":
        words = _one(objects[0], rng)
    elif task == "count":
        words = f"{NUMBERS[len(objects)]} {objects[0]['colour']} {PLURALS[objects[0]['shape']]}"
    else:
        first, second, joint = 0, 1, "and"
        if task == "relation":
            first, joint, second = target["relation"]
        if rng.random() < 0.5:
            first, second, joint = second, first, OPPOSITE.get(joint, joint)
        words = f"{_one(objects[first], rng)} {joint} {_one(objects[second], rng)}"
    return words


def _one(kind: dict[str, str], rng: np.random.Generator) -> str:
    article = ("a", "one")[rng.integers(2)]
    return f"{article} {kind['colour']} {kind['shape']}"


def vocabulary() -> list[str]:
    """Every word that a caption about this world can hold, sorted."""
    words = {"a", "one", "of", "and", "left", "right", "above", "below", *COLOURS, *SHAPES}
    return sorted(words | set(PLURALS.values()) | set(NUMBERS.values()))


def check_target(target: Any, place: str) -> None:
    """Raise ``UserError`` naming ``place`` unless ``target`` is a request of the form given at the top."""
    example = '{"objects": [{"colour": "red", "shape": "circle"}], "relation": null}'
    if not isinstance(target, Mapping) or not isinstance(target.get("objects"), list) or not target["objects"]:
        raise UserError(f"{place}: target is {target!r}; the shape world needs one like {example}")
    for kind in target["objects"]:
        for key, choices in (("colour", COLOURS), ("shape", SHAPES)):
            value = kind.get(key) if isinstance(kind, Mapping) else None
            if value not in choices:
                raise UserError(f"{place}: target has {key} {value!r}{nearest(str(value), choices)}")
    relation = target.get("relation")
    if relation:
        index = range(len(target["objects"]))
        if len(relation) != 3 or relation[0] not in index or relation[2] not in index or relation[1] not in RELATIONS:
            raise UserError(f'{place}: relation is {relation!r}; it should be like [0, "left of", 1]')
