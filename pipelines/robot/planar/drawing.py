"""Pictures of many planar scenes at once, with the shapes and colours of :mod:`mmrl.world`."""

from __future__ import annotations

import numpy as np

from mmrl.world.drawing import coverage
from mmrl.world.scenes import BACKGROUND, SHAPES

BLOCK = 64
"""Scenes that are best painted at a time."""


def blank(count: int, side: int) -> np.ndarray:
    """Empty scenes, float32 ``[count, 3, side, side]`` in [0, 1]."""
    background = np.asarray(BACKGROUND, np.float32)[:, None, None]
    return np.broadcast_to(background, (count, 3, side, side)).copy()


def paint(
    pictures: np.ndarray,
    points: np.ndarray,
    size: float,
    colours: np.ndarray,
    shapes: np.ndarray | str = "circle",
) -> None:
    """Paint one shape into each picture, in place.

    Args:
        pictures: float32 ``[n, 3, side, side]``.
        points: ``[n, 2]``, centres in [-1, 1], y down.
        size: half the side of the box, in the same units.
        colours: ``[n, 3]`` or ``[3]``.
        shapes: index into ``SHAPES`` for each row, or the name of one for all.
    """
    colours = np.broadcast_to(np.asarray(colours, np.float32), (len(pictures), 3))
    for name in [shapes] if isinstance(shapes, str) else SHAPES:
        rows = np.arange(len(pictures)) if isinstance(shapes, str) else np.flatnonzero(shapes == SHAPES.index(name))
        if len(rows):
            _paint_rows(pictures, rows, name, points[rows], size, colours[rows])


def _paint_rows(pictures, rows, shape, points, size, colours) -> None:
    """Only the square of pixels that the shape can reach is looked at."""
    side = pictures.shape[-1]
    centre = (points.astype(np.float32) + 1) / 2
    reach = min(side, int(np.ceil(size * side)) + 3)
    corner = np.clip(np.floor(centre * side).astype(int) - reach // 2, 0, side - reach)
    # coverage() measures in fractions of the side of what it draws, here a window of ``reach`` pixels.
    local = (centre * side - corner) / reach
    alpha = coverage(shape, local[:, 0, None, None], local[:, 1, None, None], size / 2 * side / reach, reach)
    alpha = alpha.astype(np.float32)[:, None]
    span = np.arange(reach)
    y, x = corner[:, 1, None, None] + span[:, None], corner[:, 0, None, None] + span
    place = (rows[:, None, None, None], np.arange(3)[:, None, None], y[:, None], x[:, None])
    under = pictures[place]
    pictures[place] = under + alpha * (colours[:, :, None, None] - under)


def as_bytes(pictures: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8."""
    return (pictures * 255 + 0.5).astype(np.uint8)
