"""A ``gymnasium.vector.VectorEnv`` of another making, such as a simulator that steps all its rows on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import iterate

from mmrl.errors import UserError
from mmrl.registry import is_target, load_object
from pipelines.robot.senses import SUCCESS, EnvFault, Senses
from pipelines.robot.stepping import Layout, check_actions


class WholeBatch:
    """Rows of a vector environment, which can only be stepped all together: those that are over are not looked at.

    Args:
        name: a gymnasium id with a vector entry point, or ``module:function`` that takes ``num_envs`` and the options.
        num_envs: rows.
        max_steps: actions after which an episode is truncated; needed where the environment has no limit.
        end_on_success: whether an episode terminates when the environment says that its task is done.
        options: of the environment's constructor.
    """

    def __init__(
        self,
        name: str,
        num_envs: int,
        *,
        max_steps: int | None = None,
        end_on_success: bool = True,
        **options: Any,
    ):
        self.name, self.num_envs, self.end_on_success = name, num_envs, end_on_success
        self.env = _build(name, num_envs, options)
        if self.env.metadata.get("autoreset_mode") is AutoresetMode.SAME_STEP:
            raise UserError(
                f"env 'vector:{name}' hides final observations: its autoreset_mode should be DISABLED or NEXT_STEP"
            )
        limit = max_steps or getattr(self.env.spec, "max_episode_steps", None)
        if limit is None:
            raise UserError(f"env 'vector:{name}' has no time limit: give 'max_steps'")
        check_actions(self.env.single_action_space, name)
        self._senses = Senses(self.env.single_observation_space, name)
        self.layout = Layout(
            action_low=tuple(self.env.single_action_space.low.tolist()),
            action_high=tuple(self.env.single_action_space.high.tolist()),
            state_dim=self._senses.state_dim,
            image_shape=self._senses.image_shape,
            max_steps=limit,
            instructs=self._senses.texts,
        )
        self._running = np.zeros(num_envs, bool)
        self._steps = np.zeros(num_envs, np.int64)
        self._seeds = [0] * num_envs
        self._seen: list[Any] = [None] * num_envs

    def restart(self, rows: np.ndarray, seeds: Sequence[int]) -> None:
        """Start all rows anew; those that were not asked for are not looked at."""
        self._seeds = [int(seeds[0])] * self.num_envs
        for row, seed in zip(rows.tolist(), seeds, strict=True):
            self._seeds[row] = int(seed)
        observations, _ = self.env.reset(seed=list(self._seeds))
        self._running[:] = False
        self._running[rows] = True
        self._steps[:] = 0
        self._keep(observations)

    def advance(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
        """One action for each of ``rows``, which have to be all that run; see ``stepping.RowEnvs``."""
        if set(np.flatnonzero(self._running)) != set(rows.tolist()):
            raise UserError(f"env 'vector:{self.name}' has to be stepped in all its running rows at once")
        space = self.env.single_action_space
        whole = np.zeros((self.num_envs, *space.shape), space.dtype)
        whole[rows] = actions
        observations, rewards, ended, cut, info = self.env.step(whole)
        self._keep(observations)
        self._steps[rows] += 1
        rewards = np.asarray(rewards, np.float32)[rows]
        if not np.isfinite(rewards).all():
            raise EnvFault(f"env 'vector:{self.name}' gave a reward that is no finite number")
        success = np.zeros(len(rows), bool)
        for key in SUCCESS:
            success |= np.asarray(info.get(key, np.zeros(self.num_envs)), bool)[rows]
        terminated = np.asarray(ended, bool)[rows] | (self.end_on_success & success)
        truncated = ~terminated & (np.asarray(cut, bool)[rows] | (self._steps[rows] >= self.layout.max_steps))
        self._running[rows[terminated | truncated]] = False
        over = np.asarray(ended, bool) | np.asarray(cut, bool)
        if over.any() and self.env.metadata.get("autoreset_mode") is AutoresetMode.DISABLED:
            # Such an environment refuses to step rows that are over, also those that nobody looks at.
            self.env.reset(seed=list(self._seeds), options={"reset_mask": over})
        return rewards, terminated, truncated, {"success": success}

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """What ``rows`` look like now; those that are over, at their end."""
        seen = [
            self._senses.read(self._seen[row], f"env 'vector:{self.name}', row {row} (seed {self._seeds[row]})")
            for row in rows.tolist()
        ]
        gathered: dict[str, Any] = {name: np.stack([one[name] for one in seen]) for name in seen[0] if name != "text"}
        return {**gathered, "instruction": [one["text"] for one in seen]} if self._senses.texts else gathered

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """Pictures of ``rows``, uint8 ``[n, 3, h, w]``."""
        pictures = self.env.render()
        if pictures is None:
            raise UserError(f"env 'vector:{self.name}' cannot be rendered: give it render_mode 'rgb_array'")
        return np.stack([np.asarray(pictures[row], np.uint8).transpose(2, 0, 1) for row in rows.tolist()])

    def expert(self, rows: np.ndarray) -> np.ndarray:
        """There is none."""
        raise UserError(f"env 'vector:{self.name}' has no scripted expert; planar and metaworld ones do")

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def _keep(self, observations: Any) -> None:
        """Remember what running rows look like."""
        for row, seen in enumerate(iterate(self.env.observation_space, observations)):
            if self._running[row]:
                self._seen[row] = seen


def _build(name: str, num_envs: int, options: dict[str, Any]) -> VectorEnv:
    try:
        if is_target(name):
            env = load_object(name)(num_envs=num_envs, **options)
        else:
            env = gymnasium.make_vec(name, num_envs, "vector_entry_point", **options)
    except TypeError as error:
        raise UserError(f"env 'vector:{name}' does not take its options {sorted(options)}: {error}") from error
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(f"env 'vector:{name}': {error}") from error
    if not isinstance(env, VectorEnv):
        raise UserError(f"env 'vector:{name}' is a {type(env).__name__}, but should be a gymnasium.vector.VectorEnv")
    return env
