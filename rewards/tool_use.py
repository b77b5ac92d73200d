"""Whether a model used its tools: the bonus of DeepEyes (arXiv 2505.14362)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field

from mmrl.dialogue import calls, errors
from mmrl.errors import UserError
from mmrl.scoring import as_scores
from mmrl.types import Samples


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
        self.of = None
        if of is not None:
            from rewards import load_reward

            options = dict(of)
            kind = options.pop("type", None)
            if not isinstance(kind, str):
                raise UserError(f"reward '{self.name}': 'of' needs a 'type', the name of a reward")
            self.of = load_reward(kind, **options)

    def __call__(self, samples: Samples) -> list[float | None]:
        """Scores ``[N]``, None where ``of`` does not apply.

        Raises:
            UserError: the samples are no dialogues.
        """
        if samples.transcripts is None:
            raise UserError(f"reward '{self.name}' looks at dialogues: give the pipeline tools (pipeline.tools)")
        scores: list[float | None] = []
        for transcript in samples.transcripts:
            used = [name for name in calls(transcript) if not self.tools or name in self.tools]
            scores.append(min(len(used) / self.enough, 1.0) - self.error_cost * errors(transcript))
        if self.of is None:
            return scores
        found = as_scores(self.name, self.of(samples), samples, getattr(self.of, "partial", False)).tolist()
        return [
            None if answer != answer else score if answer > self.threshold else min(score, 0.0)
            for score, answer in zip(scores, found, strict=True)
        ]
