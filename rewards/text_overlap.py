"""Rewards for how near a text is to a reference: edit distance, BLEU and chrF, ROUGE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from mmrl.errors import UserError
from rewards.answers import Answer
from rewards.parsing import MOST
from rewards.text import Row


def edit_distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """The fewest insertions, deletions and replacements that turn ``a`` into ``b``: of characters, words or anything.

    Levenshtein's table row by row; the insertions of a row, each of which follows on the last, are one running minimum.
    """
    if len(a) > len(b):
        a, b = b, a
    codes: dict[Any, int] = {}
    first, second = ([codes.setdefault(item, len(codes)) for item in part] for part in (a, b))
    second = np.asarray(second, dtype=np.int64)
    steps = np.arange(len(second) + 1)
    row = steps.copy()
    for number, item in enumerate(first, start=1):
        following = np.empty_like(row)
        following[0] = number
        following[1:] = np.minimum(row[1:] + 1, row[:-1] + (second != item))
        row = np.minimum.accumulate(following - steps) + steps
    return int(row[-1])


class EditDistance(Answer):
    """``1 - d / n`` with the edit distance d of the answer to the true text, in [0, 1]; the best of several truths.

    Args:
        unit: d and n count characters, or words (``1 - d / n`` is then 1 minus the word error rate).
        over: n is the length of the longer text, as in a Levenshtein ratio, or that of the truth; then d counts at most
            n, as in the error rates of text recognition.
        case: upper and lower case differ.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a text, or a list of which any will do.
    """

    name = "edit_distance"

    def __init__(
        self,
        unit: Literal["characters", "words"] = "characters",
        over: Literal["longest", "truth"] = "longest",
        case: bool = True,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        self.unit, self.over, self.case = unit, over, case
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truths = [self._units(text) for text in row.text_truths()]
        if not all(truths):
            raise row.bad_truth("", "a text that is not empty")
        answer = self.answer(row)
        if answer is None:
            return 0.0
        found = self._units(answer[-MOST:])
        return max(self._nearness(found, truth) for truth in truths)

    def _units(self, text: str) -> Sequence[str]:
        text = text.strip() if self.case else text.strip().lower()
        return text if self.unit == "characters" else text.split()

    def _nearness(self, found: Sequence[str], truth: Sequence[str]) -> float:
        whole = len(truth) if self.over == "truth" else max(len(found), len(truth))
        # So many more units cannot be near, and need no table.
        if abs(len(found) - len(truth)) >= whole:
            return 0.0
        return 1 - min(edit_distance(found, truth), whole) / whole


class Bleu(Answer):
    """Overlap of n-grams of the answer with one or more true texts, by sacrebleu, in [0, 1].

    Args:
        metric: "bleu" (of the sentence, with effective order and exponential smoothing) or "chrf" (of characters).
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a text, or a list of which all are references.
    """

    name = "bleu"

    def __init__(
        self,
        metric: Literal["bleu", "chrf"] = "bleu",
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        try:
            from sacrebleu.metrics import BLEU, CHRF
        except ModuleNotFoundError as error:
            raise UserError("reward 'bleu' needs the package sacrebleu: pip install 'mmrl[text]'") from error
        self.metric = BLEU(effective_order=True) if metric == "bleu" else CHRF()
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truths = row.text_truths()
        answer = self.answer(row)
        if not answer:
            return 0.0
        return self.metric.sentence_score(answer[-MOST:], truths).score / 100


class Rouge(Answer):
    """F1 of ROUGE between the answer and the true text, by rouge-score, in [0, 1]; the best of several truths.

    Args:
        kind: "rouge1" and "rouge2" of words and pairs of words, "rougeL" of the longest common subsequence.
        stemmer: count words with the same Porter stem as equal (English).
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a text, or a list of texts.

    Words are runs of Latin letters and digits; the package knows no others.
    """

    name = "rouge"

    def __init__(
        self,
        kind: Literal["rouge1", "rouge2", "rougeL"] = "rougeL",
        stemmer: bool = False,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        try:
            from rouge_score.rouge_scorer import RougeScorer
        except ModuleNotFoundError as error:
            raise UserError("reward 'rouge' needs the package rouge-score: pip install 'mmrl[text]'") from error
        self.kind = kind
        self.scorer = RougeScorer([kind], use_stemmer=stemmer)
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float:
        truths = row.text_truths()
        answer = self.answer(row)
        if not answer:
            return 0.0
        return max(float(self.scorer.score(truth, answer[-MOST:])[self.kind].fmeasure) for truth in truths)
