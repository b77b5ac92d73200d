"""What image rewards have in common: getting at the pictures."""

from __future__ import annotations

from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples


def images_of(samples: Samples, name: str) -> Tensor:
    """The pictures ``[N, 3, H, W]`` as float32; ``UserError`` if the samples are something else."""
    if samples.images is None:
        raise UserError(f"reward '{name}' scores images, but the samples have none")
    return samples.images.float()
