"""Environments for tests: a walk whose length its seed tells, with faults on demand. Workers load it by its path."""

import os
import time

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

FAULTS = {13: "raise", 20: "exit", 27: "hang", 34: "nan", 41: "shape", 48: "render", 55: "reset"}


class Walk(gymnasium.Env):
    """State: seed, steps since the reset, sum of actions. Ends of its own after ``seed % 7 + 2`` steps.

    In its third step something goes wrong if ``FAULTS`` says so for its seed.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gymnasium.spaces.Box(-2.0, 2.0, (2,), np.float32)

    def __init__(self, success: bool = False):
        self.success = success
        self.render_mode = "rgb_array"

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.array([seed or 0, 0.0, 0.0])
        if self.fault == "reset":
            raise RuntimeError("no floor\nto walk on")
        return self.state.copy(), {}

    def step(self, action):
        assert action.dtype == np.float32
        assert not self.over, "stepped after its end"
        self.state += [0, 1, action.sum()]
        seen = self.state.copy()
        if self.state[1] == 3:
            seen = self.fail(seen)
        info = {"is_success": self.over, "pace": float(action[0])} if self.success else {"steps": self.state[1]}
        return seen, float(action[0]), self.over and not self.success, False, info

    @property
    def fault(self) -> str:
        return FAULTS.get(self.state[0], "")

    @property
    def over(self) -> bool:
        return self.state[1] >= self.state[0] % 7 + 2

    def fail(self, seen):
        if self.fault == "raise":
            raise RuntimeError("the floor is wet")
        if self.fault == "exit":
            os._exit(3)
        if self.fault == "hang":
            time.sleep(60)
        return {"nan": seen * np.nan, "shape": seen[:2]}.get(self.fault, seen)

    def render(self):
        if self.fault == "render":
            raise OSError("no screen")
        return np.full((4, 6, 3), int(self.state[1]), np.uint8)


class Scene(Walk):
    """The same with a nested observation: numbers, a switch, a picture and text."""

    observation_space = gymnasium.spaces.Dict(
        {
            "arm": gymnasium.spaces.Dict({"place": gymnasium.spaces.Box(-1, 1, (2, 2), np.float32)}),
            "camera": gymnasium.spaces.Box(0, 255, (5, 4, 3), np.uint8),
            "switch": gymnasium.spaces.Discrete(3),
            "task": gymnasium.spaces.Text(32),
        }
    )

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen(), {}

    def step(self, action):
        return self.seen(), *super().step(action)[1:]

    def seen(self):
        camera = np.zeros((5, 4, 3), np.uint8)
        camera[0, 1] = [1, 2, 3]
        place = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
        return {"arm": {"place": place}, "camera": camera, "switch": 1, "task": f"walk {self.state[0]:.0f}"}


def together(num_envs: int, mode: str = "DISABLED") -> SyncVectorEnv:
    """Walks that are stepped all at once."""
    return SyncVectorEnv([Walk] * num_envs, autoreset_mode=AutoresetMode[mode])
