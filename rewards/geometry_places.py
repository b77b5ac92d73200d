"""Places in pictures as fractions of their sides: those that a model wrote, and those of the data."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.errors import UserError
from mmrl.media import open_picture
from mmrl.types import Samples
from rewards.geometry import Frame, Size, degenerate, frame_size, to_unit
from rewards.parsing import BOX_KEYS, POINT_KEYS, Box, Point, answer_of, boxes_of, finite, points_of
from rewards.text import Row, TextReward

FAR = 1e6


@functools.lru_cache(maxsize=4096)
def _file_size(path: str) -> Size:
    from PIL import Image

    with Image.open(path.removeprefix("file://")) as picture:
        # A picture that was stored lying is shown upright.
        turned = picture.getexif().get(0x0112, 1) >= 5
        return (picture.height, picture.width) if turned else (picture.width, picture.height)


def original_size(row: Row, picture: int) -> Size:
    """(width, height) of a picture of the row: its columns ``width`` and ``height``, else of the picture itself.

    Raises:
        UserError: there is no such picture, or its file cannot be read.
    """
    given = [finite(row.prompt.metadata.get(name)) for name in ("width", "height")]
    if None not in given and min(given) > 0:
        return given[0], given[1]
    images = row.prompt.images
    if not -len(images) <= picture < len(images):
        raise row.refuse(
            f"has {len(images)} pictures, but coordinates of picture {picture} as it is in the data need its size; "
            "columns width and height can give it"
        )
    image = images[picture]
    try:
        size = _file_size(image) if isinstance(image, str) else open_picture(image).size
    except (OSError, UserError) as error:
        raise row.refuse(f"has a picture that cannot be read: {error}") from error
    return float(size[0]), float(size[1])


class Geometry(TextReward):
    """What rewards of places share: where the answer stands and in which frames it and the truth are given."""

    frame: Frame = "unit"
    target_frame: Frame | None = None
    picture = 0
    tag = "answer"
    strict = False

    def answer(self, row: Row) -> str | None:
        """What the model answered, see :func:`rewards.parsing.answer_of`."""
        return answer_of(row.text, self.tag, self.strict)

    def size(self, row: Row, frame: Frame) -> Size:
        """(width, height) of the picture in a frame."""
        return frame_size(frame, lambda: row.size(self.picture), lambda: original_size(row, self.picture))

    def true_box(self, row: Row, value: Any) -> Box:
        """A box of the ground truth in unit coordinates; ``UserError`` if it is none or lies outside the picture."""
        numbers = self._true_numbers(row, value, 4, BOX_KEYS, "a box [left, top, right, bottom]")
        if degenerate(numbers):
            raise row.bad_truth(
                str(value), "a box [left, top, right, bottom] whose right is beyond its left and bottom below its top"
            )
        return numbers

    def true_point(self, row: Row, value: Any) -> Point:
        """A point of the ground truth in unit coordinates; ``UserError`` if it is none or lies outside the picture."""
        return self._true_numbers(row, value, 2, POINT_KEYS, "a point [x, y]")

    def true_points(self, row: Row) -> list[Point]:
        """One point or a list of them."""
        truth = row.truth()
        several = isinstance(truth, list) and truth and not all(finite(item) is not None for item in truth)
        return [self.true_point(row, value) for value in (truth if several else [truth])]

    def true_boxes(self, row: Row) -> list[tuple[Box, Mapping[str, Any]]]:
        """One box or a list of them, perhaps empty, each with the mapping that it came in."""
        truth = row.truth()
        if isinstance(truth, Mapping):
            key = next((key for key in ("objects", "boxes") if key in truth), None)
            truth = truth[key] if key else [truth]
        if not isinstance(truth, list):
            raise row.bad_truth(truth, "a list of boxes")
        if len(truth) == 4 and all(finite(item) is not None for item in truth):
            truth = [truth]
        return [(self.true_box(row, value), value if isinstance(value, Mapping) else {}) for value in truth]

    def _true_numbers(self, row: Row, value: Any, count: int, keys: Sequence[str], wanted: str) -> Any:
        found = value
        if isinstance(value, Mapping):
            found = next((value[key] for key in keys if key in value), None)
        numbers = [finite(item) for item in found] if isinstance(found, (list, tuple)) else []
        if len(numbers) != count or None in numbers:
            raise row.bad_truth(value if isinstance(value, str) else str(value), wanted)
        frame = self.target_frame or self.frame
        size = self.size(row, frame)
        # Rounding may put an edge one pixel outside.
        slack = 0.001 if frame == "unit" else 1.0
        if any(not -slack <= number <= size[i % 2] + slack for i, number in enumerate(numbers)):
            raise row.refuse(
                f"has the ground truth {numbers}, which does not lie in the picture: {size[0]:g} wide and "
                f"{size[1]:g} high in the frame '{frame}'; is target_frame right?"
            )
        return to_unit(numbers, size)

    def boxes(self, row: Row) -> list[tuple[Box, str]]:
        """Boxes (in unit coordinates) and labels of the answer."""
        answer = self.answer(row)
        found = [] if answer is None else boxes_of(answer)
        return [(self.unit(row, one.box), one.label) for one in found]

    def points(self, row: Row) -> list[Point]:
        """Points of the answer in unit coordinates."""
        answer = self.answer(row)
        found = [] if answer is None else points_of(answer)
        return [self.unit(row, point) for point in found]

    def unit(self, row: Row, values: tuple[float, ...]) -> Any:
        """Coordinates that the model wrote as unit coordinates; those far outside of any picture move nearer, to where
        sums and products do not overflow."""
        unit = to_unit(values, self.size(row, self.frame))
        return tuple(min(max(value, -FAR), FAR) for value in unit)

    def marks(self, samples: Samples) -> list[list[dict[str, Any]]]:
        """Boxes and points for reports, see :meth:`mmrl.scoring.Scorer.marks`."""
        rows = [Row(samples, number, self.name, self.column) for number in range(len(samples))]
        return [
            [{"label": label, kind: list(place)} for label, places in self.places(row) for kind, place in places]
            for row in rows
        ]

    def places(self, row: Row) -> list[tuple[str, list[tuple[str, Sequence[float]]]]]:
        """What is to be seen in a picture: label, and (kind, coordinates) of each place."""
        return [
            ("predicted", [("box", box) for box, _ in self.boxes(row)]),
            ("true", [("box", box) for box, _ in self.true_boxes(row)]),
        ]
