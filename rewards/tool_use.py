"""Whether a model used its tools: the bonus of DeepEyes (arXiv 2505.14362)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from mmrl.dialogue import Transcript
from mmrl.errors import UserError
from mmrl.scoring import as_scores
from mmrl.types import Samples
from rewards import nested_reward


class ToolUse:
    """Calls that worked, up to ``enough`` of them, as a share of it; less ``error_cost`` for each that did not.

    Args:
        tools: names that count; without it all do.
        enough: calls that earn the whole bonus.
        error_cost: for a call that made no sense.
        of: a reward by its ``type`` and options, e.g. ``{type: exact}``: tools earn nothing where its score is not
            above ``threshold``, as in DeepEyes, which pays them for right answers alone.
        threshold: see ``of``.
    """

    name = "tool_use"
    differentiable = False
    partial = False

    def __init__(
        self,
        tools: Sequence[str] = (),
        enough: Annotated[int, Field(ge=1)] = 1,
        error_cost: Annotated[float, Field(ge=0)] = 0.0,
        of: dict[str, Any] | None = None,
        threshold: float = 0.0,
    ):
        self.tools = frozenset(tools)
        self.enough = enough
        self.error_cost = error_cost
        self.threshold = threshold
        self.of = None if of is None else nested_reward(self.name, of)

    def __call__(self, samples: Samples) -> list[float | None]:
        """Scores ``[N]``, None where ``of`` does not apply.

        Raises:
            UserError: the samples are no dialogues.
        """
        turns = self._earned(samples)
        right = self._right(samples)
        scores = [sum(earned) for earned in turns]
        return [
            None if good is None else score if good else min(score, 0.0)
            for score, good in zip(scores, right, strict=True)
        ]

    def turns(self, samples: Samples) -> list[list[float]]:
        """What each turn of the model earned, for credit turn by turn (see :meth:`mmrl.scoring.Scorer.turns`)."""
        return [
            earned if good else [min(part, 0.0) for part in earned]
            for earned, good in zip(self._earned(samples), self._right(samples), strict=True)
        ]

    def _earned(self, samples: Samples) -> list[list[float]]:
        if samples.transcripts is None:
            raise UserError(f"reward '{self.name}' looks at dialogues: give the pipeline tools (pipeline.tools)")
        return [self._of_turns(transcript) for transcript in samples.transcripts]

    def _of_turns(self, transcript: Transcript) -> list[float]:
        earned: list[float] = []
        left = self.enough
        for turn in transcript:
            if turn["role"] == "assistant":
                earned.append(0.0)
                continue
            worked = sum(not self.tools or name in self.tools for name in turn["calls"])
            earned[-1] += min(worked, left) / self.enough - self.error_cost * turn["errors"]
            left -= min(worked, left)
        return earned

    def _right(self, samples: Samples) -> list[bool | None]:
        """Whether tools may earn something; None where ``of`` does not apply."""
        if self.of is None:
            return [True] * len(samples)
        found = as_scores(self.name, self.of(samples), samples, getattr(self.of, "partial", False)).tolist()
        return [None if answer != answer else answer > self.threshold for answer in found]
