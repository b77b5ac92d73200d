"""What CLIP models do to a picture before they see it, on tensors and with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from mmrl.errors import UserError


@dataclass(frozen=True)
class Preprocess:
    """Resize, crop or pad to ``size``, normalise.

    Attributes:
        size: (height, width) that the model takes.
        resize: ``shortest`` scales the shorter side to its size and crops the middle, ``longest`` scales the picture to
            fit and pads with ``fill``, ``squash`` ignores the aspect ratio.
        short_side: for ``shortest``, the length that the shorter side is scaled to; default such that
            the picture just covers ``size``.
        interpolation: ``bicubic`` or ``bilinear``, always antialiased.
        mean, std: per channel, of pictures in [0, 1].
        fill: value of the padding in [0, 1].
        round_crop: which way the middle goes when the surplus is odd: rounded half to even (torchvision, open_clip), or
            down (transformers).
    """

    size: tuple[int, int]
    resize: Literal["shortest", "longest", "squash"] = "shortest"
    short_side: int | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    fill: float = 0.0
    round_crop: bool = True

    def __call__(self, images: Tensor) -> Tensor:
        """``[N, 3, H, W]`` in [0, 1] to ``[N, 3, *size]`` as the network takes it."""
        images = self._scale(images)
        images = self._crop_or_pad(images)
        mean, std = images.new_tensor(self.mean)[:, None, None], images.new_tensor(self.std)[:, None, None]
        return (images - mean) / std

    def _scale(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if self.resize == "squash":
            size = self.size
        elif self.resize == "longest":
            ratio = max(height / self.size[0], width / self.size[1])
            size = (round(height / ratio), round(width / ratio))
        elif self.size[0] != self.size[1] and self.short_side is None:
            ratio = min(height / self.size[0], width / self.size[1])
            size = (round(height / ratio), round(width / ratio))
        else:
            short = self.short_side or self.size[0]
            long = int(short * max(height, width) / min(height, width))
            size = (short, long) if height <= width else (long, short)
        if size == (height, width):
            return images
        scaled = F.interpolate(images, size, mode=self.interpolation, antialias=True, align_corners=False)
        # Bicubic overshoots at edges; eight-bit pictures, on which these models were trained, cannot.
        return scaled.clamp(0, 1)

    def _crop_or_pad(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        tall, wide = max(self.size[0] - height, 0), max(self.size[1] - width, 0)
        if tall or wide:
            images = F.pad(images, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2), value=self.fill)
            height, width = images.shape[-2:]
        top, left = (self._middle(have - want) for have, want in zip((height, width), self.size, strict=True))
        return images[..., top : top + self.size[0], left : left + self.size[1]]

    def _middle(self, surplus: int) -> int:
        return round(surplus / 2) if self.round_crop else surplus // 2


def from_open_clip(config: dict[str, Any]) -> Preprocess:
    """The preprocessing of an open_clip model, from its ``visual.preprocess_cfg``."""
    size = config["size"]
    size = (size, size) if isinstance(size, int) else tuple(size)
    interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
    return Preprocess(
        size=size,
        resize=config["resize_mode"],
        interpolation=interpolation,
        mean=_channels(config["mean"]),
        std=_channels(config["std"]),
        fill=config["fill_color"] / 255,
    )


def from_transformers(processor: Any) -> Preprocess:
    """The preprocessing of a transformers image processor, from its attributes.

    Raises:
        UserError: it does something else than resize, crop in the middle, rescale and normalise.
    """
    kind = type(processor).__name__
    if not processor.do_resize or not processor.do_normalize:
        raise UserError(f"{kind} does not resize and normalise, so this model cannot be used as a reward")
    size = dict(processor.size)
    crop = dict(processor.crop_size) if getattr(processor, "do_center_crop", False) else None
    common = {
        "interpolation": _interpolation(processor.resample, kind),
        "mean": _channels(processor.image_mean),
        "std": _channels(processor.image_std),
        "round_crop": False,
    }
    if size.get("shortest_edge") and not size.get("longest_edge") and crop:
        return Preprocess((crop["height"], crop["width"]), "shortest", size["shortest_edge"], **common)
    if size.get("height") and size.get("width") and (crop is None or (crop["height"], crop["width"]) == _hw(size)):
        return Preprocess(_hw(size), "squash", **common)
    raise UserError(f"{kind} resizes to {size} and crops to {crop}, which is not supported for rewards")


def _hw(size: dict[str, int]) -> tuple[int, int]:
    return size["height"], size["width"]


def _channels(values: Any) -> tuple[float, float, float]:
    return (float(values),) * 3 if isinstance(values, (int, float)) else tuple(float(value) for value in values)


def _interpolation(resample: Any, kind: str) -> Literal["bicubic", "bilinear"]:
    # An enum of the imaging library or its number.
    names = {2: "bilinear", 3: "bicubic"}
    number = int(resample)
    if number not in names:
        raise UserError(f"{kind} resizes with filter {resample}, which is not supported for rewards (2 or 3 are)")
    return names[number]
