"""The interface of action heads, and how the log-probs of a chunk's elements become those of decisions.

``n`` turns, chunks of ``H`` actions with ``D`` numbers in [-1, 1] (the policy scales them to the environment's bounds),
``t`` decisions a turn. Only the first ``executed`` actions of a chunk were carried out and only these count.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmrl.types import Decisions

OverActions = Literal["mean", "sum"]
OverSteps = Literal["step", "mean", "sum"]


@dataclass(frozen=True)
class HeadShape:
    """What a head is built for.

    Attributes:
        context_dim: width of the context.
        horizon, action_dim: actions of a chunk, numbers of an action.
        encoder: what makes the contexts; it may bring networks for heads (:mod:`pipelines.robot.networks`). None where
            only the options of a head are looked at.
    """

    context_dim: int
    horizon: int
    action_dim: int
    encoder: Any = None


@dataclass
class Sampled:
    """Chunks as a head sampled them.

    Attributes:
        actions: ``[n, H, D]``.
        record: name to tensor ``[n, ...]``: what :meth:`ActionHead.decisions` needs to score them again.
        elements: log-probs before reduction, in a shape of the head's own with n first; None from the deterministic
            sampler.
        mean: ``[n, t, H, D]`` means of Gaussian decisions, from heads of the verb "means".
    """

    actions: Tensor
    record: dict[str, Tensor]
    elements: Tensor | None = None
    mean: Tensor | None = None

    def first(self, n: int) -> Sampled:
        """The first ``n`` rows."""
        elements, mean = (None if x is None else x[:n] for x in (self.elements, self.mean))
        return Sampled(self.actions[:n], {name: x[:n] for name, x in self.record.items()}, elements, mean)


class ActionHead(nn.Module, ABC):
    """Samples chunks of actions from contexts, scores recorded ones again and explains given ones.

    Sampler and scorer must share the function that computes the distribution, so that a replay gives the same numbers.

    Attributes:
        decisions_per_turn: t.
        elements_per_decision: numbers whose log-probs one decision's log-prob is a sum or mean over, when all H actions
            are executed.
        verbs: what it offers besides sampling, ``decisions`` and ``fit``: "means" if decisions are Gaussians of a fixed
            std whose log-prob is the mean over elements, "entropy" if ``decisions`` gives entropies once its attribute
            ``keep_entropy`` is set, "denoise" if chunks can be noised again, by a method ``denoise`` such as
            :meth:`pipelines.robot.heads.denoising.DenoisingHead.denoise`.
        steps, trained_calls: rows through its network that a turn costs in sampling and in ``decisions``.
        fit_normals: standard normal numbers that explaining one chunk takes.
    """

    decisions_per_turn: int = 1
    elements_per_decision: int = 1
    verbs: frozenset[str] = frozenset()
    steps: int = 1
    trained_calls: int = 1
    keep_entropy: bool = False
    fit_normals: int = 0

    @abstractmethod
    def draw(self, turns: int, generator: torch.Generator, deterministic: bool = False) -> Tensor:
        """The random numbers ``[turns, m]`` of so many turns of one episode, on the CPU."""

    @abstractmethod
    def sample(self, context: Any, draws: Tensor, deterministic: bool = False) -> Sampled:
        """Chunks for n contexts; ``draws`` ``[n, m]`` holds all that is random, a turn's row of :meth:`draw` each.

        The deterministic sampler takes means (and what else a head does without chance); its draws are those of
        ``draw(..., deterministic=True)``.
        """

    @abstractmethod
    def logp(self, elements: Tensor, executed: Tensor) -> Tensor:
        """Log-probs ``[n, t]`` of decisions from those of elements, counting ``executed`` ``[n]`` actions of each."""

    def mask(self, executed: Tensor) -> Tensor:
        """Which decisions ``[n, t]`` of a turn that carried out ``executed`` ``[n]`` actions count; by default all."""
        return torch.ones(len(executed), self.decisions_per_turn, dtype=torch.bool, device=executed.device)

    @abstractmethod
    def decisions(
        self, context: Any, record: Mapping[str, Tensor], executed: Tensor, columns: Sequence[int] | None = None
    ) -> Decisions:
        """Recorded decisions of n turns, the ``columns`` of t (default all), with gradient: fields ``[n, t, ...]``."""

    def fit(self, context: Any, actions: Tensor, executed: Tensor, normals: Tensor) -> Tensor:
        """Loss ``[n]`` of explaining chunks ``[n, H, D]``; all chance is in ``normals`` ``[n, fit_normals]``.

        A head without it serves policies that do not offer the verb "fit".
        """
        raise NotImplementedError

    def begin_stage(self) -> None:
        """Called as a stage of training starts: the place to keep what must stay as it is now."""

    def kept(self) -> dict[str, Tensor]:
        """What :meth:`begin_stage` kept, by name, for checkpoints."""
        return {}

    @classmethod
    def offers(cls, horizon: int, options: Mapping[str, Any]) -> frozenset[str]:
        """``verbs`` of a head with these options, whose faults raise ``UserError``; builds the smallest one."""
        return cls(HeadShape(1, horizon, 1), **options).verbs

    @classmethod
    def forwards(cls, horizon: int, options: Mapping[str, Any]) -> dict[str, int]:
        """Rows through its network that one turn costs for each verb."""
        head = cls(HeadShape(1, horizon, 1), **options)
        return {"rollout": head.steps, "decisions": head.trained_calls, "fit": 1, "generate": head.steps}

    def overview(self) -> str:
        """One line on what a decision is, for the terminal."""
        return f"{self.decisions_per_turn} a turn, {self.elements_per_decision} dimensions in each"


def executed_weights(executed: Tensor, horizon: int, action_dim: int, over: OverActions) -> Tensor:
    """``[n, H, 1]``: what each element's log-prob counts in its decision's, 0 for actions that were not executed."""
    live = live_actions(executed, horizon).float()
    return live if over == "sum" else live / (executed[:, None, None] * action_dim)


def chunk_logp(elements: Tensor, executed: Tensor, over_actions: OverActions, over_steps: OverSteps) -> Tensor:
    """Log-probs ``[n, t]`` from elements ``[n, k, H, D]`` of k denoising steps; t is k for ``step``, else 1."""
    weights = executed_weights(executed, *elements.shape[2:], over_actions)[:, None]
    steps = (elements * weights).sum((2, 3))
    if over_steps == "step":
        return steps
    return steps.sum(1, keepdim=True) if over_steps == "sum" else steps.mean(1, keepdim=True)


def chunk_error(error: Tensor, executed: Tensor) -> Tensor:
    """Mean ``[n]`` of ``error [n, H, D]`` over the elements of executed actions."""
    return (error * executed_weights(executed, *error.shape[1:], "mean")).sum((1, 2))


def live_actions(executed: Tensor, horizon: int) -> Tensor:
    """bool ``[n, H, 1]``: which actions of a chunk were carried out."""
    return (torch.arange(horizon, device=executed.device) < executed[:, None])[:, :, None]
