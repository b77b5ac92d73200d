"""Small parts of the policy-gradient loss with options of their own: entropy, importance, value head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed, losses
from mmrl.types import Decisions


@dataclass(frozen=True)
class EntropyTarget:
    """Keep the mean entropy of decisions near a target by moving the bonus's coefficient a little after each update.

    Attributes:
        target: in nats.
        delta: added to the coefficient after an update whose entropy was at or below the target, else subtracted.
        minimum, maximum: bounds of the coefficient.
    """

    target: Annotated[float, Field(ge=0)] = 0.2
    delta: Annotated[float, Field(gt=0)] = 0.005
    minimum: Annotated[float, Field(ge=0)] = 0.0
    maximum: Annotated[float, Field(gt=0)] = 1.0


class EntropyBonus:
    """The coefficient of the entropy bonus, fixed or adapted; an adapted one is part of a checkpoint.

    The bonus acts while the last update's entropy was at or below the target, as in TRL's adaptive control.
    """

    def __init__(self, coefficient: float, target: EntropyTarget | None):
        self.current = coefficient
        self.target = target
        self.last: float | None = None
        self._sum, self._count = 0.0, 0.0

    @property
    def used(self) -> bool:
        """Whether entropies are needed."""
        return self.current != 0 or self.target is not None

    @property
    def coefficient(self) -> float:
        """What the bonus of the update at hand is multiplied by."""
        off = self.target is not None and self.last is not None and self.last > self.target.target
        return 0.0 if off else self.current

    def observe(self, entropy: Tensor, mask: Tensor) -> None:
        """Add a micro-batch's entropies ``[n, t]`` to those of the update."""
        if self.target is not None:
            self._sum += (entropy.detach().double() * mask).sum().item()
            self._count += mask.sum().item()

    def adapt(self) -> None:
        """After an optimiser step."""
        if self.target is None:
            return
        total, count = distributed.total(self._sum), distributed.total(self._count)
        self._sum, self._count = 0.0, 0.0
        if count == 0:
            return
        self.last = total / count
        step = self.target.delta if self.last <= self.target.target else -self.target.delta
        self.current = min(max(self.current + step, self.target.minimum), self.target.maximum)

    def state(self) -> dict[str, Any]:
        return {} if self.target is None else {"coefficient": self.current, "last": self.last}

    def load_state(self, state: dict[str, Any]) -> None:
        if state:
            self.current, self.last = state["coefficient"], state["last"]


@dataclass(frozen=True)
class Importance:
    """Weigh decisions by how likely the policy before the update finds them, against the one that took them.

    For members that the policy did not sample as it is now: replayed ones, given answers, another engine's samples.
    Ratios are then taken against the policy before the update, which one extra forward computes.

    Attributes:
        level: ``token`` one weight a decision, ``sequence`` their product over the sample.
        mode: ``truncate`` clamps weights to [minimum, maximum]; ``mask`` drops what lies outside.
        maximum, minimum: bounds.
    """

    level: Literal["token", "sequence"] = "token"
    mode: Literal["truncate", "mask"] = "truncate"
    maximum: Annotated[float, Field(gt=0)] = 2.0
    minimum: Annotated[float, Field(ge=0)] = 0.0

    def weights(self, logp: Tensor, behaviour_logp: Tensor, mask: Tensor) -> Tensor:
        """See :func:`mmrl.losses.importance_weights`."""
        return losses.importance_weights(logp, behaviour_logp, mask, self.level, self.mode, self.maximum, self.minimum)


@dataclass(frozen=True)
class ValueHead:
    """PPO's value loss: the mean over decisions of :func:`mmrl.losses.value_loss`, times ``coef``.

    Attributes:
        coef: weight in the loss.
        clip: bound on how far a prediction may move before it stops counting as progress; null for none.
        huber: error from which the loss grows linearly instead of quadratically; null for never.
        warmup: first steps of a stage in which the policy term is 0, so that the value is about right before advantages
            are made from it (AC-Flow, arXiv 2510.18072).
    """

    coef: Annotated[float, Field(ge=0)] = 0.1
    clip: Annotated[float, Field(gt=0)] | None = 0.2
    huber: Annotated[float, Field(gt=0)] | None = None
    warmup: Annotated[int, Field(ge=0)] = 0

    def loss(self, decisions: Decisions, old_value: Tensor, returns: Tensor) -> Tensor:
        """``[n, t]``."""
        return losses.value_loss(decisions.value, old_value, returns, self.clip, self.huber)


def top_entropy_mask(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """Float ``[N, T]``: 1 for the ``share`` of unmasked decisions with the highest entropy (arXiv 2506.01939).

    The quantile is over all decisions at hand in all processes.
    """
    kept = distributed.gather_ragged(entropy[mask].float())
    if not len(kept):
        return torch.zeros_like(entropy)
    # torch.quantile refuses more than 16 million values; sorting does not.
    ordered = kept.sort().values
    position = (1 - share) * (len(ordered) - 1)
    low, high = ordered[int(position)], ordered[min(int(position) + 1, len(ordered) - 1)]
    threshold = torch.lerp(low, high, position - int(position))
    return ((entropy >= threshold) & mask).float()
