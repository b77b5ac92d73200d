"""Rewards of runs of an environment: what it says itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.scoring import describe_sample, reward_name
from mmrl.types import Episode, Samples


def episodes_of(samples: Samples, name: str) -> list[Episode]:
    """The episodes; ``UserError`` if the samples are something else."""
    if samples.episodes is None:
        raise UserError(f"reward '{name}' scores episodes of an environment, but the samples have none")
    return samples.episodes


def pictures_of(samples: Samples, name: str) -> list[Tensor]:
    """The pictures uint8 ``[C + 1, 3, h, w]`` of each episode; ``UserError`` if there are none."""
    for row, episode in enumerate(episodes_of(samples, name)):
        if episode.frames is None:
            raise UserError(
                f"reward '{name}' looks at pictures, but {describe_sample(samples, row)} kept none: set "
                "pipeline.frames to true"
            )
    return [episode.frames for episode in samples.episodes]


def per_turn(reward: Callable, scores: Tensor, samples: Samples) -> list[list[float]]:
    """What each turn earned of ``scores``; what a reward does not credit to turns belongs to the last."""
    episodes = episodes_of(samples, reward_name(reward))
    parts = reward.turns(samples) if hasattr(reward, "turns") else [[0.0] * episode.turns for episode in episodes]
    return [[*some[:-1], score - sum(some[:-1])] for some, score in zip(parts, scores.tolist(), strict=True)]


class Success:
    """1 for an episode in which the environment said that its task is done, else 0."""

    name = "success"
    differentiable = False
    partial = False

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        return torch.tensor([float(episode.success) for episode in episodes_of(samples, self.name)])


class EpisodeReturn:
    """Sum of the environment's rewards."""

    name = "episode_return"
    differentiable = False
    partial = False

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        return torch.tensor([sum(parts) for parts in self.turns(samples)], dtype=torch.float32)

    def turns(self, samples: Samples) -> list[list[float]]:
        """What each turn brought in, for credit turn by turn (see :meth:`mmrl.scoring.Scorer.turns`)."""
        return [episode.rewards.double().sum(1).tolist() for episode in episodes_of(samples, self.name)]
