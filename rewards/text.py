"""What rewards of texts have in common: one score a sample, and the ground truth of its row."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from mmrl.errors import UserError
from mmrl.overrides import describe
from mmrl.scoring import describe_sample
from mmrl.types import Prompt, Samples


@dataclass(frozen=True)
class Row:
    """One sample and the row of the data that it answers.

    Attributes:
        samples, number: all samples and the index of this one.
        reward: name of the reward, for messages.
        column: of ``Prompt.metadata`` that has the ground truth; empty for ``Prompt.target``.
    """

    samples: Samples
    number: int
    reward: str
    column: str = ""

    @property
    def prompt(self) -> Prompt:
        return self.samples.prompts[self.number]

    @property
    def text(self) -> str:
        """What the model wrote."""
        return self.samples.texts[self.number]

    @property
    def truncated(self) -> bool:
        """Whether it was cut by the limit of length."""
        return self.samples.truncated is not None and bool(self.samples.truncated[self.number])

    @property
    def length(self) -> int:
        """Its tokens; ``UserError`` if nobody counted them."""
        if self.samples.lengths is None:
            raise UserError(f"reward '{self.reward}' needs the number of tokens, which the samples do not have")
        return int(self.samples.lengths[self.number])

    def size(self, picture: int) -> tuple[float, float]:
        """(width, height) of the prompt's picture as the model saw it; ``UserError`` if that is not known."""
        sizes = None if self.samples.sizes is None else self.samples.sizes[self.number]
        if sizes is None or not -len(sizes) <= picture < len(sizes):
            count = "no sizes of pictures" if sizes is None else f"{len(sizes)} pictures"
            raise self.refuse(f"has {count}, but coordinates in pixels of picture {picture} need its size")
        height, width = sizes[picture]
        return float(width), float(height)

    def truth(self) -> Any:
        """The ground truth; text that holds a JSON list or mapping is read. ``UserError`` if there is none."""
        value = self.prompt.metadata.get(self.column) if self.column else self.prompt.target
        if value is None:
            name = f"column '{self.column}'" if self.column else "'target'"
            hint = "" if self.column else "; data.columns.target can name the column that has it"
            raise self.refuse(f"has no ground truth in {name}{hint}")
        if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
            try:
                return json.loads(value)
            except ValueError:
                return value
        return value.tolist() if hasattr(value, "tolist") else value

    def text_truth(self) -> str:
        """The ground truth as text; numbers and truth values become their text."""
        value = self.prompt.metadata.get(self.column) if self.column else self.prompt.target
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            value = self.truth()
            raise self.bad_truth(value, "text or a number")
        return str(value)

    def text_truths(self) -> list[str]:
        """The ground truth as texts of which any will do: a list of them, or one."""
        value = self.prompt.metadata.get(self.column) if self.column else self.prompt.target
        if not isinstance(value, (list, tuple)):
            return [self.text_truth()]
        if not value or any(isinstance(item, bool) or not isinstance(item, (str, int, float)) for item in value):
            raise self.bad_truth(value, "a text or number, or a list of at least one")
        return [str(item) for item in value]

    def bad_truth(self, value: Any, wanted: str) -> UserError:
        """The error to raise for ground truth that is not what it should be."""
        return self.refuse(f"has the ground truth {describe(value)}, but it should be {wanted}")

    def refuse(self, complaint: str) -> UserError:
        """The error to raise about this sample's row."""
        return UserError(f"reward '{self.reward}': {describe_sample(self.samples, self.number)} {complaint}")


class TextReward(ABC):
    """Scores texts one by one; a subclass has a ``name`` and says how by :meth:`score`."""

    name = "text"
    differentiable = False
    partial = False
    column = ""

    def __call__(self, samples: Samples) -> list[float | None]:
        """Scores ``[N]``, None where the reward does not apply.

        Raises:
            UserError: the samples are not texts, or the ground truth of a row is missing or makes no sense.
        """
        if samples.texts is None:
            raise UserError(f"reward '{self.name}' scores texts, but the samples have none")
        return [self.score(Row(samples, number, self.name, self.column)) for number in range(len(samples))]

    @abstractmethod
    def score(self, row: Row) -> float | None:
        """The score of one sample, or None."""
