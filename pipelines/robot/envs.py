"""Environments as a policy sees them: episodes that begin from a seed and go on in chunks of actions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from torch import Tensor

from mmrl.errors import UserError, nearest
from mmrl.options import options_model, validate, values
from mmrl.types import Rows
from pipelines.robot.stepping import Chunk, InThisProcess, check_space


@dataclass(eq=False)
class Observation(Rows):
    """What n episodes look like; what an environment does not give is None.

    Attributes:
        state: float32 ``[n, S]``.
        image: uint8 ``[n, 3, h, w]``.
        instruction: n texts.
    """

    state: Tensor | None = None
    image: Tensor | None = None
    instruction: list[str] | None = None

    def __len__(self) -> int:
        return next(len(value) for value in vars(self).values() if value is not None)


@dataclass(eq=False)
class Step:
    """What came of a chunk of up to H actions in each of n episodes.

    Attributes:
        observation: after the last executed action; of a finished episode its final one, zeros if it was dropped.
        rewards: float32 ``[n, H]``, the reward of each action, 0 where the episode was over.
        executed: long ``[n]``, actions executed; 0 if dropped.
        terminated: bool ``[n]``, the environment came to an end of its own.
        truncated: bool ``[n]``, a time limit cut the episode; never together with ``terminated``.
        success: bool ``[n]``, whether the environment said during these actions that its task is done.
        dropped: bool ``[n]``, the episode was lost because its worker crashed or hung; it has to be left out.
        info: numbers ``[n]`` by name that the environment gave with the last action; NaN where it gave none.
    """

    observation: Observation
    rewards: Tensor
    executed: Tensor
    terminated: Tensor
    truncated: Tensor
    success: Tensor
    dropped: Tensor
    info: Mapping[str, Tensor]

    @property
    def done(self) -> Tensor:
        """bool ``[n]``: episodes that must not be stepped again."""
        return self.terminated | self.truncated | self.dropped


class Backend(Protocol):
    """Where the environments run; arrays are numpy's. See :class:`pipelines.robot.stepping.InThisProcess`."""

    num_envs: int
    max_steps: int
    observation_space: gymnasium.spaces.Dict
    action_space: gymnasium.spaces.Box

    def restart(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]: ...
    def step(self, rows: np.ndarray, actions: np.ndarray) -> tuple[dict[str, Any], Chunk]: ...
    def draw(self, rows: np.ndarray) -> np.ndarray: ...
    def close(self) -> None: ...


class Envs:
    """``size`` environments, in which episodes begin together and end each on its own.

    Args:
        backend: where they run.
        name: for messages.

    Attributes:
        size: how many episodes there can be at a time.
        action_dim, action_low, action_high: D and float32 ``[D]``, the limits that actions are clipped to.
        state_dim: S, or None without a state.
        image_shape: ``(3, h, w)``, or None without pictures.
        max_steps: actions after which an episode is truncated.
    """

    def __init__(self, backend: Backend, name: str):
        self.backend, self.name = backend, name
        self.size, self.max_steps = backend.num_envs, backend.max_steps
        check_space(backend.action_space, name)
        self.action_low = torch.from_numpy(backend.action_space.low.astype(np.float32))
        self.action_high = torch.from_numpy(backend.action_space.high.astype(np.float32))
        self.action_dim = len(self.action_low)
        spaces = backend.observation_space.spaces
        self.state_dim = spaces["state"].shape[0] if "state" in spaces else None
        self.image_shape = spaces["image"].shape if "image" in spaces else None
        self._seeds: list[int] = []
        self._done = np.zeros(0, bool)

    def reset(self, seeds: Sequence[int]) -> Observation:
        """Start an episode from each seed, in rows 0 to n-1; whatever ran before is given up.

        An episode's start is a function of its seed alone.
        """
        if not 1 <= len(seeds) <= self.size:
            raise UserError(f"env '{self.name}' was asked for {len(seeds)} episodes, but has room for 1 to {self.size}")
        self._seeds = [int(seed) for seed in seeds]
        self._done = np.zeros(len(seeds), bool)
        rows = np.arange(len(seeds))
        return self._observation(self.backend.restart(rows, self._seeds), rows)

    def step(self, rows: Tensor | Sequence[int], actions: Tensor) -> Step:
        """Execute a chunk of actions in each of some running episodes, stopping where one ends.

        Args:
            rows: long ``[n]``, different from one another.
            actions: ``[n, H, D]``; clipped to the limits of the action space.

        Raises:
            UserError: actions of the wrong shape or not finite, or observations that are not finite; names the row, its
                seed and the value.
        """
        rows = np.asarray(rows, np.int64)
        if actions.ndim != 3 or len(actions) != len(rows) or actions.shape[-1] != self.action_dim:
            raise UserError(
                f"env '{self.name}' got actions of shape {list(actions.shape)}, but should get [{len(rows)}, H, "
                f"{self.action_dim}]: so many rows, any number of actions, and the numbers of one action"
            )
        if self._done[rows].any():
            raise RuntimeError(f"row {rows[self._done[rows]][0]} is over and has to be reset before it is stepped")
        self._check(actions.flatten(1), rows, "got an action")
        actions = torch.minimum(torch.maximum(actions.detach().cpu().float(), self.action_low), self.action_high)
        seen, chunk = self.backend.step(rows, actions.numpy())
        self._done[rows] = chunk.terminated | chunk.truncated | chunk.dropped
        plain = {f.name: torch.from_numpy(getattr(chunk, f.name)) for f in fields(chunk) if f.name != "info"}
        info = {name: torch.from_numpy(numbers) for name, numbers in chunk.info.items()}
        return Step(observation=self._observation(seen, rows), info=info, **plain)

    def render(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Pictures of some episodes to look at, uint8 ``[n, 3, h, w]``."""
        return torch.from_numpy(self.backend.draw(np.asarray(rows, np.int64)))

    def close(self) -> None:
        """End the environments and their workers."""
        self.backend.close()

    def _observation(self, seen: Mapping[str, Any], rows: np.ndarray) -> Observation:
        tensors = {name: torch.from_numpy(seen[name]) for name in ("state", "image") if name in seen}
        if "state" in tensors:
            self._check(tensors["state"], rows, "gave a state")
        return Observation(**tensors, instruction=seen.get("instruction"))

    def _check(self, numbers: Tensor, rows: np.ndarray, what: str) -> None:
        """``numbers [n, ...]`` of ``rows`` have to be finite."""
        bad = (~torch.isfinite(numbers)).nonzero()
        if len(bad):
            place, entry = bad[0].tolist()
            row = rows[place]
            raise UserError(
                f"env '{self.name}', row {row} (seed {self._seeds[row]}) {what} with {numbers[place, entry].item()} "
                f"at entry {entry}; all its numbers should be finite"
            )


def make_envs(spec: str, count: int, **options: Any) -> Envs:
    """Build environments.

    Args:
        spec: ``planar:push`` or ``planar:reach``.
        count: how many side by side.
        options: of the environment.

    Raises:
        UserError: no such environment, or an option that it does not have.
    """
    from pipelines.robot.planar import TASKS

    family, _, task = spec.partition(":")
    if family != "planar" or task not in TASKS:
        raise UserError(f"there is no env '{spec}'{nearest(spec, [f'planar:{name}' for name in TASKS])}")
    model = options_model(TASKS[task], skip=("num_envs",))
    checked = values(validate(model, options, where=f"env '{spec}'", path=""))
    return Envs(InThisProcess(TASKS[task](count, **checked)), spec)
