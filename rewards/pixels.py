"""Rewards computed from the pixels alone; all are differentiable."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrl.errors import UserError
from mmrl.types import Samples
from rewards.media import images_of

Measure = Literal["brightness", "color", "saturation", "contrast", "sharpness"]
Channel = Annotated[float, Field(ge=0, le=1)]


class Pixels:
    """One property of a picture's pixels, in [0, 1]; see the function of the same name for its definition.

    Args:
        measure: which property.
        color: for ``measure="color"``, what to come close to: a name, ``"#rrggbb"`` or (r, g, b) in [0, 1].
        target: instead of "the more the better", minus the distance to this value.
    """

    differentiable = True

    def __init__(
        self,
        measure: Measure = "brightness",
        color: str | tuple[Channel, Channel, Channel] | None = None,
        target: Annotated[float, Field(ge=0, le=1)] | None = None,
    ):
        if measure not in MEASURES:
            raise UserError(f"pixels: measure is '{measure}', should be one of {', '.join(MEASURES)}")
        if (measure == "color") != (color is not None):
            raise UserError("pixels: color is needed for measure=color, and for no other measure")
        self.name = measure
        self.measure = measure
        self.color = None if color is None else parse_color(color)
        self.target = target

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        images = images_of(samples, self.name)
        value = closeness(images, self.color) if self.measure == "color" else MEASURES[self.measure](images)
        return value if self.target is None else -(value - self.target).abs()


def parse_color(color: str | tuple[float, float, float]) -> tuple[float, float, float]:
    """(r, g, b) in [0, 1] from a name, ``"#rrggbb"`` or three numbers; ``UserError`` for anything else."""
    if isinstance(color, str):
        from PIL import ImageColor

        try:
            red, green, blue = ImageColor.getrgb(color)[:3]
        except ValueError as error:
            raise UserError(f"pixels: color is '{color}', should be a name such as red, or #rrggbb") from error
        return red / 255, green / 255, blue / 255
    if len(color) != 3 or not all(0 <= channel <= 1 for channel in color):
        raise UserError(f"pixels: color is {list(color)}, should be three numbers in [0, 1]")
    return tuple(color)


def luma(images: Tensor) -> Tensor:
    """Brightness of each pixel ``[N, H, W]`` with the weights of ITU-R BT.601."""
    return torch.einsum("nchw,c->nhw", images, images.new_tensor([0.299, 0.587, 0.114]))


def brightness(images: Tensor) -> Tensor:
    """Mean luma ``[N]``, 0 for black to 1 for white."""
    return luma(images).mean((1, 2))


def closeness(images: Tensor, color: tuple[float, float, float]) -> Tensor:
    """1 minus the mean absolute difference of all pixels and channels from ``color``, ``[N]``."""
    return 1 - (images - images.new_tensor(color)[:, None, None]).abs().mean((1, 2, 3))


def saturation(images: Tensor) -> Tensor:
    """Mean saturation of HSV ``[N]``: (max - min) / max of the channels.

    Where max is below 1/255 it counts as that, so that gradients stay bounded in the dark.
    """
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp(min=1 / 255)).mean((1, 2))


def contrast(images: Tensor) -> Tensor:
    """Root-mean-square contrast ``[N]``: the standard deviation of the luma, 0 for flat to 0.5."""
    # The tiny constant bounds the gradient of the root at a flat picture.
    return (luma(images).var((1, 2), correction=0) + 1e-10).sqrt()


def sharpness(images: Tensor) -> Tensor:
    """Mean absolute Laplacian of the luma over 4, inside the border: ``[N]``, 0 for flat to 1 for a chequerboard."""
    kernel = images.new_tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]]) / 4
    return F.conv2d(luma(images)[:, None], kernel[None, None]).abs().mean((1, 2, 3))


MEASURES = {
    "brightness": brightness,
    "color": closeness,
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
}
