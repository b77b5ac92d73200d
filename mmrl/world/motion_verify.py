"""An exact judge of clips of moving shapes: colour, shape, direction and speed against a request.

Each frame goes through the detector of pictures (:mod:`mmrl.world.verify`). A frame that shows exactly one object is
*clear*; a straight line is fitted to the places of that object over time. Frames where it is far from that line, or
that are not clear, earn nothing, so an object that flickers, jumps or changes loses marks in proportion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from mmrl.world.motion import DIRECTIONS, PARTS
from mmrl.world.verify import CLEAN, Detection, detect

MIN_TRAVEL, FAST_TRAVEL, MAX_TRAVEL = 0.08, 0.33, 0.75
"""Distances, as fractions of the side, over a whole clip: below the first nothing moves, from the second it is fast."""

MAX_OFFSET = 0.06
"""How far from the line of its motion an object may be, as a fraction of the side."""

ENOUGH = 0.75
"""Share of the frames that must be right for a strict mark."""

MIN_FRAMES = 3


def judge(frames: Sequence[Detection], target: Mapping[str, str]) -> dict[str, float]:
    """Marks in [0, 1] for each of ``PARTS``: the share of the clip's frames that are right in it.

    Direction and speed are right or wrong for the clip as a whole; what their marks count is the frames that take part
    in the motion. Every frame counts for as much as it is clean (see :func:`mmrl.world.verify.judge`).
    """
    weight = np.array([min(1.0, f.clean / CLEAN) if f.count == 1 else 0.0 for f in frames])
    seen = np.flatnonzero(weight)
    marks = dict.fromkeys(PARTS, 0.0)
    for part in ("colour", "shape"):
        right = [weight[k] for k in seen if getattr(frames[k].objects[0], part) == target[part]]
        marks[part] = float(sum(right)) / len(frames)
    if len(seen) < MIN_FRAMES:
        return marks
    times = seen / (len(frames) - 1)
    places = np.array([[frames[k].objects[0].x, frames[k].objects[0].y] for k in seen])
    design = np.stack([times, np.ones_like(times)], 1)
    line = np.linalg.lstsq(design, places, rcond=None)[0]
    near = np.abs(places - design @ line).max(1) <= MAX_OFFSET
    steady = float(weight[seen[near]].sum()) / len(frames)
    direction, speed = motion(line[0])
    marks["direction"] = steady * (direction == target["direction"])
    marks["speed"] = steady * (speed == target["speed"])
    return marks


def motion(velocity: np.ndarray) -> tuple[str, str]:
    """Direction and speed of a shape that travels ``velocity`` (x, y) during the clip; "" where there is no name.

    The motion must be mostly along one axis: at least twice as far as along the other.
    """
    along = int(np.abs(velocity).argmax())
    travel, across = abs(velocity[along]), abs(velocity[1 - along])
    if travel < MIN_TRAVEL:
        return "", ""
    axis = np.zeros(2)
    axis[along] = np.sign(velocity[along])
    name = next(name for name, way in DIRECTIONS.items() if tuple(axis) == way)
    speed = "slowly" if travel < FAST_TRAVEL else "fast" if travel <= MAX_TRAVEL else ""
    return (name if across <= travel / 2 else ""), speed


def score(clips: Tensor, targets: Sequence[Mapping[str, str]], strict: bool = False) -> list[float]:
    """How well each clip ``[N, F, 3, S, S]`` in [0, 1] shows its target, in [0, 1].

    Graded: the mean of the marks of :func:`judge`. Strict: 1 if each is at least ``ENOUGH``, else 0.
    """
    marks = marks_of(clips, targets)
    if strict:
        return [float(all(value >= ENOUGH for value in m.values())) for m in marks]
    return [sum(m.values()) / len(m) for m in marks]


def marks_of(clips: Tensor, targets: Sequence[Mapping[str, str]]) -> list[dict[str, float]]:
    """The marks of :func:`judge` for each clip ``[N, F, 3, S, S]``."""
    frames = clips.shape[1]
    found = detect(clips.flatten(0, 1))
    return [judge(found[k * frames : (k + 1) * frames], target) for k, target in enumerate(targets)]
