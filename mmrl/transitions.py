"""Transitions of off-policy learning, and a ring that keeps the latest of them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from mmrl.types import Rows


@dataclass(eq=False)
class Transitions(Rows):
    """n moves from one situation to the next.

    Attributes:
        situation, after: float32 ``[n, S]``, what the actor and the critics look at, before and after.
        action: float32 ``[n, A]``, what the actor did.
        reward: float32 ``[n]``.
        terminated: float32 ``[n]``, 1 where nothing can be earned after this move. A time limit is no such end.
    """

    situation: Tensor
    after: Tensor
    action: Tensor
    reward: Tensor
    terminated: Tensor

    def __len__(self) -> int:
        return len(self.reward)

    def to(self, device: torch.device | str) -> Transitions:
        """The same on a device."""
        return Transitions(*(getattr(self, f.name).to(device) for f in fields(self)))


class Replay:
    """The latest ``capacity`` transitions, in tensors that are changed in place.

    Args:
        capacity: transitions that are kept.
        situation, action: their widths S and A.

    Attributes:
        buffers: what :class:`mmrl.policy.Parameters` is to keep in checkpoints.
    """

    def __init__(self, capacity: int, situation: int, action: int):
        shapes = {"situation": (situation,), "after": (situation,), "action": (action,), "reward": (), "terminated": ()}
        self.capacity = capacity
        self.buffers = {name: torch.zeros(capacity, *shape) for name, shape in shapes.items()}
        self.buffers["added"] = torch.zeros((), dtype=torch.long)

    def __len__(self) -> int:
        return min(int(self.buffers["added"]), self.capacity)

    def add(self, transitions: Transitions) -> None:
        """Keep them, in the place of the oldest."""
        added = self.buffers["added"]
        numbers = torch.arange(len(transitions))[-self.capacity :]
        places = (added + numbers) % self.capacity
        for f in fields(transitions):
            self.buffers[f.name][places] = getattr(transitions, f.name)[numbers].float().cpu()
        added += len(transitions)

    def draw(self, count: int, generator: torch.Generator) -> Transitions:
        """``count`` of them with repetition, each as likely as the others."""
        places = torch.randint(len(self), (count,), generator=generator)
        return Transitions(**{f.name: self.buffers[f.name][places] for f in fields(Transitions)})
