"""Rewards for answers with a known truth: words, numbers, choices, classes, orders, lists with partial credit, actions.

Where an answer stands is the same for all: in the last ``<answer>`` tag, see :func:`rewards.parsing.answer_of`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrl.errors import UserError
from rewards.geometry import Frame, inside, match
from rewards.geometry_places import Geometry
from rewards.parsing import (
    MOST,
    POINT_KEYS,
    answer_of,
    choice_of,
    finite,
    integers,
    json_values,
    number_of,
    plain_words,
    points_in,
)
from rewards.text import Row, TextReward

Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]


class Answer(TextReward):
    """What these rewards share: where the answer stands."""

    tag = "answer"
    strict = False

    def answer(self, row: Row) -> str | None:
        """What the model answered; None if it did not, see :func:`rewards.parsing.answer_of`."""
        return answer_of(row.text, self.tag, self.strict)


class Exact(Answer):
    """1 for the true answer, else 0. Case, white space and outer punctuation do not count.

    Args:
        case: letters have to be of the same case, and nothing but white space is taken off.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a text or number, or a list of which any will do.
    """

    name = "exact"

    def __init__(self, case: bool = False, tag: str = "answer", strict: bool = False, column: str = ""):
        self.case = case
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truths = {self._plain(text) for text in row.text_truths()}
        answer = self.answer(row)
        return 0.0 if answer is None else float(self._plain(answer) in truths)

    def _plain(self, text: str) -> str:
        # A text of punctuation alone must not be like the empty one.
        return text.strip() if self.case else plain_words(text) or text.strip()


class Choice(Answer):
    """1 for the right letter of a multiple-choice question, else 0; see :func:`rewards.parsing.choice_of`.

    Args:
        options: column of the data with the list of texts to choose from; the text of one is as good as its letter.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a letter, or one of the options.
    """

    name = "choice"

    def __init__(self, options: str = "options", tag: str = "answer", strict: bool = False, column: str = ""):
        self.options = options
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        texts = row.prompt.metadata.get(self.options) or ()
        texts = [str(text) for text in texts] if isinstance(texts, (list, tuple)) else []
        truth = choice_of(row.text_truth(), texts)
        if truth is None:
            raise row.bad_truth(row.text_truth(), "the letter of a choice")
        answer = self.answer(row)
        return 0.0 if answer is None else float(choice_of(answer, texts) == truth)


class Number(Answer):
    """1 for the right number, else 0.

    Thousands may be separated by commas, ``3/4`` is a fraction, and of several numbers the last counts. If only one
    side has a per cent sign, ``45%`` is right for 45 and for 0.45.

    Args:
        tolerance: allowed difference.
        relative: allowed difference as a share of the truth; 0.05 is the relaxed accuracy of ChartQA.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a number, or a text with one.
    """

    name = "number"

    def __init__(
        self,
        tolerance: NotNegative = 0.0,
        relative: NotNegative = 0.0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.tolerance, self.relative = tolerance, relative
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        wanted = row.text_truth()
        truth = number_of(wanted)
        if truth is None:
            raise row.bad_truth(wanted, "a number")
        answer = self.answer(row)
        found = None if answer is None else number_of(answer)
        if found is None:
            return 0.0
        readings = [(found, truth)]
        if ("%" in answer) != ("%" in wanted):
            readings.append((found / 100, truth) if "%" in answer else (found, truth / 100))
        return float(any(self._near(a, b) for a, b in readings))

    def _near(self, found: float, truth: float) -> bool:
        # Not less than what float arithmetic makes of equal numbers.
        allowed = max(self.tolerance, self.relative * abs(truth), 1e-9 * abs(truth))
        return math.isclose(found, truth, rel_tol=0.0, abs_tol=allowed)


class Classification(Answer):
    """1 for the right class, else 0, after CLS-RL (arXiv 2503.16188).

    Args:
        thinking: the class has to stand in the tag. Without (the paper's "no-thinking" reward), the whole text has to
            be the class and nothing else, so a model learns to answer at once.
        contains: an answer that has the class among its words will do. Only with ``thinking``.
        tag: the answer stands in ``<tag>``.
        column: of the data with the truth instead of ``target``: the class, or a list of names of which any will do.
    """

    name = "classification"

    def __init__(self, thinking: bool = True, contains: bool = False, tag: str = "answer", column: str = ""):
        if contains and not thinking:
            raise UserError("reward 'classification': contains: true needs thinking: true")
        self.contains = contains
        self.tag, self.strict, self.column = tag if thinking else "", True, column
        self.thinking = thinking

    def score(self, row: Row) -> float:
        truths = [plain_words(text) for text in row.text_truths()]
        answer = self.answer(row) if self.thinking else row.text
        if answer is None:
            return 0.0
        words = plain_words(answer)
        if self.contains:
            return float(any(f" {truth} " in f" {words} " for truth in truths))
        return float(words in truths)


class Permutation(Answer):
    """How much of an order is right, as in Visual Jigsaw (arXiv 2509.25190).

    1 for the right order; ``partial`` times the share of right places for another order of the same things; 0 for
    anything that is no such order.

    Args:
        partial: at most this for what is not all right (0.2 in the paper).
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a list of different whole numbers.
    """

    name = "permutation"

    def __init__(self, partial: Share = 0.2, tag: str = "answer", strict: bool = False, column: str = ""):
        self.share = partial
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = row.truth()
        whole = isinstance(truth, list) and all(isinstance(x, int) and not isinstance(x, bool) for x in truth)
        if not whole or not truth or len(set(truth)) != len(truth):
            raise row.bad_truth(str(truth), "a list of different whole numbers")
        answer = self.answer(row)
        found = [] if answer is None else integers(answer)
        if found == truth:
            return 1.0
        if sorted(found) != sorted(truth):
            return 0.0
        return self.share * sum(a == b for a, b in zip(found, truth, strict=True)) / len(truth)


class PartialCredit(Answer):
    """Credit for parts of the items of a list, and penalties for guessing and for leaving out, after STAR-R1.

    An item is a list of fields from the general to the specific, such as ``[object, attribute, value]``. Items are
    matched one to one so that the credit is highest; a pair whose first k fields agree earns ``credits[k - 1]``. Each
    item of the answer without a match costs ``wrong``, each true item without a match ``missing``.

    Args:
        credits: for the first field alone, the first two, and so on, growing; those of STAR-R1 (arXiv 2505.15804).
        wrong: penalty for an item that matches none; listing everything does not pay.
        missing: penalty for a true item that is not there; saying nothing does not pay.
        normalise: divide by the credit of a perfect answer, so that the best score is 1.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a list of lists, or of mappings whose values count in
            their order.

    The answer is read as JSON, a list of lists or of mappings, or as ``(0, colour, red), (2, size, small)``.
    """

    name = "partial_credit"

    def __init__(
        self,
        credits: tuple[float, ...] = (0.5, 1.5, 5.0),
        wrong: NotNegative = 1.0,
        missing: NotNegative = 1.0,
        normalise: bool = True,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        if not credits or any(a >= b for a, b in zip((0.0, *credits), credits, strict=False)):
            raise UserError(f"reward 'partial_credit': credits are {list(credits)}, but should be positive and grow")
        self.credits, self.wrong, self.missing, self.normalise = tuple(credits), wrong, missing, normalise
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = row.truth()
        wanted = _items(truth)
        if not isinstance(truth, list) or not wanted or any(len(item) != len(self.credits) for item in wanted):
            raise row.bad_truth(str(truth), f"a list of items of {len(self.credits)} fields each")
        answer = self.answer(row)
        found = [] if answer is None else _items_of(answer)[:MOST_ITEMS]
        gains = np.array([[self._credit(item, true) for true in wanted] for item in found])
        pairs = match(gains) if found else []
        total = sum(gains[pair] for pair in pairs)
        total -= self.wrong * (len(found) - len(pairs)) + self.missing * (len(wanted) - len(pairs))
        return float(total / (self.credits[-1] * len(wanted)) if self.normalise else total)

    def _credit(self, item: list[str], true: list[str]) -> float:
        agree = 0
        for field, wanted in zip(item, true, strict=False):
            if field != wanted:
                break
            agree += 1
        return self.credits[agree - 1] if agree else 0.0


MOST_ITEMS = 256
_ROUND = re.compile(r"[(\[]([^()\[\]]{1,200})[)\]]")


def _items_of(answer: str) -> list[list[str]]:
    values = json_values(answer)
    found = _items(values[0] if len(values) == 1 else values)
    return found or [[_field(field) for field in item.split(",")] for item in _ROUND.findall(answer[-MOST:])]


def _items(value: Any) -> list[list[str]]:
    """A list of lists or mappings as lists of comparable fields; a single item is a list of one."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        return []
    if value and not any(isinstance(item, (list, Mapping)) for item in value):
        value = [value]
    rows = [list(item.values()) if isinstance(item, Mapping) else item for item in value]
    return [[_field(field) for field in row] for row in rows if isinstance(row, list)]


def _field(value: Any) -> str:
    number = finite(value)
    return f"{number:g}" if number is not None else plain_words(str(value)[:1000])


class GuiAction(Geometry):
    """The next action on a screen: its kind, where it goes, and the text, after GUI-R1 (arXiv 2504.10458).

    The answer is JSON, ``{"action": "click", "point": [x, y], "input_text": "..."}``, or a list whose first item is
    such a mapping. Parts that the truth has are scored: the kind of action by equality, the point by lying in the true
    box (or within ``radius`` of the true point), the text by an F1 of its words above 0.5.

    Args:
        frame: what the model's coordinates count in, see :data:`rewards.geometry.Frame`.
        target_frame: the same of the data; default, ``frame``.
        combine: "mean" of the parts, or "all": 1 if every part is right and else 0. The paper's sum is the mean times
            the number of parts.
        radius: in unit coordinates, around a true point.
        picture: which of the prompt's pictures is the screen, from 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a mapping with ``action``, and ``bbox`` or ``point``,
            and ``text`` where they matter.
    """

    name = "gui_action"

    def __init__(
        self,
        frame: Frame,
        target_frame: Frame | None = None,
        combine: Literal["mean", "all"] = "mean",
        radius: NotNegative = 0.04,
        picture: int = 0,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.frame, self.target_frame, self.picture = frame, target_frame, picture
        self.combine, self.radius = combine, radius
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truth = row.truth()
        if not isinstance(truth, Mapping) or not isinstance(truth.get("action"), str):
            raise row.bad_truth(truth, "a mapping with an 'action'")
        action = self._action(row)
        marks = [float(plain_words(str(action.get("action", ""))) == plain_words(truth["action"]))]
        target = self._target(row, truth)
        if target is not None:
            points = self.points(row)
            marks.append(float(len(points) == 1 and inside(points[0], target)))
        wanted = next((truth[key] for key in TEXT_KEYS if truth.get(key)), None)
        if wanted is not None:
            given = next((action[key] for key in TEXT_KEYS if key in action), "")
            marks.append(float(word_f1(str(given), str(wanted)) > 0.5))
        return sum(marks) / len(marks) if self.combine == "mean" else float(all(marks))

    def _target(self, row: Row, truth: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
        if any(key in truth for key in ("bbox", "bbox_2d", "box")):
            return self.true_box(row, truth)
        if "point" in truth:
            x, y = self.true_point(row, truth)
            return (x - self.radius, y - self.radius, x + self.radius, y + self.radius)
        return None

    def _action(self, row: Row) -> Mapping[str, Any]:
        answer = self.answer(row)
        values = [] if answer is None else json_values(answer)
        first = values[0] if values else {}
        while isinstance(first, list) and first:
            first = first[0]
        return first if isinstance(first, Mapping) else {}

    def points(self, row: Row) -> list[tuple[float, float]]:
        action = self._action(row)
        found = points_in(next((action[key] for key in POINT_KEYS if key in action), None))
        return [self.unit(row, point) for point in found]

    def places(self, row: Row) -> list[tuple[str, list[tuple[str, Any]]]]:
        target = self._target(row, row.truth())
        found = [("point", point) for point in self.points(row)]
        return [("predicted", found), ("true", [] if target is None else [("box", target)])]


TEXT_KEYS = ("input_text", "text", "input text", "value", "content")


def word_f1(given: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition; 1 if both are empty."""
    found, true = (Counter(plain_words(text).split()) for text in (given, wanted))
    if not found or not true:
        return float(found == true)
    shared = sum((found & true).values())
    return 2 * shared / (sum(found.values()) + sum(true.values()))
