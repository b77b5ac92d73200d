"""Anti-aliased drawing of scenes; the same coverage functions serve the verifier as templates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmrl.world.scenes import COLOURS, SHAPES, Scene

CROSS_ARM = 0.36
"""Half the width of a cross's arm, as a fraction of half its side."""

AREA = {"circle": np.pi, "square": 4.0, "triangle": 2.0, "cross": 8 * CROSS_ARM - 4 * CROSS_ARM**2}
"""Area of each shape in units of its half-side squared."""

CENTROID = {"circle": 0.0, "square": 0.0, "triangle": 1 / 3, "cross": 0.0}
"""How far the centroid lies below the centre of the box, in units of the half-side."""

assert set(AREA) == set(CENTROID) == set(SHAPES)


def coverage(shape: str, x: np.ndarray, y: np.ndarray, size: np.ndarray | float, side: int) -> np.ndarray:
    """How much of each pixel a shape covers, in [0, 1].

    Args:
        shape: one of ``SHAPES``.
        x, y, size: centre and half-side of the box as fractions of the side; arrays broadcast, e.g. ``[K, 1, 1]``.
        side: picture size in pixels.

    Returns:
        ``[..., side, side]``. The signed distance to the outline, in pixels, becomes a one-pixel ramp.
    """
    grid = (np.arange(side) + 0.5) / side
    u, v = grid[None, :] - x, grid[:, None] - y
    distance = _DISTANCE[shape](u, v, size)
    return np.clip(0.5 - distance * side, 0.0, 1.0)


def _box(u: np.ndarray, v: np.ndarray, half_u: np.ndarray | float, half_v: np.ndarray | float) -> np.ndarray:
    return np.maximum(np.abs(u) - half_u, np.abs(v) - half_v)


def _circle(u, v, size):
    return np.hypot(u, v) - size


def _square(u, v, size):
    return _box(u, v, size, size)


def _cross(u, v, size):
    return np.minimum(_box(u, v, size, CROSS_ARM * size), _box(u, v, CROSS_ARM * size, size))


def _triangle(u, v, size):
    # apex at the top; each slanted side has the normal (2, -1) / sqrt(5)
    slanted = (2 * np.abs(u) - v - size) / np.sqrt(5)
    return np.maximum(slanted, v - size)


_DISTANCE = {"circle": _circle, "square": _square, "triangle": _triangle, "cross": _cross}


def draw(scenes: Sequence[Scene], side: int = 32) -> Tensor:
    """Pictures ``[N, 3, side, side]`` in [0, 1], float32."""
    pictures = np.empty((len(scenes), 3, side, side), dtype=np.float32)
    for picture, scene in zip(pictures, scenes, strict=True):
        picture[:] = np.asarray(scene.background)[:, None, None]
        for o in scene.objects:
            alpha = coverage(o.shape, o.x, o.y, o.size, side)
            picture += alpha * (np.asarray(COLOURS[o.colour])[:, None, None] - picture)
    return torch.from_numpy(pictures)


def save_grid(pictures: Tensor, path: str | Path, columns: int = 8, zoom: int = 4) -> None:
    """Write ``[N, 3, H, W]`` in [0, 1] as one PNG, ``columns`` a row, each pixel ``zoom`` times its size."""
    from PIL import Image

    n, _, height, width = pictures.shape
    rows = -(-n // columns)
    sheet = np.ones((rows * (height + 1), columns * (width + 1), 3), dtype=np.float32)
    for k, picture in enumerate(pictures.clamp(0, 1).permute(0, 2, 3, 1).cpu().float().numpy()):
        top, left = (k // columns) * (height + 1), (k % columns) * (width + 1)
        sheet[top : top + height, left : left + width] = picture
    image = Image.fromarray((sheet * 255).round().astype(np.uint8))
    image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST).save(path)
