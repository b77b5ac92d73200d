"""What rewards of pictures and clips have in common: getting at them."""

from __future__ import annotations

from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples


def images_of(samples: Samples, name: str) -> Tensor:
    """The pictures ``[N, 3, H, W]`` as float32; ``UserError`` if the samples are something else."""
    if samples.images is None:
        raise UserError(f"reward '{name}' scores images, but the samples have none")
    return samples.images.float()


def videos_of(samples: Samples, name: str) -> Tensor:
    """The clips ``[N, F, 3, H, W]`` as float32; ``UserError`` if the samples are something else."""
    if samples.videos is None:
        raise UserError(f"reward '{name}' scores videos, but the samples have none")
    return samples.videos.float()


def spread(frames: int, count: int | None) -> list[int]:
    """Numbers of ``count`` frames (None: all), the middles of as many equal parts of a clip; all if it has fewer."""
    if count is None or count >= frames:
        return list(range(frames))
    return [int((k + 0.5) * frames / count) for k in range(count)]
