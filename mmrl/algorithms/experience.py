"""What an online algorithm has in hand between the rollout and the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from mmrl.advantages import constant_groups
from mmrl.algorithms.base import Context
from mmrl.algorithms.collecting import row_chunks
from mmrl.errors import UserError
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

    def rows_of(self, group: int) -> list[int]:
        """Row numbers of a group."""
        return list(range(group * self.group_size, (group + 1) * self.group_size))

    def take(self, rows: Sequence[int]) -> Batch:
        """Some rows, which keep their group numbers."""
        rows = list(rows)
        scores = replace(
            self.scores,
            total=self.scores.total[rows],
            values=self.scores.values[rows],
            each={name: values[rows] for name, values in self.scores.each.items()},
        )
        return Batch(self.rollout[rows], scores, self.given[rows])

    def with_rows(self, rows: Sequence[int], others: Batch) -> Batch:
        """The batch with ``rows`` exchanged for those of ``others``, in that order; groups stay as they are.

        Raises:
            UserError: the rows are of different kinds, such as plain answers and dialogues with tools.
        """
        if not len(rows):
            return self
        mine, theirs = vars(self.rollout.samples), vars(others.rollout.samples)
        differ = [name for name in mine if (mine[name] is None) != (theirs[name] is None)]
        if differ:
            raise UserError(f"samples that were rolled out and samples that are given differ in '{differ[0]}'")
        order = torch.arange(len(self))
        order[list(rows)] = len(self) + torch.arange(len(rows))
        rollout = Rollout.cat([self.rollout, others.rollout])[order]
        scores = replace(
            self.scores,
            total=torch.cat([self.scores.total, others.scores.total])[order],
            values=torch.cat([self.scores.values, others.scores.values])[order],
            each={
                name: torch.cat([values, others.scores.each[name]])[order] for name, values in self.scores.each.items()
            },
        )
        return Batch(with_groups(rollout, self.rollout.group), scores, torch.cat([self.given, others.given])[order])

    def failed(self, threshold: float) -> list[int]:
        """Numbers of the groups none of whose members scores above ``threshold``."""
        best = self.scores.total.nan_to_num(nan=-torch.inf).reshape(self.groups, -1).amax(1)
        return (best <= threshold).nonzero().flatten().tolist()

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
        clip_scale: ``[N, T]`` multiplies the clip range of each decision; None is 1.
        reference_logp: ``[N, T]`` under the reference, where it was needed already.
        returns: ``[N, T]`` targets of the value head.
    """

    rollout: Rollout
    advantage: Tensor
    mask: Tensor
    factor: Tensor | None = None
    clip_scale: Tensor | None = None
    reference_logp: Tensor | None = None
    returns: Tensor | None = None

    ragged: ClassVar[Mapping[str, int]] = dict.fromkeys(
        ("advantage", "mask", "factor", "clip_scale", "reference_logp", "returns"), 1
    )

    def __len__(self) -> int:
        return len(self.rollout)


def replay(context: Context, rollout: Rollout) -> Decisions:
    """All recorded decisions under the policy as it is, without gradient, on the CPU; rows as in an update."""
    parts = []
    with torch.no_grad(), context.clock("rollout"):
        for rows in row_chunks(len(rollout), context.micro_batch_size):
            found = context.policy.decisions(rollout[rows])
            parts.append((found.logp.cpu(), None if found.entropy is None else found.entropy.cpu()))
    logp, entropy = zip(*parts, strict=True)
    return Decisions(torch.cat(logp), entropy=None if entropy[0] is None else torch.cat(entropy))


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
