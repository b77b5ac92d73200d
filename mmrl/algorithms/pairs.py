"""Pairs of a better and a worse output: from data, from scores of a group, from comparisons."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mmrl import distributed
from mmrl.advantages import constant_groups
from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import numbers_of, score
from mmrl.data import CLIPS, PICTURES
from mmrl.errors import UserError
from mmrl.policy import Policy
from mmrl.types import Prompt, Rollout, Samples

Pairing = Literal["best_worst", "ranked", "compared"]


@dataclass
class Pairs:
    """Aligned winners and losers.

    Attributes:
        names: numbers of the pairs that no other process uses.
        margin: ``[N]`` by how much a winner is better, in scores or, for comparisons, in log-odds; None if not known.
    """

    winners: Rollout | Samples
    losers: Rollout | Samples
    names: list[int]
    margin: Tensor | None = None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: slice) -> Pairs:
        margin = None if self.margin is None else self.margin[rows]
        return Pairs(self.winners[rows], self.losers[rows], self.names[rows], margin)

    @property
    def both(self) -> Rollout | Samples:
        """Winners, then losers."""
        return type(self.winners).cat([self.winners, self.losers])


def pairs_of_groups(context: Context, rollout: Rollout, step: int, pairing: Pairing) -> Pairs:
    """Pairs among the members of each group, by their scores or by the rewards' comparisons."""
    group = rollout.group.cpu()
    if pairing == "compared":
        winners, losers, margin = _compared(context, rollout, group, step)
    else:
        scores = score(context, rollout, step).total.cpu()
        largest = int(group.bincount().max())
        winners, losers = pair_up(scores, group, 1 if pairing == "best_worst" else largest // 2)
        margin = scores[winners] - scores[losers]
    context.tally.mean("pairs/margin", margin)
    names = (winners + distributed.rank() * len(rollout)).tolist()
    return Pairs(rollout[winners], rollout[losers], names, margin)


def pair_up(scores: Tensor, group: Tensor, per_group: int) -> tuple[Tensor, Tensor]:
    """Row indices of winners and losers: the k-th best with the k-th worst of each group, for k up to ``per_group``.

    Samples without a score take no part, nor do pairs whose scores are equal.
    """
    equal = constant_groups(scores, group)
    winners: list[int] = []
    losers: list[int] = []
    for name in group.unique().tolist():
        rows = ((group == name) & ~scores.isnan() & ~equal).nonzero().flatten()
        ranked = rows[scores[rows].argsort(descending=True, stable=True)].tolist()
        for k in range(min(per_group, len(ranked) // 2)):
            best, worst = ranked[k], ranked[-1 - k]
            if scores[best] > scores[worst]:
                winners.append(best)
                losers.append(worst)
    return torch.tensor(winners, dtype=torch.long), torch.tensor(losers, dtype=torch.long)


def _compared(context: Context, rollout: Rollout, group: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first member of each group against the second, the third against the fourth...; ties are left out."""
    members = [(group == name).nonzero().flatten() for name in group.unique().tolist()]
    first = torch.cat([rows[0 : len(rows) // 2 * 2 : 2] for rows in members])
    second = torch.cat([rows[1::2] for rows in members])
    with context.clock("reward"):
        better = context.scorer.compare(rollout.samples[first], rollout.samples[second], step).cpu()
    decided = (better != 0.5) & ~better.isnan()
    first, second, better = first[decided], second[decided], better[decided]
    won = better > 0.5
    margin = torch.maximum(better, 1 - better).logit(eps=1e-6)
    return torch.where(won, first, second), torch.where(won, second, first), margin


def given_pairs(policy: Policy, prompts: Sequence[Prompt]) -> Pairs:
    """The pairs that the data bring along as ``chosen`` and ``rejected``."""
    names = list(numbers_of(slice(0, len(prompts)), len(prompts)))
    columns = ([answer_of(prompt, column) for prompt in prompts] for column in ("chosen", "rejected"))
    both = given_outputs(policy, [*prompts, *prompts], [answer for column in columns for answer in column])
    return Pairs(both[: len(prompts)], both[len(prompts) :], names)


def given_outputs(policy: Policy, prompts: Sequence[Prompt], answers: Sequence[Any]) -> Rollout | Samples:
    """Outputs from the data as what ``fit`` takes: texts as if they had been sampled, media encoded once."""
    if "given" in policy.verbs:
        return policy.given(prompts, answers, score=False)
    samples = Samples([replace(prompt, target=answer) for prompt, answer in zip(prompts, answers, strict=True)])
    return policy.encoded(samples) if hasattr(policy, "encoded") else samples


def answer_of(prompt: Prompt, column: str) -> Any:
    """What a row has in ``column``; of a conversation the text of its last message."""
    value = prompt.metadata.get(column)
    if isinstance(value, (list, tuple)) and value and isinstance(value[-1], dict):
        content = value[-1].get("content")
        if isinstance(content, (list, tuple)):
            content = "".join(part.get("text") or "" for part in content)
        value = content
    if value is None or value == "" or value == []:
        raise UserError(f"row '{prompt.id}': column '{column}' is missing or empty, but source offline needs it")
    return value


def check_given_pairs(prompts: Iterable[Prompt]) -> None:
    """Raise ``UserError``, which names the row, for a pair that teaches nothing or cannot be one."""
    for prompt in prompts:
        chosen, rejected = answer_of(prompt, "chosen"), answer_of(prompt, "rejected")
        kinds = _kind(chosen), _kind(rejected)
        if kinds[0] != kinds[1]:
            raise UserError(
                f"row '{prompt.id}': chosen is a {kinds[0]} and rejected a {kinds[1]}, but both must be alike"
            )
        if _content(chosen) == _content(rejected):
            raise UserError(f"row '{prompt.id}': chosen and rejected are the same {kinds[0]}, so the pair says nothing")


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "picture" if value.lower().endswith(PICTURES) else "clip" if value.lower().endswith(CLIPS) else "text"
    clip = isinstance(value, (list, tuple)) or (isinstance(value, Tensor) and value.ndim == 4)
    return "clip" if clip else "picture"


def _content(value: Any) -> Any:
    """Equal for equal outputs; files are told apart by their names."""
    if isinstance(value, (list, tuple)):
        return [_content(frame) for frame in value]
    if isinstance(value, Tensor):
        return value.tolist()
    return value.tobytes() if hasattr(value, "tobytes") else value
