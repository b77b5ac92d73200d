"""Rewards of episodes that change what is earned on the way: potential-based shaping, and factors in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.registry import load_object
from mmrl.scoring import as_scores, describe_sample
from mmrl.types import Episode, Samples
from rewards import nested_reward
from rewards.robot import episodes_of, per_turn


class Shaping:
    """Potential-based shaping: each turn earns ``discount * potential(s') - potential(s)`` (Ng et al. 1999).

    With the potential 0 where an episode ends and the discount of the algorithm, no policy gains on another, so the
    best ones stay the best; learning only becomes quicker where the potential is near the value.

    Args:
        potential: ``module:function`` or ``file.py:function`` from states ``[C + 1, S]``, those before each turn and at
            the end, to ``[C + 1]`` numbers; or a reward that has potentials by its ``type`` and options, e.g.
            ``{type: goal_similarity, goal: ...}``.
        discount: of the algorithm per turn (``algorithm.gamma``). With 1 the sum is the same for all episodes from one
            start, which says nothing to algorithms that see only the sum.
        time_limit: whether an episode that a time limit cut "continues", so that its last state keeps its potential,
            as is right with a value head, which says what would have come; or "ends" there, as is right without one.
    """

    name = "shaping"
    differentiable = False
    partial = False

    def __init__(
        self,
        potential: str | dict[str, Any],
        discount: Annotated[float, Field(gt=0, le=1)] = 1.0,
        time_limit: Literal["continues", "ends"] = "continues",
    ):
        self.discount, self.continues = discount, time_limit == "continues"
        self.of_states: Callable[[Tensor], Any] | None = None
        self.of_samples: Callable[[Samples], Sequence[Tensor]] | None = None
        if isinstance(potential, str):
            self.of_states = load_object(potential)
            return
        reward = nested_reward(self.name, potential)
        self.of_samples = getattr(reward, "potentials", None)
        if self.of_samples is None:
            raise UserError(f"reward 'shaping': '{potential['type']}' has no potentials")

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, the sums over turns."""
        return torch.tensor([sum(parts) for parts in self.turns(samples)], dtype=torch.float32)

    def turns(self, samples: Samples) -> list[list[float]]:
        """What each turn earned, for credit turn by turn (see :meth:`mmrl.scoring.Scorer.turns`).

        Raises:
            UserError: the samples are no episodes, episodes have no states, or the potential is of the wrong shape.
        """
        episodes = episodes_of(samples, self.name)
        if self.of_samples is not None:
            found = self.of_samples(samples)
        else:
            found = [self._of_states(episode, samples, row) for row, episode in enumerate(episodes)]
        return [self._differences(one, episode) for one, episode in zip(found, episodes, strict=True)]

    def _differences(self, potential: Tensor, episode: Episode) -> list[float]:
        potential = potential.double().clone()
        if episode.terminated or not self.continues:
            potential[-1] = 0
        return (self.discount * potential[1:] - potential[:-1]).tolist()

    def _of_states(self, episode: Episode, samples: Samples, row: int) -> Tensor:
        if episode.states is None:
            raise UserError(f"reward '{self.name}' looks at states, but the environment's observations have none")
        found = torch.as_tensor(self.of_states(episode.states))
        if found.shape != (episode.turns + 1,) or not found.isfinite().all():
            raise UserError(
                f"reward '{self.name}': the potential gave {list(found.shape)} numbers for the {episode.turns + 1} "
                f"states of {describe_sample(samples, row)}; it should be one finite number a state"
            )
        return found


class Penalised:
    """A reward times factors in [0, 1], turn by turn, as in CaRL (arXiv 2504.17838): nothing is gained by a bad turn.

    Args:
        of: a reward of episodes by its ``type`` and options. One that is not earned turn by turn, such as ``success``,
            is earned in the last turn.
        factors: each ``module:function`` or ``file.py:function`` from an :class:`mmrl.types.Episode` to its C turns'
            factors, or to one for the whole episode; 1 is no penalty.
    """

    name = "penalised"
    differentiable = False
    partial = False

    def __init__(self, of: dict[str, Any], factors: Annotated[Sequence[str], Field(min_length=1)]):
        self.of = nested_reward(self.name, of)
        self.factors = {target: load_object(target) for target in factors}

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, the sums over turns."""
        return torch.tensor([sum(parts) for parts in self.turns(samples)], dtype=torch.float32)

    def turns(self, samples: Samples) -> list[list[float]]:
        """What each turn earned, for credit turn by turn (see :meth:`mmrl.scoring.Scorer.turns`).

        Raises:
            UserError: the samples are no episodes, or a factor is not in [0, 1].
        """
        episodes = episodes_of(samples, self.name)
        scores = as_scores(self.name, self.of(samples), samples)
        earned = per_turn(self.of, scores, samples)
        return [
            (torch.tensor(parts, dtype=torch.float64) * self._factor(episode, samples, row)).tolist()
            for row, (parts, episode) in enumerate(zip(earned, episodes, strict=True))
        ]

    def _factor(self, episode: Episode, samples: Samples, row: int) -> Tensor:
        product = torch.ones(episode.turns, dtype=torch.float64)
        for target, factor in self.factors.items():
            found = torch.as_tensor(factor(episode), dtype=torch.float64)
            if found.shape not in ((), (episode.turns,)) or not ((found >= 0) & (found <= 1)).all():
                raise UserError(
                    f"reward '{self.name}': factor '{target}' gave {found.tolist()} for the {episode.turns} turns "
                    f"of {describe_sample(samples, row)}; it should be one number in [0, 1], or one a turn"
                )
            product = product * found
        return product
