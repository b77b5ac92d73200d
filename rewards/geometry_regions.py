"""Rewards for pointing into regions of any form: polygons and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmrl.errors import UserError
from mmrl.media import open_picture
from rewards.geometry import Frame
from rewards.geometry_places import Geometry
from rewards.geometry_points import MOST_POINTS, Places, Positive
from rewards.parsing import finite
from rewards.text import Row


@dataclass(frozen=True)
class Polygon:
    """The inside of a closed line through points, in unit coordinates; even-odd where the line crosses itself."""

    corners: np.ndarray

    def gap(self, point: np.ndarray) -> float:
        """Distance of a point to the region; 0 inside."""
        start, end = self.corners, np.roll(self.corners, -1, axis=0)
        crosses = (start[:, 1] > point[1]) != (end[:, 1] > point[1])
        rise = np.where(crosses, end[:, 1] - start[:, 1], 1.0)
        at = start[:, 0] + (point[1] - start[:, 1]) / rise * (end[:, 0] - start[:, 0])
        if (crosses & (point[0] < at)).sum() % 2:
            return 0.0
        way = end - start
        along = ((point - start) * way).sum(1) / np.maximum((way * way).sum(1), 1e-12)
        nearest = start + along.clip(0, 1)[:, None] * way
        return float(np.hypot(*(point - nearest).T).min())


@dataclass(frozen=True)
class Mask:
    """The pixels of a picture that are set."""

    pixels: np.ndarray

    def gap(self, point: np.ndarray) -> float:
        """Distance of a point to the region, in unit coordinates; 0 inside."""
        size = np.array(self.pixels.shape[::-1])
        column, row = np.clip(np.floor(point * size).astype(int), 0, size - 1)
        if self.pixels[row, column] and ((point >= 0) & (point <= 1)).all():
            return 0.0
        around = np.pad(self.pixels, 1)
        within = around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
        edge = np.argwhere(self.pixels & ~within)[:, ::-1]
        # To the nearest point of a pixel, not to its middle.
        nearest = np.clip(point, edge / size, (edge + 1) / size)
        return float(np.hypot(*(point - nearest).T).min())


class PointInRegion(Geometry):
    """Share of the answer's points that lie in the true region, as Embodied-R1 (arXiv 2508.13998) asks for, in [0, 1].

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        reach: a point outside counts ``max(0, 1 - d / reach)``, d its distance to the region in unit coordinates;
            without it, 0.
        picture: which of the prompt's pictures is meant, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a polygon ``[[x, y], ...]``, a list of them, or a
            mask, which is a picture of any size (file, PIL, array or tensor) whose bright pixels are the region.
    """

    name = "point_in_region"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        reach: Positive | None = None,
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.reach = reach
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        regions = self.regions(row)
        points = np.array(self.points(row)[: MOST_POINTS + 1], dtype=float).reshape(-1, 2)
        if not 0 < len(points) <= MOST_POINTS:
            return 0.0
        gaps = np.array([min(region.gap(point) for region in regions) for point in points])
        marks = gaps <= 0 if self.reach is None else (1 - gaps / self.reach).clip(0)
        return float(marks.mean())

    def regions(self, row: Row) -> Sequence[Polygon | Mask]:
        """What is right, at least one region."""
        wanted = "a polygon of at least three points [x, y], a list of such polygons, or a mask with a bright pixel"
        value = row.prompt.metadata.get(self.column) if self.column else row.prompt.target
        if _is_picture(value):
            try:
                pixels = np.asarray(open_picture(value).convert("L")) > 127
            except UserError as error:
                raise row.refuse(f"has a mask that cannot be read: {error}") from error
            if not pixels.any():
                raise row.refuse(f"has a mask without a bright pixel, but its truth should be {wanted}")
            return [Mask(pixels)]
        truth = row.truth()
        if not isinstance(truth, list) or not truth or not all(isinstance(item, list) and item for item in truth):
            raise row.bad_truth(str(truth), wanted)
        several = [truth] if all(finite(item[0]) is not None for item in truth) else truth
        if any(len(polygon) < 3 for polygon in several):
            raise row.bad_truth(str(truth), wanted)
        return [Polygon(np.array([self.true_point(row, point) for point in polygon])) for polygon in several]

    def places(self, row: Row) -> Places:
        return [("predicted", [("point", point) for point in self.points(row)])]


def _is_picture(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip()[:1] not in ("[", "{", "")
    return isinstance(value, Mapping) or hasattr(value, "__array_interface__") or hasattr(value, "__array__")
