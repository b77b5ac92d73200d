"""Rewards for boxes in what a model wrote: one, several with labels, several that matter more or less.

The frame of the model's coordinates is declared (``frame``), and that of the data (``target_frame``) if it is another;
both become fractions of the picture's width and height before anything is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrl.errors import UserError
from rewards.geometry import Frame, giou, iou, match
from rewards.geometry_places import Geometry
from rewards.parsing import LABEL_KEYS, Box, finite, plain_words, says_nothing
from rewards.text import Row

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Iou(Geometry):
    """Overlap of the one box of the answer with the true one (grounding, referring expressions).

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        kind: "iou" in [0, 1], or "giou" (generalised, arXiv 1902.09630), moved to [0, 1] by ``(1 + giou) / 2``.
        threshold: 1 for an overlap of at least this and else 0; None gives the overlap itself.
        power: of the overlap; 2 rewards the last bit of precision more.
        picture: which of the prompt's pictures is meant, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a box ``[left, top, right, bottom]``.

    An answer with several boxes, or without one, gets 0.
    """

    name = "iou"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        kind: Literal["iou", "giou"] = "iou",
        threshold: Share | None = None,
        power: Positive = 1.0,
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.kind, self.threshold, self.power = kind, threshold, power
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = row.truth()
        while isinstance(truth, list) and len(truth) == 1:
            truth = truth[0]
        truth = self.true_box(row, truth)
        found = self.boxes(row)
        if len(found) != 1:
            return 0.0
        box = found[0][0]
        overlap = iou(box, truth) if self.kind == "iou" else (1 + giou(box, truth)) / 2
        return overlap**self.power if self.threshold is None else float(overlap >= self.threshold)


class Boxes(Geometry):
    """Boxes of several objects with their labels, matched one to one with the true ones (open-vocabulary detection).

    Pairs overlap by at least ``threshold``; of all such matchings the one with the most equal labels and then the
    largest sum of overlaps counts (the Hungarian method). With n true and m predicted boxes of which k pairs match,

    * position: the sum of overlaps of pairs with equal labels, over n;
    * labels: the number of such pairs, over n;
    * completeness: ``1 - ((n - k) / n + (m - k) / m) / 2``.

    The score is their mean, weighted as given, in [0, 1]; 1 if both sides are empty and 0 if only one is. The weights
    are those of VLM-R1 (arXiv 2504.07615), which matches greedily.

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        threshold: lowest overlap of a pair.
        labels: whether labels have to be equal where the truth has one (case and outer punctuation do not count).
        position, label, completeness: weights.
        picture: which of the prompt's pictures is meant, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a list of ``{"bbox_2d": [...], "label": ...}``.
    """

    name = "boxes"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        threshold: Share = 0.5,
        labels: bool = True,
        position: NotNegative = 0.7,
        label: NotNegative = 0.0,
        completeness: NotNegative = 0.3,
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        if position + label + completeness <= 0:
            raise UserError("reward 'boxes': the weights position, label and completeness are all 0")
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.threshold, self.labels = threshold, labels
        self.weights = (position, label, completeness)
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = [(box, _label(given)) for box, given in self.true_boxes(row)]
        answer = self.answer(row)
        if answer is None:
            return 0.0
        found = self.boxes(row)
        if not truth and not found:
            return float(says_nothing(answer))
        if not truth or not found:
            return 0.0
        marks = self._marks(found, truth)
        return sum(w * mark for w, mark in zip(self.weights, marks, strict=True)) / sum(self.weights)

    def _marks(self, found: list[tuple[Box, str]], truth: list[tuple[Box, str]]) -> tuple[float, float, float]:
        overlaps = np.array([[iou(box, true) for true, _ in truth] for box, _ in found])
        equal = np.array([[self._agree(label, true) for _, true in truth] for _, label in found])
        allowed = (overlaps >= self.threshold) & (overlaps > 0)
        pairs = match(np.where(allowed, overlaps + 2.0 * equal, 0.0))
        n, m, k = len(truth), len(found), len(pairs)
        position = sum(overlaps[pair] for pair in pairs if equal[pair]) / n
        labels = sum(bool(equal[pair]) for pair in pairs) / n
        return float(position), labels, 1 - ((n - k) / n + (m - k) / m) / 2

    def _agree(self, label: str, true: str) -> bool:
        return not self.labels or not true or plain_words(label) == plain_words(true)


def _label(given: Mapping[str, Any]) -> str:
    label = next((given[key] for key in LABEL_KEYS if key in given), "")
    return label if isinstance(label, str) else str(label)


class SalientBoxes(Geometry):
    """Overlap with several boxes of which some matter more than others, after GRiP (arXiv 2511.22172).

    Boxes are matched one to one so that ``sum(w * iou)`` is largest; the score is that sum over the sum of all
    weights w, in [0, 1]. Each box beyond the number of true ones adds ``surplus`` mean weights to the divisor, so that
    covering the picture with boxes does not pay. The paper gives the idea and not this divisor.

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        surplus: what a box too many costs, in mean weights.
        picture: which of the prompt's pictures is meant, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a list of ``{"bbox_2d": [...], "weight": 2.0}``;
            the weight is 1 where none is given.
    """

    name = "salient_boxes"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        surplus: NotNegative = 1.0,
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.surplus = surplus
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = self.true_boxes(row)
        if not truth:
            raise row.bad_truth(row.truth(), "a list of at least one box")
        weights = [finite(given.get("weight", given.get("salience", 1.0))) for _, given in truth]
        if None in weights or min(weights) < 0 or sum(weights) == 0:
            raise row.refuse(f"has boxes of weights {weights}, but they should be positive numbers")
        found = self.boxes(row)
        if not found:
            return 0.0
        gains = np.array(
            [[w * iou(box, true) for (true, _), w in zip(truth, weights, strict=True)] for box, _ in found]
        )
        too_many = max(0, len(found) - len(truth)) * self.surplus * sum(weights) / len(weights)
        return float(sum(gains[pair] for pair in match(gains)) / (sum(weights) + too_many))
