"""``planar:push``: push a puck to the target."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pipelines.robot.planar import drawing
from pipelines.robot.planar.base import GRIPPER_RADIUS, PlanarEnv, length, unit

PUCK_RADIUS = 0.13
PUCK_COLOUR = (0.55, 0.55, 0.58)
CONTACT = GRIPPER_RADIUS + PUCK_RADIUS
"""Distance of the centres at which gripper and puck touch."""
_SLACK = 1e-5
"""For rounding."""


class PlanarPush(PlanarEnv):
    """A puck that gives way to the gripper without sliding on, as on a rough table, and a target for it.

    State: places of gripper and puck and the vector between them; with one target also its place and the vector to it
    from the puck. With several the instruction alone says which is meant. See :class:`PlanarEnv` for the options.
    """

    verb = "push the puck to "
    bodies = 2

    def __init__(
        self,
        num_envs: int,
        *,
        max_steps: int = 64,
        speed: float = 0.1,
        targets: int = 1,
        named_by: Literal["colour", "shape", "both"] = "colour",
        reward: Literal["sparse", "shaped"] = "sparse",
        image: int | None = None,
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
        """Round the puck to the side away from the target, then forward, back in line as it goes."""
        gripper, puck = self.places[rows, 0], self.places[rows, 1]
        forward = unit(self.goal(rows) - puck)
        across = np.stack([-forward[:, 1], forward[:, 0]], 1)
        offset = gripper - puck
        along, aside = _dot(offset, forward), _dot(offset, across)
        side = np.where(aside < 0, -1, 1)[:, None]
        behind = puck - forward * (CONTACT + 0.08)
        beside = puck + across * side * (CONTACT + 0.08) - forward * 0.2
        towards = np.where((along > -0.12)[:, None], beside, behind) - gripper
        approach = unit(towards) * np.minimum(length(towards) / self.speed, 1)[:, None]
        push = unit(forward - across * (6 * aside)[:, None])
        in_line = (along < 0) & (np.abs(aside) < 0.06)
        return np.where(in_line[:, None], push, approach)

    def _state(self, rows: np.ndarray) -> np.ndarray:
        gripper, puck = self.places[rows, 0], self.places[rows, 1]
        parts = [gripper, puck, puck - gripper]
        if self.targets == 1:
            parts += [self.goals[rows, 0], self.goals[rows, 0] - puck]
        return np.concatenate(parts, 1)

    def _move(self, rows: np.ndarray, steps: np.ndarray) -> None:
        gripper = np.clip(self.places[rows, 0] + steps, -1, 1)
        puck = self.places[rows, 1]
        offset = puck - gripper
        overlap = np.maximum(np.float32(CONTACT) - length(offset), 0)[:, None]
        puck = np.clip(puck + overlap * unit(offset), PUCK_RADIUS - 1, 1 - PUCK_RADIUS)
        # A puck against a wall holds the gripper back.
        offset = puck - gripper
        overlap = np.maximum(np.float32(CONTACT) - length(offset), 0)[:, None]
        gripper = np.clip(gripper - overlap * unit(offset), -1, 1)
        # In a corner there may be no room for both: then neither moves.
        apart = length(puck - gripper) > CONTACT - _SLACK
        self.places[rows[apart], 0], self.places[rows[apart], 1] = gripper[apart], puck[apart]

    def _potential(self, rows: np.ndarray) -> np.ndarray:
        return super()._potential(rows) - 0.5 * length(self.places[rows, 0] - self.places[rows, 1])

    def _draw_bodies(self, pictures: np.ndarray, rows: np.ndarray) -> None:
        drawing.paint(pictures, self.places[rows, 1], PUCK_RADIUS, np.asarray(PUCK_COLOUR))
        super()._draw_bodies(pictures, rows)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1]
