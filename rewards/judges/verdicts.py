"""Reading what a judge wrote; a text that says nothing clear has no verdict, which is None and never a low score."""

from __future__ import annotations

import math
import re

from mmrl.errors import UserError

# Neither a piece of a longer number ("1,000", "2.3.4") nor of a word ("3D").
_NUMBER = r"(?<![\w.,])[-+−]?\d+(?:\.\d+|,\d{1,2})?(?!\w|[.,]\d)"
_BETWEEN = r"(?:[\s:=*_\"'`~]|\b(?:is|of|as|at)\b|-(?=\s))*"
_NAMED = re.compile(rf"\b(?:scores?|ratings?|grade|verdict|answer)\b{_BETWEEN}({_NUMBER})", re.IGNORECASE)
_OUT_OF = re.compile(rf"({_NUMBER})\s*(?:/|\bout of\b)\s*\d+(?:\.\d+)?", re.IGNORECASE)
_TAGGED = re.compile(r"<(answer|score|rating)>(.*?)</\1>", re.IGNORECASE | re.DOTALL)
_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.IGNORECASE | re.DOTALL)
_WORD = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


def check_pattern(pattern: str | None, where: str) -> None:
    """Raise ``UserError`` unless ``pattern`` is None or a regular expression with one group."""
    if pattern is None:
        return
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise UserError(f"{where}: pattern is {pattern!r}, which is not a regular expression: {error}") from error
    if groups != 1:
        raise UserError(f"{where}: pattern is {pattern!r}, but should have one group, around the number")


def parse_score(text: str, low: float, high: float, pattern: str | None = None) -> float | None:
    """The number that a verdict gives, or None if it gives none, several, or one outside ``[low, high]``.

    Looked at in this order: the last ``<answer>``, ``<score>`` or ``<rating>`` tag and nothing else where there is one;
    the last number that follows the word score, rating, grade, verdict or answer; the only number. Thoughts in
    ``<think>`` are left out, and "7/10" or "7 out of 10" is 7.

    Args:
        pattern: instead of all this, a regular expression whose group is the number; the last match counts.
    """
    if pattern is not None:
        found = [match.strip() for match in re.findall(pattern, text)]
    else:
        text = _THOUGHT.sub(" ", text)
        tags = _TAGGED.findall(text)
        text = _OUT_OF.sub(r"\1", tags[-1][1] if tags else text)
        found = _NAMED.findall(text)
        if not found:
            found = re.findall(_NUMBER, text)
            found = found if len(set(found)) == 1 else []
    if not found or re.fullmatch(_NUMBER, found[-1]) is None:
        return None
    number = float(found[-1].replace("−", "-").replace(",", "."))
    return number if math.isfinite(number) and low <= number <= high else None


def parse_yes_no(text: str) -> float | None:
    """1 for yes, 0 for no, None for neither or both. Tags and thoughts are treated as in :func:`parse_score`."""
    text = _THOUGHT.sub(" ", text)
    tags = _TAGGED.findall(text)
    found = {word.lower() for word in _WORD.findall(tags[-1][1] if tags else text)}
    return {frozenset({"yes"}): 1.0, frozenset({"no"}): 0.0}.get(frozenset(found))
