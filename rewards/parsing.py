"""What a model wrote, read as answers, JSON, boxes, points, numbers, choices and tool calls.

Nothing here raises, whatever the text: what cannot be read is None or an empty list. Work is bounded: no pattern
repeats a repetition, and JSON is looked for in the last :data:`MOST` characters only, to a depth of :data:`DEEPEST`.
Numbers that are not finite are no numbers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 20_000
"""Characters of an answer that are looked at; the last ones count."""

DEEPEST = 32
"""Brackets inside brackets of JSON."""

DIGITS = 15
"""Longest whole number that is read as one; longer ones lose their last digits, as floats."""

Box = tuple[float, float, float, float]
Point = tuple[float, float]

BOX_KEYS = ("bbox_2d", "bbox", "box_2d", "box", "coordinates", "coordinate")
POINT_KEYS = ("point_2d", "point", "coordinate", "coordinates", "position", "click")
LIST_KEYS = ("objects", "boxes", "bboxes", "points", "trajectory", "detections", "answer")
LABEL_KEYS = ("label", "name", "class", "category", "object")

_NUMBER = re.compile(r"(?<![\w.])[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
_GROUPED = re.compile(r"(?<![0-9.,])([0-9]{1,3})((?:,[0-9]{3})+)(?![0-9])")
_CLOCK = re.compile(r"(?<![0-9:])(?:([0-9]{1,3}):)?([0-9]{1,3}):([0-9]{1,2}(?:\.[0-9]{1,6})?)(?![0-9:])")
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)|\.|:|,)?\Z")
_LEADING_LETTER = re.compile(r"(?:\(([A-Za-z])\)|([A-Za-z])[.:)])(?:\s|\Z)")
_NAMED_LETTER = re.compile(r"\b(?i:answer|option|choice)(?: is)?:? ?\(?([A-Z])\b")
_BOXED_LETTER = re.compile(r"\\boxed\{(?:\\text\{)?\(?([A-Za-z])\)?\}")
_BRACKETED_LETTER = re.compile(r"\(([A-Z])\)")
_FENCE = "```"
_PAIRS = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class Marked:
    """A box that a model named.

    Attributes:
        box: (left, top, right, bottom) as written.
        label: what it says is in it; empty if nothing.
    """

    box: Box
    label: str = ""


def tagged(text: str, tag: str) -> str | None:
    """What stands between the last ``<tag>`` and its ``</tag>``, without white space around it."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, end) if end >= 0 else -1
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def every_tagged(text: str, tag: str) -> list[str]:
    """What stands between each ``<tag>`` and the next ``</tag>``, in order."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    found: list[str] = []
    start = text.find(opening)
    while start >= 0:
        end = text.find(closing, start)
        if end < 0:
            break
        found.append(text[start + len(opening) : end].strip())
        start = text.find(opening, end)
    return found


def answer_of(text: str, tag: str = "answer", strict: bool = False) -> str | None:
    """The answer inside ``<tag>``.

    A text without such a tag is itself the answer, from its last ``</think>`` on, unless ``strict``. None for a tag
    that was opened and never closed, as in a text that was cut. An empty ``tag`` means that answers have none.
    """
    if tag:
        found = tagged(text, tag)
        if found is not None:
            return found
        if strict or f"<{tag}>" in text:
            return None
    return text[text.rfind("</think>") + len("</think>") :].strip() if "</think>" in text else text.strip()


def loads(text: str) -> Any:
    """A JSON value, or Python's way of writing one (single quotes, True, None); None if it is neither."""
    text = text.strip()
    if not text or len(text) > MOST or _depth(text) > DEEPEST:
        return None
    for attempt in (text, _with_double_quotes(text) if "'" in text else None):
        if attempt is None:
            continue
        try:
            return json.loads(attempt, parse_int=_whole, parse_float=float, parse_constant=_not_a_number, strict=False)
        except (ValueError, RecursionError):
            continue
    return None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= DIGITS else float(digits)


def _not_a_number(name: str) -> float:
    return math.nan


def _depth(text: str) -> int:
    depth = deepest = 0
    for letter in text:
        if letter in "[{(":
            depth += 1
            deepest = max(deepest, depth)
        elif letter in "]})":
            depth -= 1
    return deepest


_WORDS = {"True": "true", "False": "false", "None": "null"}


def _with_double_quotes(text: str) -> str:
    """Python's literals as JSON: quotes, the three words, and tuples as lists."""
    parts: list[str] = []
    position = 0
    while position < len(text):
        letter = text[position]
        if letter in "'\"":
            end = position + 1
            while end < len(text) and text[end] != letter:
                end += 2 if text[end] == "\\" else 1
            inside = text[position + 1 : end].replace("\\'", "'")
            parts.append(f'"{inside}"' if letter == '"' else '"' + inside.replace('"', '\\"') + '"')
            position = end + 1
            continue
        word = next((word for word in _WORDS if text.startswith(word, position)), None)
        parts.append(_WORDS[word] if word else {"(": "[", ")": "]"}.get(letter, letter))
        position += len(word) if word else 1
    return "".join(parts)


def json_values(text: str) -> list[Any]:
    """The JSON values in a text: the whole of it, else that of its last fenced block, else every bracketed part."""
    text = text[-MOST:].strip()
    whole = loads(text)
    if whole is not None:
        return [whole]
    fenced = _fenced(text)
    if fenced is not None:
        inside = loads(fenced)
        if inside is not None:
            return [inside]
    values = (loads(text[start:end]) for start, end in _bracketed(text))
    return [value for value in values if value is not None]


def _fenced(text: str) -> str | None:
    """What stands in the last fenced block, without the name of its language."""
    blocks = text.split(_FENCE)
    if len(blocks) < 3:
        return None
    block = blocks[-2] if len(blocks) % 2 else blocks[-1]
    first, newline, rest = block.partition("\n")
    return rest if newline and first.strip().isalnum() else block


def code_of(text: str, languages: Sequence[str] = ()) -> str | None:
    """The last fenced block whose language is one of ``languages`` (any without them); None if there is none.

    A block that was never closed counts, since a text may end with its code.
    """
    blocks = text.split(_FENCE)
    for block in reversed(blocks[1::2]):
        first, newline, rest = block.partition("\n")
        if newline and (not languages or first.strip().lower() in languages):
            return rest
    return None


def _bracketed(text: str) -> Iterator[tuple[int, int]]:
    """The outermost parts of a text between matching square or curly brackets."""
    opened: list[int] = []
    parts: list[tuple[int, int]] = []
    for position, letter in enumerate(text):
        if letter in _PAIRS:
            opened.append(position)
        elif opened and letter == _PAIRS[text[opened[-1]]]:
            start = opened.pop()
            while parts and parts[-1][0] > start:
                parts.pop()
            parts.append((start, position + 1))
    return iter(parts)


def finite(value: Any) -> float | None:
    """A number as a float; None for anything else, also for text, truth values and what is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def numbers(text: str) -> list[float]:
    """Every number in a text, in order; ``3-4`` has two, both positive."""
    found = (finite(float(match)) for match in _NUMBER.findall(text[-MOST:]))
    return [number for number in found if number is not None]


def number_of(text: str) -> float | None:
    """The last number in a text, thousands separated by commas or not; ``3/4`` is one number if it is all there is."""
    text = text[-MOST:]
    if text.count("/") == 1:
        above, below = (numbers(part) for part in text.split("/"))
        bare = re.fullmatch(r"[-+.0-9 ]+/[-+.0-9 ]+", text.strip())
        if bare and len(above) == len(below) == 1 and below[0]:
            return finite(above[0] / below[0])
    found = numbers(_GROUPED.sub(lambda match: match[1] + match[2].replace(",", ""), text))
    return found[-1] if found else None


_COUNTS = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty",
)


def count_of(text: str) -> float | None:
    """The last number in a text; or the last of the words from "zero" to "twenty" in a text without digits."""
    number = number_of(text)
    if number is not None:
        return number
    words = [word for word in re.findall(r"[a-z]+", text[-MOST:].lower()) if word in _COUNTS]
    return float(_COUNTS.index(words[-1])) if words else None


def integers(text: str) -> list[int]:
    """Every number in a text that is whole, as in ``[3, 1, 2]`` or ``3, 1, 2``."""
    return [int(number) for number in numbers(text) if number == int(number) and abs(number) < 10**DIGITS]


def _flat(value: Any, count: int) -> tuple[float, ...] | None:
    """``count`` finite numbers of a list; two points for four numbers are welcome."""
    if not isinstance(value, (list, tuple)):
        return None
    if count == 4 and len(value) == 2 and all(isinstance(item, (list, tuple)) for item in value):
        value = [number for item in value for number in item]
    if len(value) != count:
        return None
    found = tuple(finite(item) for item in value)
    return None if None in found else found


def _label(value: Mapping[str, Any]) -> str:
    label = next((value[key] for key in LABEL_KEYS if key in value), "")
    return label.strip() if isinstance(label, str) else ""


def boxes_in(value: Any, depth: int = 4) -> list[Marked]:
    """The boxes in a JSON value: four numbers, mappings with one of :data:`BOX_KEYS`, and lists of such."""
    box = _flat(value, 4)
    if box is not None:
        return [Marked(box)]
    if depth == 0:
        return []
    if isinstance(value, list):
        return [found for item in value for found in boxes_in(item, depth - 1)]
    if isinstance(value, Mapping):
        for key in BOX_KEYS:
            if key in value:
                found = boxes_in(value[key], depth - 1)
                return [Marked(one.box, one.label or _label(value)) for one in found]
        if all(key in value for key in ("x1", "y1", "x2", "y2")):
            box = _flat([value[key] for key in ("x1", "y1", "x2", "y2")], 4)
            return [] if box is None else [Marked(box, _label(value))]
        return [found for key in LIST_KEYS if key in value for found in boxes_in(value[key], depth - 1)]
    return []


def boxes_of(text: str) -> list[Marked]:
    """The boxes in a text: JSON lists of four numbers or mappings with ``bbox_2d`` and ``label``, else plain numbers.

    Plain numbers are read in fours, and only if there are a multiple of four, as in ``(10, 20), (30, 40)``.
    """
    values = json_values(text)
    found = [one for value in values for one in boxes_in(value)]
    if found or values == [[]]:
        return found
    plain = numbers(text)
    if not plain or len(plain) % 4:
        return []
    return [Marked((plain[i], plain[i + 1], plain[i + 2], plain[i + 3])) for i in range(0, len(plain), 4)]


def says_nothing(text: str) -> bool:
    """Whether an answer says that there is nothing to be found: an empty list, or "none"."""
    return json_values(text) == [[]] or plain_words(text) == "none"


def points_in(value: Any, depth: int = 4) -> list[Point]:
    """The points in a JSON value: two numbers, mappings with one of :data:`POINT_KEYS` or x and y, lists of such."""
    point = _flat(value, 2)
    if point is not None:
        return [point]
    if depth == 0:
        return []
    if isinstance(value, list):
        return [found for item in value for found in points_in(item, depth - 1)]
    if isinstance(value, Mapping):
        if "x" in value and "y" in value:
            point = _flat([value["x"], value["y"]], 2)
            return [] if point is None else [point]
        for key in (*POINT_KEYS, *LIST_KEYS):
            if key in value:
                return points_in(value[key], depth - 1)
    return []


def points_of(text: str) -> list[Point]:
    """The points in a text: JSON lists of two numbers or mappings with ``point_2d``, or ``x`` and ``y``; else numbers.

    Plain numbers are read in pairs, and only if there is an even number of them.
    """
    values = json_values(text)
    found = [one for value in values for one in points_in(value)]
    if found:
        return found
    # Brackets that hold something else, say a box, are no points.
    if any(isinstance(value, (list, Mapping)) for value in values):
        return []
    plain = numbers(text)
    return [(plain[i], plain[i + 1]) for i in range(0, len(plain), 2)] if len(plain) % 2 == 0 else []


def interval_of(text: str) -> tuple[float, float] | None:
    """The first two times in a text, in seconds: ``[3.5, 8]``, ``from 3.5 s to 8 s``, ``00:03 - 01:08``."""
    text = text[-MOST:]
    clocks = [_seconds(match) for match in _CLOCK.finditer(text)]
    if len(clocks) >= 2:
        return clocks[0], clocks[1]
    for value in json_values(text):
        if isinstance(value, Mapping):
            names = (("start", "end"), ("start_time", "end_time"), ("begin", "end"), ("from", "to"))
            pair = next(([value[a], value[b]] for a, b in names if a in value and b in value), None)
        else:
            pair = value[0] if isinstance(value, list) and len(value) == 1 else value
        both = _flat(pair, 2)
        if both is not None:
            return both
    plain = numbers(text)
    return (plain[0], plain[1]) if len(plain) >= 2 else None


def _seconds(match: re.Match[str]) -> float:
    hours, minutes, seconds = match.groups()
    return int(hours or 0) * 3600 + int(minutes) * 60 + float(seconds)


def choice_of(text: str, options: Sequence[str] = ()) -> str | None:
    """The letter, in upper case, that an answer chooses; None if it chooses none or several.

    ``B``, ``(b)``, ``B.``, ``B: because``, ``the answer is B``, ``\\boxed{B}``, a single ``(B)`` in a sentence, or the
    very text of one of ``options``. An article at the start of a sentence ("A dog") is no choice.
    """
    text = text[-MOST:].strip(" \n\r\t*`$")
    alone = _LETTER.match(text)
    if alone:
        return alone[1].upper()
    same = [number for number, option in enumerate(options) if plain_words(option) == plain_words(text)]
    if len(same) == 1 and same[0] < 26:
        return chr(ord("A") + same[0])
    boxed = _BOXED_LETTER.findall(text)
    if boxed:
        return boxed[-1].upper()
    leading = _LEADING_LETTER.match(text)
    if leading:
        return (leading[1] or leading[2]).upper()
    named = _NAMED_LETTER.findall(text)
    if named:
        return named[-1]
    bracketed = set(_BRACKETED_LETTER.findall(text))
    return bracketed.pop() if len(bracketed) == 1 else None


def plain_words(text: str) -> str:
    """Lower case, single spaces, and no punctuation at either end: what two equal answers have in common."""
    return " ".join(text.casefold().split()).strip(" .,;:!?\"'`()[]{}*_$")


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for.

    Attributes:
        name: of the tool.
        arguments: as written.
    """

    name: str
    arguments: Mapping[str, Any]


def tool_calls(text: str, tag: str = "tool_call") -> list[ToolCall]:
    """The calls ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>`` in a text; broken ones are left out."""
    found: list[ToolCall] = []
    for part in every_tagged(text[-MOST:], tag):
        for value in json_values(part):
            for call in value if isinstance(value, list) else [value]:
                if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
                    continue
                arguments = call.get("arguments", {})
                arguments = loads(arguments) if isinstance(arguments, str) else arguments
                if isinstance(arguments, Mapping):
                    found.append(ToolCall(call["name"], arguments))
    return found
