"""One environment from what a config calls it: gymnasium ids, Meta-World tasks, functions of the user."""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np

from mmrl.errors import UserError, nearest
from mmrl.registry import is_target, load_object

SIDE = 128
"""Pixels of pictures to look at, where an environment can be told."""

_EXTRA = "pip install 'mmrl[robot]'"


def build_env(spec: str, image: int | None, max_steps: int | None, options: Mapping[str, Any]) -> gymnasium.Env:
    """One environment; see :func:`pipelines.robot.envs.make_envs` for ``spec``.

    Args:
        image: side in pixels at which it will be rendered for observations.
        max_steps: time limit, where it is not the environment's own.
        options: keywords of its constructor.

    Raises:
        UserError: there is no such environment, its package is missing (says which extra has it), or it does not take
            the options.
    """
    if sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")
    family, _, name = spec.partition(":")
    try:
        if family == "metaworld":
            env = _metaworld(name, image, options)
        elif is_target(spec) and family != "gymnasium":
            env = load_object(spec)(**options)
        else:
            env = _gymnasium(name if family == "gymnasium" else spec, image, max_steps, options)
    except TypeError as error:
        raise UserError(f"env '{spec}' does not take its options {sorted(options)}: {error}") from error
    if not isinstance(env, gymnasium.Env):
        raise UserError(f"env '{spec}' is a {type(env).__name__}, but should be a gymnasium.Env")
    return CheapPictures(env) if hasattr(env.unwrapped, "mujoco_renderer") else env


def _gymnasium(name: str, image: int | None, max_steps: int | None, options: Mapping[str, Any]) -> gymnasium.Env:
    missing = ""
    if name not in gymnasium.registry and ":" not in name:
        # Packages register their ids when they are imported; most begin them with their name, as in gym_pusht/PushT-v0.
        package, rest = (name.partition("/")[0], "that package") if "/" in name else ("gymnasium_robotics", _EXTRA)
        try:
            gymnasium.register_envs(importlib.import_module(package))
        except ModuleNotFoundError:
            missing = f"; those of {package} need {rest}"
    if name not in gymnasium.registry and ":" not in name:
        near = nearest(name, gymnasium.registry)
        raise UserError(f"there is no env '{name}'{near if 'did you mean' in near else ''}{missing}")
    limit = {} if max_steps is None else {"max_episode_steps": max_steps}
    sides = {"width": image or SIDE, "height": image or SIDE}
    try:
        try:
            return gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True, **limit, **sides, **options)
        except TypeError:
            # Not every environment can be told how large its pictures should be.
            return gymnasium.make(name, render_mode="rgb_array", disable_env_checker=True, **limit, **options)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise UserError(
            f"env '{name}' needs a package that is missing ({error}); MuJoCo and gymnasium-robotics come with {_EXTRA}"
        ) from error
    except gymnasium.error.Error as error:
        raise UserError(f"env '{name}': {error}") from error


def _metaworld(name: str, image: int | None, options: Mapping[str, Any]) -> gymnasium.Env:
    try:
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    except ModuleNotFoundError as error:
        raise UserError(f"env 'metaworld:{name}' needs the package {error.name}: {_EXTRA}") from error
    if name not in ALL_V3_ENVIRONMENTS:
        raise UserError(f"Meta-World has no task '{name}'{nearest(name, ALL_V3_ENVIRONMENTS)}")
    return MetaWorld(name, image or SIDE, **options)


class MetaWorld(gymnasium.Wrapper):
    """A Meta-World task whose goal and objects are placed anew in every episode, as its seed says.

    Its own class takes no seed in ``reset`` and keeps one placement until told otherwise.

    Args:
        name: e.g. "push-v3".
        side: of pictures, in pixels.
        camera_name: "corner", "corner2", "corner3", "corner4", "topview", "behindGripper" or "gripperPOV".
        reward_function_version: of Meta-World's dense reward, "v1" or "v2".
    """

    def __init__(self, name: str, side: int, camera_name: str = "corner2", reward_function_version: str = "v2"):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        from metaworld.policies import ENV_POLICY_MAP

        env = ALL_V3_ENVIRONMENTS[name](
            render_mode="rgb_array",
            camera_name=camera_name,
            width=side,
            height=side,
            reward_function_version=reward_function_version,
        )
        # The goal is part of the state, and both it and the objects are drawn from the environment's own generator.
        # Meta-World's own variants with a visible goal set the same, but keep to one goal.
        env._partially_observable = False
        del env.sawyer_observation_space
        env.observation_space = env.sawyer_observation_space
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        env._set_task_called = True
        super().__init__(env)
        self.max_steps = env.max_path_length
        self.instruction = name.rsplit("-v", 1)[0].replace("-", " ")
        self._upside_down = camera_name.startswith("corner")
        self._policy = ENV_POLICY_MAP[name]()
        self._seen = np.zeros(0)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None):
        """Start the episode of a seed."""
        if seed is not None:
            self.env.seed(seed)
        self._seen, info = self.env.reset()
        return self._seen, info

    def step(self, action: np.ndarray):
        """One action: movement of the hand in x, y and z, and the fingers' effort, each in [-1, 1]."""
        self._seen, *outcome = self.env.step(action)
        return self._seen, *outcome

    def render(self) -> np.ndarray:
        """A picture ``[h, w, 3]``; the corner cameras of Meta-World's scene hang upside down."""
        picture = self.env.render()
        return picture[::-1, ::-1] if self._upside_down else picture

    def expert(self) -> np.ndarray:
        """What Meta-World's scripted policy would do next."""
        with warnings.catch_warnings(action="ignore"):  # that the action is too long, as it is meant to be
            return np.clip(self._policy.get_action(self._seen), -1, 1).astype(np.float32)


class CheapPictures(gymnasium.Wrapper):
    """MuJoCo without shadows, reflections, sky and multisampling, which take most of the time without a GPU."""

    def render(self) -> np.ndarray:
        """A picture ``[h, w, 3]``."""
        renderer = self.unwrapped.mujoco_renderer
        if renderer.viewer is None:
            quality = self.unwrapped.model.vis.quality
            quality.offsamples, quality.shadowsize = 0, 64
            self.env.render()
            from mujoco import mjtRndFlag as flags

            for flag in (flags.mjRND_SHADOW, flags.mjRND_REFLECTION, flags.mjRND_SKYBOX, flags.mjRND_HAZE):
                renderer.viewer.scn.flags[flag] = 0
        else:
            # Each environment has a context of its own, and another one's may be current.
            renderer.viewer.make_context_current()
        return self.env.render()
