"""What an online algorithm has in hand between the rollout and the gradient."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmrl.advantages import constant_groups
from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import row_chunks
from mmrl.policy import Policy
from mmrl.scoring import Scores
from mmrl.types import Decisions, Rollout, Rows


@dataclass(eq=False)
class Batch:
    """A rollout and its scores, before they become advantages.

    Attributes:
        rollout: N samples in groups; group numbers run from 0 and members are adjacent.
        scores: of the same samples.
        given: bool ``[N]``, set for completions that did not come from the policy as it is (ground truth, hints).
    """

    rollout: Rollout
    scores: Scores
    given: Tensor = field(default=None)

    def __post_init__(self) -> None:
        if self.given is None:
            self.given = torch.zeros(len(self.rollout), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.rollout)

    @property
    def groups(self) -> int:
        """Number of groups."""
        return int(self.rollout.group.max()) + 1

    @property
    def group_size(self) -> int:
        """Samples of each group."""
        return len(self) // self.groups

    def group(self, number: int) -> Batch:
        """One group alone, numbered 0."""
        rows = slice(number * self.group_size, (number + 1) * self.group_size)
        scores = replace(
            self.scores,
            total=self.scores.total[rows],
            values=self.scores.values[rows],
            each={name: values[rows] for name, values in self.scores.each.items()},
        )
        rollout = self.rollout[rows]
        return Batch(with_groups(rollout, torch.zeros_like(rollout.group)), scores, self.given[rows])

    def replaced(self, groups: Mapping[int, Batch]) -> Batch:
        """The batch with some of its groups exchanged for others of the same size."""
        if not groups:
            return self
        parts = [groups[number] if number in groups else self.group(number) for number in range(self.groups)]
        rollout = with_groups(Rollout.cat([part.rollout for part in parts]), self.rollout.group)
        scores = replace(
            self.scores,
            total=torch.cat([part.scores.total for part in parts]),
            values=torch.cat([part.scores.values for part in parts]),
            each={name: torch.cat([part.scores.each[name] for part in parts]) for name in self.scores.each},
        )
        return Batch(rollout, scores, torch.cat([part.given for part in parts]))

    def silent(self) -> list[int]:
        """Numbers of the groups whose scores have no spread."""
        constant = constant_groups(self.scores.total.cpu(), self.rollout.group.cpu())
        return [number for number in range(self.groups) if constant[number * self.group_size]]


@dataclass(eq=False)
class Experience(Rows):
    """Rows to learn from; every field is aligned on samples.

    Attributes:
        rollout: with the behaviour log-probs that ratios are taken against.
        advantage: float32 ``[N, T]`` on the CPU, 0 where masked.
        mask: bool ``[N, T]`` on the CPU: decisions that the loss counts.
        factor: ``[N, T]`` multiplies the policy term alone, not KL, entropy or value; None is 1.
        reference_logp: ``[N, T]`` under the reference, where it was needed already.
        returns: ``[N, T]`` targets of the value head.
    """

    rollout: Rollout
    advantage: Tensor
    mask: Tensor
    factor: Tensor | None = None
    reference_logp: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rollout)


def replay(context: Context, rollout: Rollout) -> Decisions:
    """All recorded decisions under the policy as it is, without gradient, on the CPU; rows as in an update."""
    parts = []
    with torch.no_grad(), context.clock("rollout"):
        for rows in row_chunks(len(rollout), context.micro_batch_size):
            found = context.policy.decisions(rollout[rows])
            parts.append(Decisions(*[None if x is None else x.cpu() for x in (found.logp, *[None] * 4, found.entropy)]))
    entropy = None if parts[0].entropy is None else torch.cat([part.entropy for part in parts])
    return Decisions(torch.cat([part.logp for part in parts]), entropy=entropy)


def reference_logp(context: Context, rollout: Rollout) -> Tensor:
    """Log-probs ``[N, T]`` of all recorded decisions under the reference, 0 where masked, on the CPU."""
    with context.policy.reference():
        found = replay(context, rollout).logp
    return torch.where(rollout.mask.cpu(), found, 0.0)


class ReferenceScores:
    """All decisions of some rows under the reference: one call of the policy for the micro-batches that share them."""

    def __init__(self, rollout: Rollout):
        self.rollout = rollout
        self._decisions: Decisions | None = None

    def columns(self, policy: Policy, columns: list[int]) -> Decisions:
        """The decisions ``columns``, without gradient."""
        if self._decisions is None:
            with torch.no_grad(), policy.reference():
                self._decisions = policy.decisions(self.rollout)
        return self._decisions.columns(columns)


def with_groups(rollout: Rollout, group: Tensor) -> Rollout:
    """The same rows with other group numbers."""
    samples = replace(rollout.samples, group=None if rollout.samples.group is None else group)
    return replace(rollout, samples=samples, group=group)
