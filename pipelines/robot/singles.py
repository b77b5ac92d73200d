"""Ordinary gymnasium environments side by side in one process, seen alike whatever they are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import gymnasium
import numpy as np

from mmrl.errors import UserError
from pipelines.robot.senses import SUCCESS, EnvFault, Senses
from pipelines.robot.simulators import build_env
from pipelines.robot.stepping import Layout, check_actions


class SingleEnvs:
    """Environments of one kind. What they observe becomes ``state``, ``image`` and ``instruction``:

    all numbers of a flat or nested observation in one float32 ``state``; the one uint8 picture among them, or what the
    environment renders, as ``image``; text as ``instruction``.

    Args:
        spec: see :func:`pipelines.robot.envs.make_envs`.
        names: a number for each row, for messages.
        image: side in pixels of rendered pictures to observe; without it only what the environment observes by itself.
        max_steps: actions after which an episode is truncated; needed where the environment has no limit.
        end_on_success: whether an episode terminates when the environment says that its task is done.
        instruction: what is asked for; of environments that do not say it themselves.
        options: of the environment's constructor.
    """

    def __init__(
        self,
        spec: str,
        names: Sequence[int],
        *,
        image: int | None = None,
        max_steps: int | None = None,
        end_on_success: bool = True,
        instruction: str | None = None,
        **options: Any,
    ):
        self.spec, self.names, self.image, self.end_on_success = spec, list(names), image, end_on_success
        self.envs = [build_env(spec, image, max_steps, options) for _ in self.names]
        self.num_envs = len(self.envs)
        first = self.envs[0]
        self.instruction = instruction or _attribute(first, "instruction")
        limit = max_steps or _attribute(first, "max_steps") or getattr(first.spec, "max_episode_steps", None)
        if limit is None:
            raise UserError(f"env '{spec}' has no time limit: give 'max_steps', after which an episode is truncated")
        check_actions(first.action_space, spec)
        self._senses = Senses(first.observation_space, spec)
        self.layout = Layout(
            action_low=tuple(first.action_space.low.tolist()),
            action_high=tuple(first.action_space.high.tolist()),
            state_dim=self._senses.state_dim,
            image_shape=self._senses.image_shape if image is None else (3, image, image),
            max_steps=limit,
            instructs=self._senses.texts,
        )
        self._seen: list[Any] = [None] * self.num_envs
        self._steps = np.zeros(self.num_envs, np.int64)
        self._seeds = [0] * self.num_envs

    def restart(self, rows: np.ndarray, seeds: Sequence[int]) -> None:
        """Start an episode in each of ``rows``, from a seed each."""
        for row, seed in zip(rows.tolist(), seeds, strict=True):
            self._seeds[row], self._steps[row] = int(seed), 0
            with self._blamed(row, "reset"):
                self._seen[row], _ = self.envs[row].reset(seed=int(seed))

    def advance(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
        """One action for each of ``rows``; see :class:`pipelines.robot.stepping.RowEnvs`."""
        rewards = np.zeros(len(rows), np.float32)
        terminated, truncated, success = (np.zeros(len(rows), bool) for _ in range(3))
        numbers: dict[str, np.ndarray] = {}
        for place, row in enumerate(rows.tolist()):
            env = self.envs[row]
            with self._blamed(row, "step"):
                seen, reward, ended, cut, info = env.step(actions[place].astype(env.action_space.dtype))
            self._seen[row] = seen
            self._steps[row] += 1
            if not np.isfinite(reward):
                raise EnvFault(f"{self._name(row)} gave a reward of {reward}, which should be a finite number")
            success[place] = any(bool(info.get(name, False)) for name in SUCCESS)
            terminated[place] = ended or (self.end_on_success and success[place])
            truncated[place] = not terminated[place] and (cut or self._steps[row] >= self.layout.max_steps)
            rewards[place] = reward
            for name, value in info.items():
                if name not in SUCCESS and np.isscalar(value) and not isinstance(value, str):
                    numbers.setdefault(name, np.full(len(rows), np.nan, np.float32))[place] = value
        return rewards, terminated, truncated, {"success": success, **numbers}

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """What ``rows`` look like now."""
        seen = [self._look(row) for row in rows.tolist()]
        gathered: dict[str, Any] = {name: np.stack([one[name] for one in seen]) for name in seen[0] if name != "text"}
        texts = [one.get("text", self.instruction) for one in seen]
        return gathered if texts[0] is None else {**gathered, "instruction": texts}

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """Pictures of ``rows``, uint8 ``[n, 3, h, w]``."""
        return np.stack([self._render(row) for row in rows.tolist()])

    def expert(self, rows: np.ndarray) -> np.ndarray:
        """What the environments' scripted expert would do next."""
        experts = [_attribute(self.envs[row], "expert") for row in rows.tolist()]
        if None in experts:
            raise UserError(
                f"env '{self.spec}' has no scripted expert (a method 'expert'); planar and metaworld ones do"
            )
        return np.stack([expert() for expert in experts])

    def close(self) -> None:
        """Close every environment."""
        for env in self.envs:
            env.close()

    def _look(self, row: int) -> dict[str, Any]:
        seen = self._senses.read(self._seen[row], self._name(row))
        return seen if self.image is None else {**seen, "image": _resized(self._render(row), self.image)}

    def _render(self, row: int) -> np.ndarray:
        try:
            picture = self.envs[row].render()
        except Exception as error:
            raise UserError(f"{self._name(row)} cannot be rendered: {_sentence(error)}") from error
        if not isinstance(picture, np.ndarray) or picture.ndim != 3 or picture.shape[-1] != 3:
            raise UserError(f"{self._name(row)} cannot be rendered: it has no render mode 'rgb_array'")
        return np.ascontiguousarray(picture.transpose(2, 0, 1), dtype=np.uint8)

    def _name(self, row: int) -> str:
        return f"env '{self.spec}', row {self.names[row]} (seed {self._seeds[row]})"

    @contextlib.contextmanager
    def _blamed(self, row: int, what: str) -> Iterator[None]:
        """Whatever an environment raises inside becomes one sentence."""
        try:
            yield
        except Exception as error:
            raise EnvFault(f"{self._name(row)} failed in {what}: {_sentence(error)}") from error


def _resized(picture: np.ndarray, side: int) -> np.ndarray:
    """``[3, h, w]`` at ``side`` x ``side`` pixels."""
    if picture.shape[1:] == (side, side):
        return picture
    from PIL import Image

    whole = Image.fromarray(picture.transpose(1, 2, 0)).resize((side, side), Image.Resampling.BOX)
    return np.ascontiguousarray(np.asarray(whole).transpose(2, 0, 1))


def _attribute(env: gymnasium.Env, name: str) -> Any:
    """Of the environment or any of its wrappers; None if they lack it."""
    return env.get_wrapper_attr(name) if env.has_wrapper_attr(name) else None


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
