"""Dialogues: what a policy that acts in several turns meets after each of them, and how the turns are written down.

A *turn* is what the model says until it ends. After each, an environment answers with text and pictures, and the model
goes on; or it answers nothing, and the dialogue is over. Tools are one kind of environment.

A transcript is a list of turns, ``{"role": "assistant", "text": ...}`` for the model's and, for answers of the
environment, ``{"role": "tool", "text": ..., "images": how many, "calls": [names of tools that worked], "errors": how
many calls did not}``. The prompt is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mmrl.types import Prompt

Transcript = list[dict[str, Any]]


class CallError(Exception):
    """A call that makes no sense. The sentence goes to the model, the run goes on."""


@dataclass(eq=False)
class Situation:
    """One dialogue as its environment sees it.

    Attributes:
        prompt: that it began with.
        pictures: PIL pictures at full size, first those of the prompt and then those that came in between.
        sizes: (height, width) of each as the model saw it.
        transcript: turns so far, the model's latest included.
        memory: for the environment's own notes; nothing else looks at it.
    """

    prompt: Prompt
    pictures: list[Any] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    transcript: Transcript = field(default_factory=list)
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def row(self) -> str:
        """Name of the prompt, for messages."""
        return self.prompt.id or self.prompt.text[:40]


@dataclass(frozen=True)
class Observation:
    """What an environment answers.

    Attributes:
        text: goes to the model, in front of the pictures.
        images: PIL pictures.
        calls: names of the tools that worked.
        errors: number of calls that made no sense.
    """

    text: str = ""
    images: Sequence[Any] = ()
    calls: Sequence[str] = ()
    errors: int = 0


class Environment(Protocol):
    """Answers a model's turns. Nothing a model says may make it raise."""

    def schemas(self) -> list[dict[str, Any]]:
        """The tools that the model may call, as chat templates take them (JSON schema of functions)."""

    def step(self, text: str, situation: Situation) -> Observation | None:
        """The answer to the turn ``text``; None ends the dialogue."""


class Tool(Protocol):
    """One action that a model can call by name. Its arguments are the typed keywords of ``__call__``.

    Attributes:
        name: by which it is called.
        description: for the model.
    """

    name: str
    description: str

    def __call__(self, situation: Situation, **arguments: Any) -> Observation:
        """Act. Raises :class:`CallError` for arguments that make no sense; any other error is the tool's own fault and
        stops the run."""


def said(transcript: Transcript) -> list[str]:
    """The model's turns."""
    return [turn["text"] for turn in transcript if turn["role"] == "assistant"]


def calls(transcript: Transcript) -> list[str]:
    """Names of the tools that were called and worked, in order."""
    return [name for turn in transcript for name in turn.get("calls", ())]


def errors(transcript: Transcript) -> int:
    """How many calls made no sense."""
    return sum(turn.get("errors", 0) for turn in transcript)


def readable(transcript: Transcript) -> str:
    """A dialogue for people to read: a paragraph a turn, answers of tools in square brackets."""
    lines = []
    for turn in transcript:
        if turn["role"] == "assistant":
            lines.append(turn["text"])
        else:
            pictures = f"{turn['images']} picture{'s' * (turn['images'] != 1)}" if turn["images"] else ""
            lines.append(f"[{' '.join(part for part in (*turn['calls'], turn['text'], pictures) if part)}]")
    return "\n\n".join(lines)


def turn_numbers(mask: Tensor) -> Tensor:
    """Long ``[N, T]``: to which of a row's turns a token belongs, from 0; -1 for tokens that are not the model's.

    Args:
        mask: bool ``[N, T]``, the model's tokens; between two turns there is at least one other.
    """
    begins = mask & ~torch.nn.functional.pad(mask, (1, 0))[:, :-1]
    return torch.where(mask, begins.long().cumsum(1) - 1, -1)


def record(observation: Observation) -> Mapping[str, Any]:
    """The turn that stands for an observation in a transcript."""
    return {
        "role": "tool",
        "text": observation.text,
        "images": len(observation.images),
        "calls": list(observation.calls),
        "errors": observation.errors,
    }
