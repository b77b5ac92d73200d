"""Rewards for the form of a text: tags, JSON, length, repetition, script."""

from __future__ import annotations

import functools
import math
import unicodedata
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl.errors import UserError
from mmrl.types import Samples
from rewards import nested_reward
from rewards.parsing import MOST, answer_of, json_values
from rewards.text import Row, TextReward

Count = Annotated[int, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Format(TextReward):
    """1 for a text that is these tags one after the other, each once and none empty, and nothing around them; else 0.

    Args:
        tags: in their order, without brackets: ``[think, answer]`` for ``<think>...</think><answer>...</answer>``.
        graded: in place of 1 or 0 the share of the tags that are there once, closed and in order, where having nothing
            around them counts as one more.
    """

    name = "format"

    def __init__(self, tags: tuple[str, ...] = ("think", "answer"), graded: bool = False):
        if not tags:
            raise UserError("reward 'format': tags is empty, name at least one")
        for tag in tags:
            if not tag or set(tag) & set("<>/ \n"):
                raise UserError(f"reward 'format': the tag {tag!r} should be a name without brackets")
        self.tags, self.graded = list(tags), graded

    def score(self, row: Row) -> float:
        rest, good = row.text.strip(), []
        outside = ""
        for tag in self.tags:
            opening, closing = f"<{tag}>", f"</{tag}>"
            once = row.text.count(opening) == 1 and row.text.count(closing) == 1
            before, found, after = rest.partition(opening)
            inside, closed, after = after.partition(closing)
            good.append(once and bool(found) and bool(closed) and bool(inside.strip()))
            if found and closed:
                outside += before
                rest = after
        good.append(not (outside + rest).strip())
        return sum(good) / len(good) if self.graded else float(all(good))


class JsonSchema(TextReward):
    """1 for an answer that is one JSON value which a schema allows, else 0.

    Args:
        schema: JSON schema (any draft; the newest unless ``$schema`` says otherwise). Default: any mapping or list.
        schema_column: of the data with a schema for each row, as a mapping; takes the place of ``schema``.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it.
        strict: without such a tag there is no answer.

    The value may stand in a fenced block. Needs the package jsonschema (``pip install 'mmrl[text]'``).
    """

    name = "json_schema"

    def __init__(
        self,
        schema: dict[str, Any] | None = None,
        schema_column: str = "",
        tag: str = "answer",
        strict: bool = False,
    ):
        self.schema = {"type": ["object", "array"]} if schema is None else schema
        self.column, self.tag, self.strict = schema_column, tag, strict
        self.validator = _validator(self.schema, f"reward '{self.name}': 'schema'")

    def score(self, row: Row) -> float:
        validator = self.validator
        if self.column:
            schema = row.truth()
            if not isinstance(schema, dict):
                raise row.bad_truth(schema, "a JSON schema")
            validator = _validator(schema, f"reward '{self.name}': the schema of row '{row.prompt.id or row.number}'")
        answer = answer_of(row.text, self.tag, self.strict)
        values = [] if answer is None else json_values(answer)
        return float(len(values) == 1 and validator.is_valid(values[0]))


def _validator(schema: dict[str, Any], where: str) -> Any:
    try:
        import jsonschema
    except ModuleNotFoundError as error:
        raise UserError("reward 'json_schema' needs the package jsonschema: pip install 'mmrl[text]'") from error
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(f"{where} is no JSON schema: {error.message}") from error
    return kind(schema)


class Length(TextReward):
    """A right answer earns more the shorter it is, a wrong one loses less the longer it is: the cosine of length.

    With L tokens of at most ``limit``, from a to b: ``b + (a - b) (1 + cos(pi L / limit)) / 2``; beyond the limit or
    cut off, ``exceeded`` (arXiv 2502.03373). Whether an answer is right is what the reward ``of`` says.

    Args:
        limit: tokens at which the end of the schedule is reached.
        of: a reward by its ``type`` and options, e.g. ``{type: choice}``, that tells right from wrong. Without it every
            answer counts as right, so only length is shaped.
        threshold: an answer is right if that reward's score is at least this.
        right: at length 0 and at the limit, for a right answer.
        wrong: the same for a wrong one.
        exceeded: for what was cut or is longer than the limit; None goes by the end of the schedule.
    """

    name = "length"

    def __init__(
        self,
        limit: Count,
        of: dict[str, Any] | None = None,
        threshold: float = 1.0,
        right: tuple[float, float] = (1.0, 0.5),
        wrong: tuple[float, float] = (-1.0, -0.5),
        exceeded: float | None = None,
    ):
        self.limit, self.threshold, self.right, self.wrong, self.exceeded = limit, threshold, right, wrong, exceeded
        self.of = None if of is None else nested_reward(self.name, of)

    def __call__(self, samples: Samples) -> list[float | None]:
        lengths = super().__call__(samples)
        if self.of is None:
            return [self._shaped(length, True) for length in lengths]
        from mmrl.scoring import as_scores

        found = as_scores(self.name, self.of(samples), samples, getattr(self.of, "partial", False)).tolist()
        return [
            None if math.isnan(score) else self._shaped(length, score >= self.threshold)
            for length, score in zip(lengths, found, strict=True)
        ]

    def score(self, row: Row) -> float:
        return math.inf if row.truncated else float(row.length)

    def _shaped(self, length: float, right: bool) -> float:
        if length > self.limit and self.exceeded is not None:
            return self.exceeded
        start, end = self.right if right else self.wrong
        return end + (start - end) * (1 + math.cos(math.pi * min(length / self.limit, 1.0))) / 2


class Overlong(TextReward):
    """Soft punishment of overlong answers, as in DAPO (arXiv 2503.14476, equation 13), in [-1, 0].

    0 up to ``limit - buffer`` tokens, then falling evenly to -1 at ``limit``, and -1 beyond.

    Args:
        limit: the longest an answer may be, in tokens.
        buffer: tokens before it in which the punishment sets in.
    """

    name = "overlong"

    def __init__(self, limit: Count, buffer: Count):
        if buffer > limit:
            raise UserError(f"reward 'overlong': buffer is {buffer}, more than limit ({limit})")
        self.limit, self.buffer = limit, buffer

    def score(self, row: Row) -> float:
        over = row.length - (self.limit - self.buffer)
        return -min(max(over / self.buffer, 0.0), 1.0)


class Repetition(TextReward):
    """Minus the share of n-grams that were there before: ``-(1 - different / all)``, in (-1, 0].

    Args:
        size: n.
        unit: n-grams of words (between white space), or of characters, for languages without spaces.
    """

    name = "repetition"

    def __init__(self, size: Count = 3, unit: Literal["words", "characters"] = "words"):
        self.size, self.unit = size, unit

    def score(self, row: Row) -> float:
        text = row.text.lower()
        units = text.split() if self.unit == "words" else text
        grams = [tuple(units[i : i + self.size]) for i in range(len(units) - self.size + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0


SCRIPTS = {
    "latin": ("LATIN",),
    "chinese": ("CJK",),
    "japanese": ("HIRAGANA", "KATAKANA", "CJK"),
    "korean": ("HANGUL", "CJK"),
    "cyrillic": ("CYRILLIC",),
    "greek": ("GREEK",),
    "arabic": ("ARABIC",),
    "hebrew": ("HEBREW",),
    "devanagari": ("DEVANAGARI",),
    "bengali": ("BENGALI",),
    "tamil": ("TAMIL",),
    "thai": ("THAI",),
}
Script = Literal[
    "latin",
    "chinese",
    "japanese",
    "korean",
    "cyrillic",
    "greek",
    "arabic",
    "hebrew",
    "devanagari",
    "bengali",
    "tamil",
    "thai",
]


class Language(TextReward):
    """Share of the letters that are of one script, in [0, 1]: against drifting into another language while thinking.

    It tells Chinese from English and not English from French. A text without letters is left out.

    Args:
        script: the script, or "prompt": that of most letters of the prompt.
    """

    name = "language"

    def __init__(self, script: Script | Literal["prompt"] = "prompt"):
        self.script = script

    def score(self, row: Row) -> float | None:
        script = self.script if self.script != "prompt" else _main_script(_asked(row))
        letters = _letters(row.text[-MOST:])
        if script is None or not letters:
            return None
        return sum(letters[name] for name in SCRIPTS[script]) / letters.total()


def _asked(row: Row) -> str:
    """The words of the prompt, also those of a conversation."""
    parts = [row.prompt.text]
    for turn in row.prompt.messages:
        content = turn.get("content", "")
        pieces = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        parts += [piece for piece in pieces if isinstance(piece, str)]
    return " ".join(parts)


def _letters(text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for letter, count in Counter(text).items():
        if script := _script(letter):
            counts[script] += count
    return counts


@functools.lru_cache(maxsize=65536)
def _script(letter: str) -> str:
    """``"LATIN"`` for ``é``, and so on; empty for what is no letter."""
    if not unicodedata.category(letter).startswith("L"):
        return ""
    name = unicodedata.name(letter, "").removeprefix("FULLWIDTH ").removeprefix("HALFWIDTH ")
    return name.split(" ")[0]


def _main_script(text: str) -> str | None:
    letters = _letters(text[-MOST:])
    marks = {script: sum(letters[name] for name in names) for script, names in SCRIPTS.items()}
    # Chinese characters alone are Chinese, which comes first; kana or Hangul among them give the others more.
    best = max(marks, key=marks.get)
    return best if marks[best] else None
