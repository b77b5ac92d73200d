"""Scenes of coloured shapes: what is where, and random scenes that show what a caption asks for.

All lengths are fractions of the picture's side, x to the right and y down, so a scene can be drawn at any size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS: Mapping[str, tuple[float, float, float]] = {
    "red": (0.87, 0.13, 0.14),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.12, 0.32, 0.88),
    "yellow": (0.98, 0.80, 0.08),
    "purple": (0.60, 0.16, 0.72),
}
BACKGROUND = (0.96, 0.96, 0.96)
RELATIONS = ("left of", "right of", "above", "below")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

MIN_SIZE, MAX_SIZE = 0.15, 0.19
GAP = 0.07
RELATION_MARGIN = 0.08


@dataclass(frozen=True)
class Object:
    """One shape.

    Attributes:
        shape: one of ``SHAPES``.
        colour: a key of ``COLOURS``.
        x, y: centre of the bounding box, in [0, 1].
        size: half the side of the bounding box, in [0, 1].
        velocity: change of (x, y) per unit of time, for clips.
    """

    shape: str
    colour: str
    x: float
    y: float
    size: float
    velocity: tuple[float, float] = (0.0, 0.0)

    @property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom), fractions of the side."""
        return (self.x - self.size, self.y - self.size, self.x + self.size, self.y + self.size)


@dataclass(frozen=True)
class Scene:
    """Objects on a plain background, in the order in which they are painted."""

    objects: tuple[Object, ...]
    background: tuple[float, float, float] = BACKGROUND

    def at(self, time: float) -> Scene:
        """The scene after ``time`` units of straight motion."""
        moved = (replace(o, x=o.x + time * o.velocity[0], y=o.y + time * o.velocity[1]) for o in self.objects)
        return replace(self, objects=tuple(moved))


def holds(relation: str, a: tuple[float, float], b: tuple[float, float], margin: float = 0.0) -> bool:
    """Whether the point ``a`` is ``relation`` (e.g. "left of") the point ``b``.

    The offset must be mostly along the relation's axis and longer than ``margin``, so that exactly one relation holds
    for a pair of points with margin 0 (none on the diagonals).
    """
    dx, dy = b[0] - a[0], b[1] - a[1]
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > margin and along > abs(across)


def place(target: Mapping[str, Any], rng: np.random.Generator) -> Scene:
    """A random scene that shows exactly what ``target`` asks for.

    Args:
        target: ``{"objects": [{"colour", "shape"}, ...], "relation": [i, name, j] or None}``.
        rng: all the randomness: sizes and places.

    Boxes lie inside the picture and are ``GAP`` apart; a relation holds with at least ``RELATION_MARGIN``.
    """
    objects = target["objects"]
    while True:
        sizes = rng.uniform(MIN_SIZE, MAX_SIZE, len(objects))
        low, high = sizes + 0.02, 0.98 - sizes
        points = low + (high - low) * rng.random((2, len(objects)))
        if _clear(points, sizes) and _as_asked(target.get("relation"), points):
            break
    return Scene(
        tuple(
            Object(o["shape"], o["colour"], float(x), float(y), float(s))
            for o, x, y, s in zip(objects, *points, sizes, strict=True)
        )
    )


def _clear(points: np.ndarray, sizes: np.ndarray) -> bool:
    apart = np.abs(points[:, :, None] - points[:, None, :]).max(0)
    needed = sizes[:, None] + sizes[None, :] + GAP
    return bool(np.all((apart >= needed) | np.eye(len(sizes), dtype=bool)))


def _as_asked(relation: Any, points: np.ndarray) -> bool:
    if not relation:
        return True
    i, name, j = relation
    return holds(name, tuple(points[:, i]), tuple(points[:, j]), RELATION_MARGIN)
