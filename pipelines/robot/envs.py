"""Environments as a policy sees them: episodes that begin from a seed and go on in chunks of actions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from mmrl.errors import UserError, nearest
from mmrl.options import options_model, validate, values
from mmrl.types import Rows
from pipelines.robot.planar import TASKS
from pipelines.robot.processes import Processes
from pipelines.robot.singles import SingleEnvs
from pipelines.robot.stepping import Chunk, InThisProcess, Layout
from pipelines.robot.vectors import WholeBatch


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
    layout: Layout

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
        self.size, layout = backend.num_envs, backend.layout
        self.action_low, self.action_high = torch.tensor(layout.action_low), torch.tensor(layout.action_high)
        self.action_dim = len(self.action_low)
        self.state_dim, self.image_shape, self.max_steps = layout.state_dim, layout.image_shape, layout.max_steps
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
        return self._observation(self.backend.restart(rows, self._seeds))

    def step(self, rows: Tensor | Sequence[int], actions: Tensor) -> Step:
        """Execute a chunk of actions in each of some running episodes, stopping where one ends.

        Args:
            rows: long ``[n]``, different from one another.
            actions: ``[n, H, D]``; clipped to the limits of the action space.

        Raises:
            UserError: actions of the wrong shape or not finite, or an environment in this process that fails or gives
                numbers that are not finite; names the row, its seed and the value.
        """
        rows = np.asarray(rows, np.int64)
        if actions.ndim != 3 or len(actions) != len(rows) or actions.shape[-1] != self.action_dim:
            raise UserError(
                f"env '{self.name}' got actions of shape {list(actions.shape)}, but should get [{len(rows)}, H, "
                f"{self.action_dim}]: so many rows, any number of actions, and the numbers of one action"
            )
        if self._done[rows].any():
            raise RuntimeError(f"row {rows[self._done[rows]][0]} is over and has to be reset before it is stepped")
        self._check(actions, rows)
        actions = torch.minimum(torch.maximum(actions.detach().cpu().float(), self.action_low), self.action_high)
        seen, chunk = self.backend.step(rows, actions.numpy())
        self._done[rows] = chunk.terminated | chunk.truncated | chunk.dropped
        plain = {f.name: torch.from_numpy(getattr(chunk, f.name)) for f in fields(chunk) if f.name != "info"}
        info = {name: torch.from_numpy(numbers) for name, numbers in chunk.info.items()}
        return Step(observation=self._observation(seen), info=info, **plain)

    def render(self, rows: Tensor | Sequence[int]) -> Tensor:
        """Pictures of some episodes to look at, uint8 ``[n, 3, h, w]``."""
        return torch.from_numpy(self.backend.draw(np.asarray(rows, np.int64)))

    def close(self) -> None:
        """End the environments and their workers."""
        self.backend.close()

    def _observation(self, seen: Mapping[str, Any]) -> Observation:
        tensors = {name: torch.from_numpy(seen[name]) for name in ("state", "image") if name in seen}
        return Observation(**tensors, instruction=seen.get("instruction"))

    def _check(self, actions: Tensor, rows: np.ndarray) -> None:
        bad = (~torch.isfinite(actions)).nonzero()
        if len(bad):
            place, step, entry = bad[0].tolist()
            raise UserError(
                f"env '{self.name}', row {rows[place]} (seed {self._seeds[rows[place]]}) got "
                f"{actions[place, step, entry].item()} as number {entry} of action {step}; all should be finite"
            )


def make_envs(spec: str, count: int, *, processes: int | None = None, timeout: float = 60.0, **options: Any) -> Envs:
    """Build environments.

    Args:
        spec: one of

            * ``planar:push`` or ``planar:reach``, which come with mmrl (:mod:`pipelines.robot.planar`);
            * a gymnasium id such as ``Hopper-v5`` or ``FetchPush-v4``, or ``gymnasium:`` before any id;
            * ``metaworld:push-v3`` and the other tasks of Meta-World;
            * ``module:function`` or ``file.py:function``, which returns a ``gymnasium.Env``;
            * ``vector:`` and an id or function of that kind, for a ``gymnasium.vector.VectorEnv``.
        count: how many side by side.
        processes: worker processes that share them, 0 for none; as many as there are cores by default. Vectorised
            ones, planar and ``vector:``, are stepped all at once in this process whatever this says.
        timeout: seconds that a worker may take for a reset or a chunk of actions before it counts as hung.
        options: of the planar task, or of :class:`pipelines.robot.singles.SingleEnvs` or
            :class:`pipelines.robot.vectors.WholeBatch`, which hand those that are not their own to the environment.

    Raises:
        UserError: no such environment or option, a package that is missing, or an environment that does not fit.
    """
    if count < 1 or timeout <= 0 or (processes is not None and processes < 0):
        raise UserError(
            f"env '{spec}': count is {count}, timeout {timeout} and processes {processes}, but should be at least 1, "
            "above 0, and at least 0 or null"
        )
    family, _, task = spec.partition(":")
    if family == "planar":
        if task not in TASKS:
            raise UserError(f"there is no env '{spec}'{nearest(spec, [f'planar:{name}' for name in TASKS])}")
        return Envs(InThisProcess(TASKS[task](count, **_checked(TASKS[task], spec, options, "num_envs"))), spec)
    if family == "vector":
        checked = _checked(WholeBatch, spec, options, "name", "num_envs")
        return Envs(InThisProcess(WholeBatch(task, count, **checked)), spec)
    checked = _checked(SingleEnvs, spec, options, "spec", "names")
    if processes == 0:
        return Envs(InThisProcess(SingleEnvs(spec, range(count), **checked)), spec)
    return Envs(Processes(spec, count, processes or os.cpu_count() or 1, timeout, checked), spec)


def _checked(kind: Callable, spec: str, options: Mapping[str, Any], *skip: str) -> dict[str, Any]:
    return values(validate(options_model(kind, skip=skip), options, where=f"env '{spec}'", path=""))
