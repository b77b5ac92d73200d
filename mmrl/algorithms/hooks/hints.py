"""Hints only where all fail (Guide, arXiv 2506.13923)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import roll_out, score
from mmrl.algorithms.experience import Batch
from mmrl.errors import UserError
from mmrl.types import Prompt, Rollout


@dataclass(frozen=True)
class Hints:
    """Groups that all failed are rolled out again with a hint, and learnt from as answers to the plain prompt.

    Behaviour log-probs are those with the hint, so the ratio is pi(answer | prompt) / pi_old(answer | prompt and hint),
    as published, and the clip stops what the policy would hardly say without. ``importance`` weighs decisions by that
    ratio instead, within bounds, and takes ratios against the policy as it is.

    Attributes:
        column: of the data that holds the hint.
        failing: a group failed when no member scores above this.
        template: what is put behind the prompt's text, with ``{}`` for the hint.
    """

    column: str = "hint"
    failing: float = 0.0
    template: str = "\n{}"

    verbs = frozenset({"given"})

    def __call__(self, context: Context, batch: Batch, step: int) -> Batch:
        """The batch with hinted answers in place of groups that failed; rows without a hint stay."""
        prompts = batch.rollout.samples.prompts
        chosen = [n for n in batch.failed(self.failing) if prompts[batch.rows_of(n)[0]].metadata.get(self.column)]
        context.tally.mean("groups/hinted", torch.tensor(len(chosen) / batch.groups))
        if not chosen:
            return batch
        rows = [row for number in chosen for row in batch.rows_of(number)]
        asked = [self.with_hint(prompts[batch.rows_of(number)[0]]) for number in chosen]
        # Attempts count from 1 for further prompts of dynamic sampling.
        hinted = roll_out(context, asked, batch.group_size, step, attempt=-1)
        plain = context.policy.given([prompts[row] for row in rows], context.policy.completions(hinted))
        plain = self._as_acted(plain, hinted)
        known = torch.ones(len(rows), dtype=torch.bool)
        return batch.with_rows(rows, Batch(plain, score(context, plain, step, tally=False), known))

    def _as_acted(self, plain: Rollout, hinted: Rollout) -> Rollout:
        """Log-probs of the policy that acted, the one that saw the hint; what ended how is known from there too."""
        samples = replace(plain.samples, truncated=hinted.samples.truncated)
        return replace(plain, logp=hinted.logp * plain.mask, samples=samples)

    def with_hint(self, prompt: Prompt) -> Prompt:
        """The prompt with its hint behind the text, in a conversation behind its last message."""
        hint = prompt.metadata[self.column]
        if not isinstance(hint, str):
            raise UserError(f"row '{prompt.id}': column '{self.column}' is {type(hint).__name__}, but should be text")
        text = self.template.replace("{}", hint)
        if not prompt.messages:
            return replace(prompt, text=prompt.text + text)
        *before, last = prompt.messages
        return replace(prompt, messages=[*before, {**last, "content": _extended(last.get("content"), text)}])


def _extended(content: Any, text: str) -> Any:
    if isinstance(content, (list, tuple)):
        return [*content, {"type": "text", "text": text}]
    return f"{content or ''}{text}"
