"""Look closer: a part of a picture at its full resolution, as in MGPO, DeepEyes and Mini-o3."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from mmrl.dialogue import CallError, Observation, Situation
from pipelines.tools.frames import FRAMES, Box, Frame, Number, box_in, chosen


class CropZoom:
    """Cuts a box out of the picture as it is in the data, which may have more pixels than the model was shown.

    Args:
        frame: what the box counts in; see :data:`pipelines.tools.frames.Frame`.
        min_side: smaller boxes grow about their middle to this many pixels of the picture, where it has them.
        enlarge_to: crops whose longer side has fewer pixels are enlarged to it; 0 leaves them.
        margin: added on every side, as a fraction of the box's sides.
        max_aspect: boxes that are longer and thinner make no sense.
        name, description: by which the model knows it.
    """

    def __init__(
        self,
        frame: Frame = "pixels",
        min_side: Annotated[int, Field(ge=1)] = 28,
        enlarge_to: Annotated[int, Field(ge=0)] = 0,
        margin: Annotated[float, Field(ge=0)] = 0.0,
        max_aspect: Annotated[float, Field(gt=1)] = 100.0,
        name: str = "crop_zoom",
        description: str | None = None,
    ):
        self.frame = frame
        self.min_side = min_side
        self.enlarge_to = enlarge_to
        self.margin = margin
        self.max_aspect = max_aspect
        self.name = name
        self.description = description or f"Shows the part of a picture inside a box. Boxes are {FRAMES[frame]}."

    def __call__(self, situation: Situation, bbox: Box, image: Number = 0) -> Observation:
        """The crop as a picture."""
        picture, seen = chosen(situation, image)
        left, top, right, bottom = box_in(bbox, self.frame, picture, seen)
        left, right = self._grown(left, right, picture.width)
        top, bottom = self._grown(top, bottom, picture.height)
        width, height = right - left, bottom - top
        if max(width, height) > self.max_aspect * min(width, height):
            raise CallError("the box is too thin")
        crop = picture.crop((left, top, right, bottom))
        return Observation(images=[self._enlarged(crop)], calls=[self.name])

    def _grown(self, low: float, high: float, side: int) -> tuple[int, int]:
        """Whole pixels from ``low`` to ``high`` with margin, at least ``min_side`` where there are so many."""
        margin = self.margin * (high - low)
        low, high = max(low - margin, 0.0), min(high + margin, float(side))
        least = min(self.min_side, side)
        if high - low < least:
            # A box that would grow over an edge moves away from it.
            low = min(max((low + high - least) / 2, 0.0), side - least)
            high = low + least
        return math.floor(low), min(math.ceil(high), side)

    def _enlarged(self, crop: Any) -> Any:
        from PIL import Image

        factor = self.enlarge_to / max(crop.size)
        if factor <= 1:
            return crop
        return crop.resize([max(1, round(side * factor)) for side in crop.size], Image.Resampling.BICUBIC)
