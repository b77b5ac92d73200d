"""Turn a picture."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmrl.dialogue import Observation, Situation
from pipelines.tools.frames import Number, chosen

Degrees = Annotated[
    float, Field(allow_inf_nan=False, ge=-3600, le=3600, description="by how many degrees, positive is clockwise")
]


class Rotate:
    """Shows a picture turned; the frame grows so that nothing is cut off, corners are filled with ``fill``.

    Args:
        fill: red, green and blue of the corners, 0 to 255.
        name, description: by which the model knows it.
    """

    def __init__(
        self,
        fill: tuple[int, int, int] = (127, 127, 127),
        name: str = "rotate",
        description: str = "Shows a picture turned by an angle.",
    ):
        self.fill = fill
        self.name = name
        self.description = description

    def __call__(self, situation: Situation, angle: Degrees, image: Number = 0) -> Observation:
        """The turned picture; right angles are exact."""
        from PIL import Image

        picture, _ = chosen(situation, image)
        # PIL counts counter-clockwise.
        turned = picture.rotate(-angle, Image.Resampling.BICUBIC, expand=True, fillcolor=tuple(self.fill))
        return Observation(images=[turned], calls=[self.name])
