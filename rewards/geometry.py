"""Boxes, points, intervals and paths: overlaps, distances, matchings, and the frames in which they are given.

Boxes are (left, top, right, bottom) with x to the right and y down. A box whose right is not beyond its left, or whose
bottom is not below its top, is *degenerate*: it overlaps nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from mmrl.errors import UserError
from rewards.parsing import Box, Point

Frame = Literal["pixels", "original", "thousand", "unit"]
"""What coordinates count in.

* ``pixels``: of the picture as the model saw it after its processor resized it, as Qwen2.5-VL answers;
* ``original``: pixels of the picture as it is in the data;
* ``thousand``: 0 to 1000 along each side, as Qwen2-VL and Qwen3-VL answer;
* ``unit``: 0 to 1 along each side.
"""

Size = tuple[float, float]

_FIXED: dict[str, Size] = {"thousand": (1000.0, 1000.0), "unit": (1.0, 1.0)}


def frame_size(frame: Frame, shown: Callable[[], Size], original: Callable[[], Size]) -> Size:
    """(width, height) of the whole picture in a frame; the two functions are asked only where they matter."""
    if frame in _FIXED:
        return _FIXED[frame]
    return shown() if frame == "pixels" else original()


def to_unit(values: Sequence[float], size: Size) -> tuple[float, ...]:
    """x, y, x, y... divided by (width, height)."""
    return tuple(value / size[i % 2] for i, value in enumerate(values))


def degenerate(box: Box) -> bool:
    """Whether the box has no area."""
    return not (box[2] > box[0] and box[3] > box[1])


def area(box: Box) -> float:
    """0 for a degenerate box."""
    return 0.0 if degenerate(box) else (box[2] - box[0]) * (box[3] - box[1])


def _shared(a: Box, b: Box) -> float:
    if degenerate(a) or degenerate(b):
        return 0.0
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def iou(a: Box, b: Box) -> float:
    """Intersection over union, in [0, 1]; 0 where both boxes are degenerate."""
    shared = _shared(a, b)
    union = area(a) + area(b) - shared
    # Boxes so large that their area overflows give inf / inf.
    return shared / union if shared > 0 and math.isfinite(union) else 0.0


def giou(a: Box, b: Box) -> float:
    """Generalised IoU (arXiv 1902.09630): IoU minus the share of the hull that neither covers, in [-1, 1].

    -1, the worst, if either box is degenerate.
    """
    if degenerate(a) or degenerate(b):
        return -1.0
    hull = area((min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3])))
    if not math.isfinite(hull):
        return -1.0
    union = area(a) + area(b) - _shared(a, b)
    return iou(a, b) - (hull - union) / hull


def interval_iou(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Intersection over union of two intervals of time; 0 for one that ends before it starts."""
    return iou((a[0], 0.0, a[1], 1.0), (b[0], 0.0, b[1], 1.0))


def inside(point: Point, box: Box) -> bool:
    """Whether a point is in a box or on its edge."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def distance(a: Point, b: Point) -> float:
    """Euclidean."""
    return math.hypot(a[0] - b[0], a[1] - b[1])


def match(gains: np.ndarray) -> list[tuple[int, int]]:
    """The pairs (row, column) of a one-to-one matching with the largest sum of ``gains [R, C]``; none with gain 0.

    The Hungarian method, by scipy.
    """
    if 0 in gains.shape:
        return []
    try:
        from scipy.optimize import linear_sum_assignment
    except ModuleNotFoundError as error:
        raise UserError("matching boxes, points or items needs the package scipy: pip install 'mmrl[text]'") from error
    rows, columns = linear_sum_assignment(gains, maximize=True)
    return [(int(r), int(c)) for r, c in zip(rows, columns, strict=True) if gains[r, c] > 0]


def frechet(a: Sequence[Point], b: Sequence[Point]) -> float:
    """Discrete Fréchet distance of two paths of at least one point (Eiter and Mannila, 1994)."""
    between = _distances(a, b)
    reach = np.empty_like(between)
    reach[0] = np.maximum.accumulate(between[0])
    reach[:, 0] = np.maximum.accumulate(between[:, 0])
    for i in range(1, len(a)):
        for j in range(1, len(b)):
            least = min(reach[i - 1, j], reach[i - 1, j - 1], reach[i, j - 1])
            reach[i, j] = max(least, between[i, j])
    return float(reach[-1, -1])


def mean_distance(a: Sequence[Point], b: Sequence[Point], samples: int = 16) -> float:
    """Mean distance of two paths at ``samples`` equal shares of their lengths."""
    gaps = resample(a, samples) - resample(b, samples)
    return float(np.hypot(gaps[:, 0], gaps[:, 1]).mean())


def rms_distance(a: Sequence[Point], b: Sequence[Point], samples: int = 16) -> float:
    """Root of the mean squared distance of two paths at ``samples`` equal shares of their lengths."""
    gaps = resample(a, samples) - resample(b, samples)
    return float(np.sqrt((gaps**2).sum(1).mean()))


def hausdorff(a: Sequence[Point], b: Sequence[Point]) -> float:
    """Largest distance of a point of one path to the nearest of the other; the order of points does not count."""
    between = _distances(a, b)
    return float(max(between.min(0).max(), between.min(1).max()))


def dtw(a: Sequence[Point], b: Sequence[Point]) -> float:
    """Dynamic time warping: least sum of distances of an alignment in order, over the points of the longer path."""
    between = _distances(a, b)
    cost = np.full((len(a) + 1, len(b) + 1), np.inf)
    cost[0, 0] = 0
    for i in range(len(a)):
        for j in range(len(b)):
            cost[i + 1, j + 1] = between[i, j] + min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
    return float(cost[-1, -1] / max(len(a), len(b)))


def resample(path: Sequence[Point], samples: int) -> np.ndarray:
    """``samples`` points ``[S, 2]`` at equal shares of a path's length; a path without length stays where it is."""
    points = np.asarray(path, dtype=float).reshape(-1, 2)
    steps = np.hypot(*np.diff(points, axis=0).T) if len(points) > 1 else np.zeros(0)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    wanted = np.linspace(0.0, along[-1], samples)
    return np.stack([np.interp(wanted, along, points[:, axis]) for axis in (0, 1)], axis=1)


def _distances(a: Sequence[Point], b: Sequence[Point]) -> np.ndarray:
    first, second = (np.asarray(path, dtype=float).reshape(-1, 2) for path in (a, b))
    gaps = first[:, None] - second[None]
    return np.hypot(gaps[..., 0], gaps[..., 1])
