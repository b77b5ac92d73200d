"""Rewards for points, paths, intervals of time and numbers of things in what a model wrote.

Frames are declared as for boxes; see :mod:`rewards.geometry_boxes`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from rewards.geometry import (
    Frame,
    distance,
    dtw,
    frechet,
    hausdorff,
    inside,
    interval_iou,
    match,
    mean_distance,
    rms_distance,
)
from rewards.geometry_places import Geometry
from rewards.parsing import answer_of, boxes_of, count_of, finite, interval_of, points_of
from rewards.text import Row, TextReward

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Places = list[tuple[str, list[tuple[str, Sequence[float]]]]]
Falloff = Literal["exponential", "linear", "within"]

MEASURES = {"frechet": frechet, "mean": mean_distance, "rmse": rms_distance, "hausdorff": hausdorff, "dtw": dtw}

MOST_POINTS = 512
"""A path of more points is no answer."""


class PointInBox(Geometry):
    """Share of the answer's points that lie in the true box, or in one of several (pointing, clicking).

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        picture: which of the prompt's pictures is meant, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a box or a list of boxes.
    """

    name = "point_in_box"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = [box for box, _ in self.true_boxes(row)]
        if not truth:
            raise row.bad_truth(row.truth(), "a box or a list of at least one")
        points = self.points(row)
        return sum(any(inside(point, box) for box in truth) for point in points) / len(points) if points else 0.0

    def places(self, row: Row) -> Places:
        return [
            ("predicted", [("point", point) for point in self.points(row)]),
            ("true", [("box", box) for box, _ in self.true_boxes(row)]),
        ]


def closeness(gap: float, reach: float, falloff: Falloff) -> float:
    """A distance as a mark in [0, 1]: ``exp(-d / reach)``, ``max(0, 1 - d / reach)``, or 1 if ``d <= reach``."""
    if falloff == "exponential":
        return math.exp(-gap / reach)
    return max(0.0, 1 - gap / reach) if falloff == "linear" else float(gap <= reach)


class PointDistance(Geometry):
    """How near the answer's points are to the true ones; several are matched one to one.

    The score is the sum of the marks of all pairs over the larger number of points, in [0, 1]. Distances are those of
    unit coordinates: 0.1 is a tenth of the width or of the height.

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        reach: the distance d at which the mark of a pair has fallen to 1/e, or to 0, depending on ``falloff``.
        falloff: "exponential" ``exp(-d / reach)``, "linear" ``max(0, 1 - d / reach)``, "within" 1 up to ``reach``.
        picture: which of the prompt's pictures is meant, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a point ``[x, y]`` or a list of points.
    """

    name = "point_distance"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        reach: Positive = 0.1,
        falloff: Falloff = "exponential",
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.measure: tuple[float, Falloff] = (reach, falloff)
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = self.true_points(row)
        points = self.points(row)
        if not 0 < len(points) <= MOST_POINTS:
            return 0.0
        marks = np.array([[closeness(distance(point, true), *self.measure) for true in truth] for point in points])
        return float(sum(marks[pair] for pair in match(marks)) / max(len(points), len(truth)))

    def places(self, row: Row) -> Places:
        return [
            ("predicted", [("point", point) for point in self.points(row)]),
            ("true", [("point", point) for point in self.true_points(row)]),
        ]


class Trajectory(PointDistance):
    """How near the answer's path is to the true one: ``exp(-d / reach)`` as in VLA-R1 (arXiv 2510.01623), in [0, 1].

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        measure: what d is, in unit coordinates: the discrete ``frechet`` distance of the two paths; the ``mean`` or
            root-mean-square (``rmse``) distance of points at equal shares of their lengths; the ``hausdorff`` distance;
            or the mean distance of the best alignment in order (``dtw``). VLA-R1's own measure is Frechet's with angles
            and lengths of segments added.
        reach: the distance at which the score has fallen to 1/e.
        picture: which of the prompt's pictures is meant, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a list of at least two points.
    """

    name = "trajectory"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        measure: Literal["frechet", "mean", "rmse", "hausdorff", "dtw"] = "frechet",
        reach: Positive = 0.1,
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.between, self.reach = MEASURES[measure], reach
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = self.true_points(row)
        if len(truth) < 2:
            raise row.bad_truth(row.truth(), "a list of at least two points [x, y]")
        path = self.points(row)
        if not 0 < len(path) <= MOST_POINTS:
            return 0.0
        gap = self.between(path, truth)
        return math.exp(-gap / self.reach) if math.isfinite(gap) else 0.0


class TemporalIou(TextReward):
    """Intersection over union of the answer's interval of time with the true one, in [0, 1] (temporal grounding).

    Args:
        threshold: 1 for an overlap of at least this and else 0; None gives the overlap itself.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: ``[start, end]`` in seconds.
    """

    name = "temporal_iou"

    def __init__(self, threshold: Share | None = None, tag: str = "answer", strict: bool = False, column: str = ""):
        self.threshold = threshold
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        value = row.truth()
        truth = [finite(item) for item in value] if isinstance(value, list) else []
        if len(truth) != 2 or None in truth or not 0 <= truth[0] < truth[1]:
            raise row.bad_truth(str(value), "[start, end] in seconds with 0 <= start < end")
        answer = answer_of(row.text, self.tag, self.strict)
        found = None if answer is None else interval_of(answer)
        if found is None:
            return 0.0
        overlap = interval_iou(found, (truth[0], truth[1]))
        return overlap if self.threshold is None else float(overlap >= self.threshold)


class Counting(TextReward):
    """Whether a number of things is right.

    Args:
        of: the "number" in the answer (also as a word up to twenty), or how many "boxes" or "points" it lists.
        graded: ``max(0, 1 - |n - truth| / max(truth, 1))`` in place of 1 or 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a whole number.
    """

    name = "counting"

    def __init__(
        self,
        of: Literal["number", "boxes", "points"] = "number",
        graded: bool = False,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.of, self.graded = of, graded
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        value = row.truth()
        truth = count_of(value) if isinstance(value, str) else finite(value)
        if truth is None or truth < 0 or truth != int(truth):
            raise row.bad_truth(value, "a whole number of things")
        answer = answer_of(row.text, self.tag, self.strict)
        if answer is None:
            return 0.0
        found = self._count(answer)
        if found is None:
            return 0.0
        return max(0.0, 1 - abs(found - truth) / max(truth, 1.0)) if self.graded else float(found == truth)

    def _count(self, answer: str) -> float | None:
        if self.of == "number":
            return count_of(answer)
        return float(len(boxes_of(answer) if self.of == "boxes" else points_of(answer)))
