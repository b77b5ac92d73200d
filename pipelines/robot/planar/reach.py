"""``planar:reach``: move the gripper to the shape that the instruction names."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipelines.robot.planar.base import PlanarEnv, length, unit


class PlanarReach(PlanarEnv):
    """Several coloured shapes and a gripper; the state is the gripper's place alone, so the target has to be seen.

    With one target its place is part of the state. See :class:`PlanarEnv` for the options.
    """

    verb = "reach "

    def __init__(
        self,
        num_envs: int,
        *,
        max_steps: int = 16,
        speed: float = 0.12,
        targets: int = 3,
        named_by: Literal["colour", "shape", "both"] = "colour",
        reward: Literal["sparse", "shaped"] = "sparse",
        image: int | None = 32,
    ):
        super().__init__(
            num_envs,
            max_steps=max_steps,
            speed=speed,
            targets=targets,
            named_by=named_by,
            reward=reward,
            image=image,
        )

    def expert(self, rows: np.ndarray) -> np.ndarray:
        """Straight to the target, with shorter steps at the end."""
        offset = self.goal(rows) - self.places[rows, 0]
        return unit(offset) * np.minimum(length(offset) / self.speed, 1)[:, None]

    def _state(self, rows: np.ndarray) -> np.ndarray:
        gripper = self.places[rows, 0]
        if self.targets > 1:
            return gripper
        return np.concatenate([gripper, self.goals[rows, 0] - gripper], 1)

    def _move(self, rows: np.ndarray, steps: np.ndarray) -> None:
        self.places[rows, 0] = np.clip(self.places[rows, 0] + steps, -1, 1)
