"""Ground truth as a member of the group (ViSurf, arXiv 2510.10606; TempSamp-R1, arXiv 2509.18056)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import score
from mmrl.algorithms.experience import Batch
from mmrl.errors import UserError
from mmrl.types import Prompt


@dataclass(frozen=True)
class GroundTruth:
    """The last member of a group becomes the prompt's given answer, scored like the others.

    Its behaviour log-probs are those of the policy as it is, so its ratio starts at 1. ``soft_advantage`` keeps its
    lead over the others small, as TempSamp-R1 does.

    Attributes:
        when: in every group, or only where no member scores above ``failing``.
        failing: see there.
        column: of the data that holds the answer; the prompt's target where a row has none.
        template: around it, with ``{}`` for the answer.
    """

    when: Literal["always", "all_fail"] = "always"
    failing: float = 0.0
    column: str = "response"
    template: str = "{}"

    verbs = frozenset({"given"})

    def __call__(self, context: Context, batch: Batch, step: int) -> Batch:
        """The batch with given answers in it."""
        chosen = list(range(batch.groups)) if self.when == "always" else batch.failed(self.failing)
        context.tally.mean("groups/with_ground_truth", torch.tensor(len(chosen) / batch.groups))
        if not chosen:
            return batch
        rows = [batch.rows_of(number)[-1] for number in chosen]
        prompts = [batch.rollout.samples.prompts[row] for row in rows]
        rollout = context.policy.given(prompts, [self._answer(prompt) for prompt in prompts])
        known = torch.ones(len(rows), dtype=torch.bool)
        return batch.with_rows(rows, Batch(rollout, score(context, rollout, step, tally=False), known))

    def _answer(self, prompt: Prompt) -> str:
        answer = prompt.metadata.get(self.column, prompt.target)
        if not isinstance(answer, str):
            raise UserError(f"row '{prompt.id}': neither column '{self.column}' nor the target is a text to inject")
        return self.template.replace("{}", answer)
