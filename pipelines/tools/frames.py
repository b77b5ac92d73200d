"""Coordinates that models write, and where they lie in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl.dialogue import CallError, Situation

Frame = Literal["pixels", "original", "thousand", "unit"]
"""What coordinates count in: pixels of the picture as the model saw it after its processor resized it, pixels of the
picture as it is, 0 to 1000 along each side, or 0 to 1 along each side."""

FRAMES: dict[str, str] = {
    "pixels": "in pixels",
    "original": "in pixels",
    "thousand": "from 0 to 1000 along each side",
    "unit": "from 0 to 1 along each side",
}
"""As it is said to the model."""

Coordinate = Annotated[float, Field(allow_inf_nan=False, ge=-1e9, le=1e9)]
Box = Annotated[list[Coordinate], Field(min_length=4, max_length=4, description="left, top, right, bottom")]
Point = Annotated[list[Coordinate], Field(min_length=2, max_length=2, description="x, y")]
Number = Annotated[
    int, Field(ge=-1000, le=1000, description="which picture, counted from 0 in order of appearance; -1 is the latest")
]


def chosen(situation: Situation, number: int) -> tuple[Any, tuple[int, int]]:
    """A picture of the dialogue by its number, and its (height, width) as the model saw it.

    Raises:
        CallError: there is none of this number.
    """
    count = len(situation.pictures)
    if not -count <= number < count:
        raise CallError(f"there is no picture {number}, there are {count}" if count else "there are no pictures")
    return situation.pictures[number], situation.sizes[number]


def place(values: Sequence[float], frame: Frame, picture: Any, seen: tuple[int, int]) -> list[float]:
    """x, y, x, y... as pixels of ``picture`` as it is, those outside moved to its edge.

    Args:
        seen: (height, width) of the picture as the model saw it.
    """
    width, height = picture.size
    whole = {
        "pixels": (seen[1], seen[0]),
        "original": (width, height),
        "thousand": (1000, 1000),
        "unit": (1, 1),
    }[frame]
    sides = (width, height)
    return [min(max(value / whole[i % 2], 0.0), 1.0) * sides[i % 2] for i, value in enumerate(values)]


def box_in(values: Sequence[float], frame: Frame, picture: Any, seen: tuple[int, int]) -> list[float]:
    """A box in pixels of ``picture``, cut at its edges.

    Raises:
        CallError: nothing of it lies inside the picture, or its sides are the wrong way round.
    """
    if not (values[2] > values[0] and values[3] > values[1]):
        raise CallError("the box is empty: left must be smaller than right and top smaller than bottom")
    box = place(values, frame, picture, seen)
    if not (box[2] > box[0] and box[3] > box[1]):
        raise CallError("the box lies outside the picture")
    return box
