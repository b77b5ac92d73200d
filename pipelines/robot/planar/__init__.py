"""Planar manipulation in plain numpy: thousands of episodes side by side, drawn with :mod:`mmrl.world`'s shapes."""

from pipelines.robot.planar.push import PlanarPush
from pipelines.robot.planar.reach import PlanarReach

__all__ = ["TASKS", "PlanarPush", "PlanarReach"]

TASKS = {"push": PlanarPush, "reach": PlanarReach}
