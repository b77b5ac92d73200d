"""Observations of any gymnasium space as state, image and instruction."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np

from mmrl.errors import UserError

SUCCESS = ("success", "is_success")
"""Names under which environments say in ``info`` that their task is done."""


class EnvFault(UserError):
    """An environment raised, or gave numbers that are none."""


class Senses:
    """How observations of one space are read: all numbers as one ``state``, the one uint8 picture, and text.

    Args:
        space: of one environment; nested as it likes.
        spec: what the config calls the environment, for messages.

    Attributes:
        state_dim: S, or None without numbers.
        image_shape: ``(3, h, w)``, or None without a picture.
        texts: whether there is text.

    Raises:
        UserError: several pictures, or something that is neither numbers nor a picture nor text.
    """

    def __init__(self, space: gymnasium.Space, spec: str):
        self._leaves = list(_leaves(space))
        pictures = [part for _, part in self._leaves if _is_picture(part)]
        if len(pictures) > 1:
            raise UserError(f"env '{spec}' observes {len(pictures)} pictures, but there should be one; wrap it")
        numbers = [part for _, part in self._leaves if not _is_picture(part) and not _is_text(part)]
        if not all(part.is_np_flattenable for part in numbers):
            raise UserError(f"env '{spec}' observes {space}, but should observe numbers, a picture or text")
        self.texts = any(_is_text(part) for _, part in self._leaves)
        self.state_dim = sum(map(gymnasium.spaces.flatdim, numbers)) or None
        self.image_shape = None
        if pictures:
            height, width = pictures[0].shape[:2] if pictures[0].shape[-1] == 3 else pictures[0].shape[1:]
            self.image_shape = (3, height, width)

    def read(self, seen: Any, name: str) -> dict[str, Any]:
        """``state`` float32 ``[S]``, ``image`` uint8 ``[3, h, w]`` and ``text``, those that there are.

        Raises:
            EnvFault: beginning with ``name``: another shape than the space has, or numbers that are not finite.
        """
        out: dict[str, Any] = {}
        numbers = []
        for path, space in self._leaves:
            value = seen
            for key in path:
                value = value[key]
            if _is_text(space):
                out["text"] = value
                continue
            if np.shape(value) != (space.shape or ()):
                raise EnvFault(f"{name} observed shape {np.shape(value)}, but should observe {space.shape}")
            if _is_picture(space):
                picture = value if value.shape[-1] != 3 else value.transpose(2, 0, 1)
                out["image"] = np.ascontiguousarray(picture, dtype=np.uint8)
            else:
                numbers.append(gymnasium.spaces.flatten(space, value).astype(np.float32))
        if numbers:
            out["state"] = np.concatenate(numbers)
            bad = np.flatnonzero(~np.isfinite(out["state"]))
            if len(bad):
                raise EnvFault(
                    f"{name} observed {out['state'][bad[0]]} at entry {bad[0]} of its state; all should be finite"
                )
        return out


def _leaves(space: gymnasium.Space, path: tuple = ()) -> Iterator[tuple[tuple, gymnasium.Space]]:
    """The parts of a nested space, in its order."""
    if isinstance(space, gymnasium.spaces.Dict):
        for key, part in space.items():
            yield from _leaves(part, (*path, key))
    elif isinstance(space, gymnasium.spaces.Tuple):
        for key, part in enumerate(space):
            yield from _leaves(part, (*path, key))
    else:
        yield path, space


def _is_picture(space: gymnasium.Space) -> bool:
    return space.dtype == np.uint8 and len(space.shape or ()) == 3 and 3 in (space.shape[0], space.shape[-1])


def _is_text(space: gymnasium.Space) -> bool:
    return isinstance(space, gymnasium.spaces.Text)
