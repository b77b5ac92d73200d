"""What the planar tasks share: rows of episodes, coloured targets, instructions, time limit, pictures."""

from __future__ import annotations

import string
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from mmrl.errors import UserError
from mmrl.world.scenes import COLOURS, SHAPES
from pipelines.robot.planar import drawing
from pipelines.robot.planar.chance import permutations, uniforms
from pipelines.robot.stepping import Layout

GRIPPER_RADIUS = 0.09
GRIPPER_COLOUR = (0.13, 0.13, 0.16)
TARGET_SIZE = 0.22
TOLERANCE = 0.15
"""A target is reached when the centre that has to go there is within this distance of it."""
APART = 0.55
"""Smallest distance between centres at the start."""
WALL = 0.25
"""Smallest distance of a centre from the walls at the start."""

_PALETTE = np.asarray(list(COLOURS.values()), np.float32)
_NAMES = tuple(COLOURS)


class PlanarEnv(VectorEnv, ABC):
    """Episodes on a table of [-1, 1] x [-1, 1], x to the right and y down, each a function of its seed and its actions.

    Rows are independent of one another, bit for bit. There is no automatic reset. Beside gymnasium's ``reset`` and
    ``step`` for all rows there are ``restart``, ``advance`` and ``observe`` for some of them.

    Args:
        num_envs: rows.
        max_steps: actions after which an episode is truncated.
        speed: distance that an action of length 1 moves the gripper.
        targets: coloured shapes on the table, one of which is meant.
        named_by: what the instruction tells of the target; the targets differ from one another in it.
        reward: "sparse" gives 1 for success; "shaped" adds the progress made in each step.
        image: side of the observed pictures in pixels; none without it.

    Observations:
        ``state`` float32 ``[E, S]`` (which never says which of several targets is meant), ``instruction`` and, if asked
        for, ``image`` uint8 ``[E, 3, image, image]``. ``info["success"]`` is True in the step that reaches the target,
        which ends the episode.
    """

    metadata: ClassVar[dict[str, Any]] = {
        "autoreset_mode": AutoresetMode.DISABLED,
        "render_modes": ["rgb_array"],
        "render_fps": 10,
    }
    render_mode = "rgb_array"
    verb = ""
    bodies = 1
    """Movable things, of which the gripper is the first and the one that has to reach the target is the last."""

    def __init__(
        self,
        num_envs: int,
        *,
        max_steps: int,
        speed: float,
        targets: int,
        named_by: Literal["colour", "shape", "both"],
        reward: Literal["sparse", "shaped"],
        image: int | None,
    ):
        most = {"colour": len(COLOURS), "shape": len(SHAPES), "both": 6}[named_by]
        if not 1 <= targets <= most:
            raise UserError(f"'targets' is {targets}, but should be 1 to {most} where they are named by {named_by}")
        if image is not None and not 8 <= image <= 512:
            raise UserError(f"'image' is {image}, but should be the side of a picture in pixels, 8 to 512, or null")
        self.num_envs, self.max_steps, self.speed, self.targets = num_envs, max_steps, speed, targets
        self.named_by, self.shaped, self.image = named_by, reward == "shaped", image
        self.places = np.zeros((num_envs, self.bodies, 2), np.float32)
        self.goals = np.zeros((num_envs, targets, 2), np.float32)
        self.colours = np.zeros((num_envs, targets), np.int64)
        self.shapes = np.zeros((num_envs, targets), np.int64)
        self.meant = np.zeros(num_envs, np.int64)
        self.steps = np.zeros(num_envs, np.int64)
        self._backdrop = None if image is None else drawing.blank(num_envs, image)
        self._define_spaces()

    def _define_spaces(self) -> None:
        spaces: dict[str, gymnasium.Space] = {
            "state": gymnasium.spaces.Box(-2.0, 2.0, self._state(np.arange(1)).shape[1:], np.float32),
            "instruction": gymnasium.spaces.Text(64, charset=string.ascii_lowercase + " "),
        }
        if self.image is not None:
            spaces["image"] = gymnasium.spaces.Box(0, 255, (3, self.image, self.image), np.uint8)
        self.layout = Layout(
            action_low=(-1.0, -1.0),
            action_high=(1.0, 1.0),
            state_dim=spaces["state"].shape[0],
            image_shape=spaces["image"].shape if "image" in spaces else None,
            max_steps=self.max_steps,
            instructs=True,
        )
        self.single_observation_space = gymnasium.spaces.Dict(spaces)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def restart(self, rows: np.ndarray, seeds: Sequence[int] | np.ndarray) -> None:
        """Start an episode in each of ``rows``, from a seed each."""
        seeds = np.asarray([seed % 2**64 for seed in map(int, seeds)], np.uint64)
        points = _scatter(seeds, self.bodies + self.targets)
        self.places[rows], self.goals[rows] = points[:, : self.bodies], points[:, self.bodies :]
        colours = permutations(seeds, len(COLOURS), stream=1)
        shapes = permutations(seeds, len(SHAPES), stream=2)
        if self.named_by == "both":
            pairs = permutations(seeds, len(COLOURS) * len(SHAPES), stream=3)
            colours, shapes = np.divmod(pairs, len(SHAPES))
        elif self.named_by == "colour":
            shapes = (uniforms(seeds, self.targets, stream=3) * len(SHAPES)).astype(np.int64)
        else:
            colours = (uniforms(seeds, self.targets, stream=3) * len(COLOURS)).astype(np.int64)
        self.colours[rows], self.shapes[rows] = colours[:, : self.targets], shapes[:, : self.targets]
        self.meant[rows] = (uniforms(seeds, 1, stream=4)[:, 0] * self.targets).astype(np.int64)
        self.steps[rows] = 0
        if self._backdrop is not None:
            self._backdrop[rows] = self._draw_targets(rows, self.image)

    def advance(self, rows: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
        """One action ``[n, 2]`` in [-1, 1] for each of ``rows``.

        Returns:
            rewards, terminated, truncated and info, whose values have a number per row.
        """
        before = self._potential(rows) if self.shaped else None
        self._move(rows, np.clip(actions, -1, 1).astype(np.float32) * np.float32(self.speed))
        self.steps[rows] += 1
        distance = length(self.goal(rows) - self.places[rows, -1])
        success = distance < TOLERANCE
        rewards = success.astype(np.float32)
        if before is not None:
            rewards += self._potential(rows) - before
        truncated = ~success & (self.steps[rows] >= self.max_steps)
        return rewards, success, truncated, {"success": success, "distance": distance}

    def observe(self, rows: np.ndarray) -> dict[str, Any]:
        """What ``rows`` look like now: ``state``, ``instruction`` and perhaps ``image``."""
        seen: dict[str, Any] = {"state": self._state(rows), "instruction": self.instructions(rows)}
        if self._backdrop is not None:
            seen["image"] = self._pictures(rows, self.image, lambda some: self._backdrop[some])
        return seen

    @abstractmethod
    def expert(self, rows: np.ndarray) -> np.ndarray:
        """What a scripted expert, who knows the target, would do next: ``[n, 2]``."""

    def instructions(self, rows: np.ndarray) -> list[str]:
        """What is asked of each of ``rows``."""
        rows = np.asarray(rows)
        colours, shapes = self.colours[rows, self.meant[rows]], self.shapes[rows, self.meant[rows]]
        return [self.verb + self._name(_NAMES[c], SHAPES[s]) for c, s in zip(colours, shapes, strict=True)]

    def goal(self, rows: np.ndarray) -> np.ndarray:
        """Where the target of each row is, ``[n, 2]``."""
        return self.goals[rows, self.meant[rows]]

    def draw(self, rows: np.ndarray, side: int = 96) -> np.ndarray:
        """Pictures of ``rows``, uint8 ``[n, 3, side, side]``."""
        return self._pictures(rows, side, lambda some: self._draw_targets(some, side))

    def reset(self, *, seed: int | Sequence[int] | None = None, options: dict[str, Any] | None = None):
        """Start all rows, or those of ``options["reset_mask"]``.

        Args:
            seed: one for each row, or that of the first, the next ones following. Without it, from 0.
        """
        seeds = [(seed or 0) + row for row in range(self.num_envs)] if not isinstance(seed, Sequence) else seed
        rows = np.flatnonzero((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        self.restart(rows, [seeds[row] for row in rows])
        return self._observation(), {}

    def step(self, actions: np.ndarray):
        """One action for every row, as gymnasium has it."""
        outcome = self.advance(np.arange(self.num_envs), np.asarray(actions))
        return self._observation(), *outcome

    def render(self) -> tuple[np.ndarray, ...]:
        """A picture ``[96, 96, 3]`` of every row."""
        return tuple(self.draw(np.arange(self.num_envs)).transpose(0, 2, 3, 1))

    def _observation(self) -> dict[str, Any]:
        seen = self.observe(np.arange(self.num_envs))
        return {**seen, "instruction": tuple(seen["instruction"])}

    def _name(self, colour: str, shape: str) -> str:
        return {"colour": f"the {colour} one", "shape": f"the {shape}", "both": f"the {colour} {shape}"}[self.named_by]

    @abstractmethod
    def _state(self, rows: np.ndarray) -> np.ndarray:
        """The numbers that a policy sees, ``[n, S]``."""

    @abstractmethod
    def _move(self, rows: np.ndarray, steps: np.ndarray) -> None:
        """Move the gripper by ``steps [n, 2]``, and what it pushes."""

    def _potential(self, rows: np.ndarray) -> np.ndarray:
        """How far the episode has come, 0 at the target and negative before."""
        return -length(self.goal(rows) - self.places[rows, -1])

    def _pictures(self, rows: np.ndarray, side: int, backdrop: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """A few rows at a time, so that what is worked on stays in the processor's cache."""
        whole = np.empty((len(rows), 3, side, side), np.uint8)
        for start in range(0, len(rows), drawing.BLOCK):
            some = rows[start : start + drawing.BLOCK]
            pictures = backdrop(some)
            self._draw_bodies(pictures, some)
            whole[start : start + drawing.BLOCK] = drawing.as_bytes(pictures)
        return whole

    def _draw_targets(self, rows: np.ndarray, side: int) -> np.ndarray:
        pictures = drawing.blank(len(rows), side)
        for k in range(self.targets):
            colours = _PALETTE[self.colours[rows, k]]
            drawing.paint(pictures, self.goals[rows, k], TARGET_SIZE, colours, self.shapes[rows, k])
        return pictures

    def _draw_bodies(self, pictures: np.ndarray, rows: np.ndarray) -> None:
        drawing.paint(pictures, self.places[rows, 0], GRIPPER_RADIUS, np.asarray(GRIPPER_COLOUR))


def length(vectors: np.ndarray) -> np.ndarray:
    """Euclidean lengths ``[...]`` of ``[..., 2]``; exact operations only, so the same bits in every batch."""
    return np.sqrt(vectors[..., 0] * vectors[..., 0] + vectors[..., 1] * vectors[..., 1])


def unit(vectors: np.ndarray) -> np.ndarray:
    """``[..., 2]`` at length 1; the zero vector becomes (1, 0)."""
    size = length(vectors)[..., None]
    return np.where(size > 1e-6, vectors / np.maximum(size, 1e-6), np.asarray([1, 0], vectors.dtype))


def _scatter(seeds: np.ndarray, count: int) -> np.ndarray:
    """``[n, count, 2]``: random points for each seed, ``APART`` from one another and ``WALL`` from the walls."""
    points = np.empty((len(seeds), count, 2), np.float32)
    left, stream = np.arange(len(seeds)), 16
    while len(left):
        drawn = uniforms(seeds[left], 2 * count, stream).reshape(-1, count, 2)
        points[left] = (2 * drawn - 1) * (1 - WALL)
        gaps = length(points[left, :, None] - points[left, None]) + 4 * np.eye(count)
        left, stream = left[(gaps < APART).any((1, 2))], stream + 1
    return points
