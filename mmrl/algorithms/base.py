"""What an algorithm is to the trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mmrl.data import PromptSampler
from mmrl.policy import Policy
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt


@dataclass
class Context:
    """What the trainer lends an algorithm.

    Attributes:
        policy, scorer: the model and its rewards.
        seed: of the stage; every draw derives from it and the step.
        micro_batch_size: samples per backward.
        clock: phases "rollout", "reward", "update".
        tally: statistics of the step at hand.
        prompts: where this step's prompts come from, for algorithms that need more or others.
    """

    policy: Policy
    scorer: Scorer
    seed: int
    micro_batch_size: int
    clock: Clock
    tally: Tally
    prompts: PromptSampler | None = None


@dataclass
class Update:
    """One optimiser step: the losses of its micro-batches add up to the loss of the step.

    Attributes:
        size: samples that take part, over all processes; 0 means there is nothing to learn and no step is taken.
        micro_batches: what :meth:`Algorithm.loss` takes, one at a time.
    """

    size: int
    micro_batches: Iterable[Any]


class Algorithm(Protocol):
    """Collect experience, cut it into updates, give each micro-batch's loss.

    An algorithm that carries anything from step to step, such as a replay buffer or an adapted coefficient, also has
    ``state() -> dict`` of what JSON can hold and ``load_state(dict)``; checkpoints keep it. Every process must hold the
    same state. One whose unset options depend on the policy has ``defaults_for(verbs) -> dict``, which config checks
    use to show and to keep what they stand for. One with ``check_prompts(prompts)`` looks at a stage's rows before a
    model is loaded and raises ``UserError`` for one it cannot use; one with ``needs_comparison`` set compares samples.

    Attributes:
        verbs: what the policy must offer.
        needs_reference: the policy's start must be kept.
        needs_gradient_of_reward: every reward must be differentiable.
        needs_rewards: at least one reward must be configured.
    """

    verbs: frozenset[str]
    needs_reference: bool
    needs_gradient_of_reward: bool
    needs_rewards: bool

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> Any:
        """Experience from this step's prompts, without gradient."""

    def updates(self, context: Context, experience: Any, step: int) -> Iterator[Update]:
        """The optimiser steps to take on it, in order."""

    def loss(self, context: Context, micro_batch: Any) -> Tensor:
        """Scalar loss of a micro-batch, already divided by the totals of its update."""
