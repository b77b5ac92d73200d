"""Decisions and the turns they belong to: the denoising steps of a picture, or of one chunk of a robot's actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.dialogue import turn_numbers
from mmrl.types import Rollout


class Turns:
    """Between decisions ``[N, T]`` and the C turns ``[N, C]`` that they belong to.

    Args:
        turn: long ``[N, T]``.
        mask: bool ``[N, T]``, the decisions that count; a turn counts if one of its decisions does.
    """

    def __init__(self, turn: Tensor, mask: Tensor):
        self.turn, self.decisions = turn, mask
        self.mask = torch.zeros(len(turn), int(turn.max()) + 1).scatter_add_(1, turn, mask.float()) > 0

    def summed(self, values: Tensor) -> Tensor:
        """Sum ``[N, C]`` of the values of each turn's decisions that count."""
        return torch.zeros(self.mask.shape).scatter_add_(1, self.turn, values * self.decisions)

    def first(self, values: Tensor) -> Tensor:
        """The value ``[N, C]`` of the first decision of each turn that counts."""
        columns = torch.arange(self.turn.shape[1]).expand_as(self.turn)
        place = torch.where(self.decisions, columns, columns.shape[1])
        first = torch.full(self.mask.shape, columns.shape[1]).scatter_reduce_(1, self.turn, place, "amin")
        return torch.where(self.mask, values.gather(1, first.clamp(max=columns.shape[1] - 1)), 0.0)

    def places(self) -> tuple[Tensor, Tensor]:
        """Which of its turn's decisions that count each one is, from 0, and how many there are; long ``[N, T]``."""
        count = torch.zeros(self.mask.shape, dtype=torch.long).scatter_add_(1, self.turn, self.decisions.long())
        before = self.decisions.long().cumsum(1) - self.decisions.long()
        start = torch.full(self.mask.shape, self.turn.shape[1])
        start.scatter_reduce_(1, self.turn, torch.where(self.decisions, before, self.turn.shape[1]), "amin")
        place = (before - start.gather(1, self.turn)) * self.decisions
        return place, count.gather(1, self.turn)

    def spread(self, values: Tensor) -> Tensor:
        """Each decision's share ``[N, T]`` in ``values [N, C]``: all of it, 0 where it does not count."""
        return values.gather(1, self.turn) * self.decisions


def turn_rewards(turns: Sequence[Sequence[float]], mask: Tensor, numbers: Tensor | None = None) -> Tensor:
    """Rewards ``[N, T]``: each turn's at the last of its decisions.

    ``mask`` is that of the model's decisions; ``numbers`` ``[N, T]`` says which turn each belongs to, and without it
    turns are the runs of tokens that the mask leaves.
    """
    numbers = turn_numbers(mask) if numbers is None else torch.where(mask, numbers, -1)
    rewards = torch.zeros(mask.shape)
    for row, earned in enumerate(turns):
        for turn, reward in enumerate(earned):
            places = (numbers[row] == turn).nonzero().flatten()
            # A turn of which nothing is left, being cut, has nowhere to put its reward.
            if len(places):
                rewards[row, places[-1]] = reward
    return rewards


def turns_of(rollout: Rollout, mask: Tensor) -> Turns:
    """The turns of a rollout; a sample that has none is one turn."""
    turn = torch.zeros(mask.shape, dtype=torch.long) if rollout.turn is None else rollout.turn.cpu()
    return Turns(turn, mask)


def discount_factor(place: Tensor, count: Tensor, discount: float) -> Tensor:
    """DPPO's denoising discount (arXiv 2409.00588): ``discount^(count - 1 - place)``, so that a turn's last has 1."""
    return discount ** (count - 1 - place).clamp(min=0).float()


@dataclass(frozen=True)
class ClipSchedule:
    """DPPO's clip bounds (arXiv 2409.00588): tight for a turn's first decisions, which move its outcome most.

    The bound of decision i of n is the clip range times ``first + (1 - first) (exp(rate u) - 1) / (exp(rate) - 1)``
    with ``u = i / (n - 1)``; a turn of one decision has the clip range itself.

    Attributes:
        first: bound of a turn's first decision as a share of the clip range.
        rate: the larger, the longer bounds stay tight.
    """

    first: Annotated[float, Field(gt=0, le=1)] = 0.1
    rate: Annotated[float, Field(gt=0)] = 3.0

    def scale(self, place: Tensor, count: Tensor) -> Tensor:
        """What multiplies each decision's clip range."""
        u = torch.where(count > 1, place / (count - 1).clamp(min=1), 1.0)
        grown = torch.expm1(self.rate * u) / torch.expm1(torch.tensor(self.rate))
        return self.first + (1 - self.first) * grown
