"""Think by drawing: boxes, lines and points on a picture, as in VILASR."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl.dialogue import Observation, Situation
from pipelines.tools.frames import FRAMES, Box, Frame, Number, Point, box_in, chosen, place

Colour = Literal["red", "green", "blue", "yellow", "orange", "purple", "cyan", "magenta", "black", "white"]
Label = Annotated[str, Field(max_length=40, description="a short name, written beside it")]


class Drawing:
    """What the drawing tools share.

    Args:
        frame: what coordinates count in; see :data:`pipelines.tools.frames.Frame`.
        width: of lines, as a fraction of the picture's longer side.
        colour: where a call names none.
        name, description: by which the model knows it.
    """

    default_name = ""
    default_description = ""

    def __init__(
        self,
        frame: Frame = "pixels",
        width: Annotated[float, Field(gt=0, le=0.2)] = 0.006,
        colour: Colour = "red",
        name: str | None = None,
        description: str | None = None,
    ):
        self.frame = frame
        self.width = width
        self.colour = colour
        self.name = name or self.default_name
        self.description = description or f"{self.default_description} Coordinates are {FRAMES[frame]}."

    def _canvas(self, picture: Any) -> tuple[Any, Any, int]:
        """A copy, what draws on it, and the width of lines in pixels."""
        from PIL import ImageDraw

        copy = picture.copy()
        return copy, ImageDraw.Draw(copy), max(1, round(self.width * max(picture.size)))

    def _shown(self, picture: Any) -> Observation:
        return Observation(images=[picture], calls=[self.name])


class DrawBox(Drawing):
    """Draws the outline of a box on a copy of a picture, by default the latest one, so that marks add up."""

    default_name = "draw_box"
    default_description = "Draws the outline of a box on a picture and shows it."

    def __call__(
        self, situation: Situation, bbox: Box, label: Label = "", colour: Colour | None = None, image: Number = -1
    ) -> Observation:
        """The picture with the box."""
        picture, seen = chosen(situation, image)
        left, top, right, bottom = box_in(bbox, self.frame, picture, seen)
        copy, pen, width = self._canvas(picture)
        ink = colour or self.colour
        pen.rectangle([left, top, max(left, right - 1), max(top, bottom - 1)], outline=ink, width=width)
        if label:
            pen.text((left + width + 1, top + width), _writable(label), fill=ink)
        return self._shown(copy)


class DrawLine(Drawing):
    """Draws a straight line on a copy of a picture, by default the latest one, so that marks add up."""

    default_name = "draw_line"
    default_description = "Draws a line between two points on a picture and shows it."

    def __call__(
        self, situation: Situation, start: Point, end: Point, colour: Colour | None = None, image: Number = -1
    ) -> Observation:
        """The picture with the line."""
        picture, seen = chosen(situation, image)
        ends = place([*start, *end], self.frame, picture, seen)
        copy, pen, width = self._canvas(picture)
        pen.line(ends, fill=colour or self.colour, width=width)
        return self._shown(copy)


class DrawPoint(Drawing):
    """Draws a dot on a copy of a picture, by default the latest one, so that marks add up."""

    default_name = "draw_point"
    default_description = "Draws a dot on a picture and shows it."

    def __call__(
        self, situation: Situation, point: Point, label: Label = "", colour: Colour | None = None, image: Number = -1
    ) -> Observation:
        """The picture with the dot."""
        picture, seen = chosen(situation, image)
        x, y = place(point, self.frame, picture, seen)
        copy, pen, width = self._canvas(picture)
        ink = colour or self.colour
        pen.ellipse([x - 2 * width, y - 2 * width, x + 2 * width, y + 2 * width], fill=ink)
        if label:
            pen.text((x + 2 * width + 1, y), _writable(label), fill=ink)
        return self._shown(copy)


def _writable(label: str) -> str:
    """The label without what the built-in font may lack."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in label)
