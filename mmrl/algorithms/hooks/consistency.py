"""A bonus for answers that follow from their reasoning, under a slow reference (GRPO-CARE, arXiv 2506.16141)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import Batch, replay

SLOW = "slow"


@dataclass(frozen=True)
class Consistency:
    """Right answers that a slow copy of the policy finds likely after the reasoning before them score more.

    The likelihood is the mean log-prob of the tokens from ``marker`` on, under an average of the policy's weights. A
    sample that scores above ``right`` and whose likelihood is at least the mean over such samples of its group, less
    ``margin``, gets ``bonus`` on top of its score.

    Attributes:
        bonus: added to the score.
        right: scores above this are right.
        marker: text that the answer begins with.
        margin: in nats per token.
        decay: share of the slow copy that stays when it moves.
        every: steps between its moves.
    """

    bonus: Annotated[float, Field(gt=0)] = 0.5
    right: float = 0.5
    marker: str = "<answer>"
    margin: Annotated[float, Field(ge=0)] = 0.01
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.995
    every: Annotated[int, Field(ge=1)] = 10

    verbs = frozenset({"given"})

    def __call__(self, context: Context, batch: Batch, step: int) -> Batch:
        """The batch with the bonus in its total scores."""
        parameters = context.policy.parameters
        if SLOW not in parameters.snapshots:
            parameters.take_snapshot(SLOW)
        elif step % self.every == 0:
            parameters.update_average(SLOW, self.decay)
        with parameters.swapped(SLOW):
            logp = replay(context, batch.rollout).logp
        likely = self._of_answers(context, batch, logp)
        total = batch.scores.total.detach().cpu()
        candidates = (total > self.right) & ~likely.isnan()
        bonus = torch.zeros_like(total)
        for number in range(batch.groups):
            rows = torch.tensor(batch.rows_of(number))
            rows = rows[candidates[rows]]
            # Alone in its group, an answer has nothing to be compared with.
            if len(rows) > 1:
                bonus[rows] = self.bonus * (likely[rows] >= likely[rows].mean() - self.margin).to(bonus)
        context.tally.mean("consistency/bonus", bonus)
        context.tally.mean("consistency/likelihood", likely.nan_to_num(), (~likely.isnan()).float())
        return Batch(
            batch.rollout, replace(batch.scores, total=batch.scores.total + bonus.to(batch.scores.total)), batch.given
        )

    def _of_answers(self, context: Context, batch: Batch, logp: Tensor) -> Tensor:
        """Mean log-prob ``[N]`` of the tokens from the marker on; NaN where there is none."""
        out = torch.full((len(batch),), torch.nan)
        for row, tokens in enumerate(context.policy.completions(batch.rollout)):
            first = self._first_of_answer(context, tokens)
            if first is not None:
                out[row] = logp[row, first : len(tokens)].mean()
        return out

    def _first_of_answer(self, context: Context, tokens: list[int]) -> int | None:
        """The token after which the marker is complete, by bisection: longer beginnings hold what shorter ones did."""

        def complete(length: int) -> bool:
            ids = torch.tensor([tokens[:length]], dtype=torch.long)
            return self.marker in context.policy.decode(ids, torch.tensor([length]))[0]

        if not complete(len(tokens)):
            return None
        low, high = 0, len(tokens)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if complete(middle) else (middle, high)
        return min(high, len(tokens) - 1)
