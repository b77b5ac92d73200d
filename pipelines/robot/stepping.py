"""Rows of environments that are stepped in chunks, a finished row never again. Plain numpy: workers import this."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import gymnasium
import numpy as np

from mmrl.errors import UserError


@dataclass(frozen=True)
class Layout:
    """What actions and observations of an environment are like.

    Attributes:
        action_low, action_high: D numbers each.
        state_dim: S, or None without a state.
        image_shape: ``(3, h, w)``, or None without pictures.
        max_steps: actions after which an episode is truncated.
        instructs: whether each episode has an instruction of its own.
    """

    action_low: tuple[float, ...]
    action_high: tuple[float, ...]
    state_dim: int | None
    image_shape: tuple[int, int, int] | None
    max_steps: int
    instructs: bool


class RowEnvs(Protocol):
    """Environments side by side, any subset of which can be restarted, stepped and looked at.

    Observations are mappings of ``state`` float32 ``[n, S]``, ``image`` uint8 ``[n, 3, h, w]`` and ``instruction``, a
    list of texts; at least one of the first two.
    """

    num_envs: int
    layout: Layout

    def restart(self, rows: np.ndarray, seeds: Sequence[int]) -> None:
        """Start an episode in each of ``rows``, from a seed each."""

    def advance(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
        """One action for each of ``rows``: rewards, terminated, truncated, and numbers by name with ``success``."""

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """What ``rows`` look like now."""

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """Pictures of ``rows`` to look at, uint8 ``[n, 3, h, w]``."""

    def expert(self, rows: np.ndarray) -> np.ndarray:
        """What a scripted expert would do next, ``[n, D]``."""

    def close(self) -> None:
        """Let go of the simulators."""


@dataclass
class Chunk:
    """What came of a chunk of H actions in each of n rows.

    Attributes:
        rewards: float32 ``[n, H]``, 0 where the episode was over.
        executed: int64 ``[n]``.
        terminated, truncated, success, dropped: bool ``[n]``; a dropped row lost its episode with its worker.
        info: float32 ``[n]`` by name, as given with the last executed action; NaN where it was not.
    """

    rewards: np.ndarray
    executed: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    success: np.ndarray
    dropped: np.ndarray
    info: dict[str, np.ndarray]

    @classmethod
    def empty(cls, rows: int, horizon: int) -> Chunk:
        """Nothing executed yet."""
        flags = (np.zeros(rows, bool) for _ in range(4))
        return cls(np.zeros((rows, horizon), np.float32), np.zeros(rows, np.int64), *flags, {})

    def put(self, places: np.ndarray, part: Chunk) -> None:
        """Fill in what came of some of the rows."""
        for field in fields(self):
            if field.name != "info":
                getattr(self, field.name)[places] = getattr(part, field.name)
        self.note(places, part.info)

    def note(self, places: np.ndarray, info: Mapping[str, np.ndarray]) -> None:
        """Numbers that some of the rows gave; those of an earlier step go."""
        for name, values in info.items():
            self.info.setdefault(name, np.full(len(self.executed), np.nan, np.float32))[places] = values


def run_chunk(envs: RowEnvs, rows: np.ndarray, actions: np.ndarray) -> Chunk:
    """Execute ``actions [n, H, D]`` in ``rows``, each until its episode is over."""
    chunk = Chunk.empty(*actions.shape[:2])
    live = np.arange(len(rows))
    for k in range(actions.shape[1]):
        rewards, terminated, truncated, info = envs.advance(rows[live], actions[live, k])
        chunk.rewards[live, k] = rewards
        chunk.executed[live] += 1
        chunk.terminated[live], chunk.truncated[live] = terminated, truncated
        chunk.success[live] |= info["success"]
        chunk.note(live, {name: values for name, values in info.items() if name != "success"})
        live = live[~(terminated | truncated)]
        if not len(live):
            break
    return chunk


class InThisProcess:
    """Steps rows where it was called; what they raise goes to the caller."""

    def __init__(self, envs: RowEnvs):
        self.envs = envs
        self.num_envs, self.layout = envs.num_envs, envs.layout
        self.draw, self.close = envs.draw, envs.close

    def restart(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
        """Start episodes and look at them."""
        self.envs.restart(rows, seeds)
        return self.envs.observe(rows)

    def step(self, rows: np.ndarray, actions: np.ndarray) -> tuple[dict[str, Any], Chunk]:
        """Execute a chunk in each row and look at what came of it."""
        chunk = run_chunk(self.envs, rows, actions)
        return self.envs.observe(rows), chunk


def check_actions(space: gymnasium.Space, env: str) -> None:
    """Only lists of numbers can be acted in.

    Raises:
        UserError: names the environment and its action space.
    """
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise UserError(f"env '{env}' takes actions of {space}, but should take a Box of one axis: a list of numbers")
