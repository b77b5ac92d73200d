"""Size of a picture as JPEG, the first reward of DDPO (arXiv 2305.13301)."""

from __future__ import annotations

import io
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.types import Samples
from rewards.media import images_of


class Jpeg:
    """File size in kB (1000 bytes) at a fixed quality, with the sign of the goal.

    Args:
        goal: ``compressibility`` rewards small files (minus the size), ``incompressibility`` large ones.
        quality: of the encoder, 1 to 100; DDPO uses 95.
    """

    differentiable = False

    def __init__(
        self,
        goal: Literal["compressibility", "incompressibility"] = "compressibility",
        quality: Annotated[int, Field(ge=1, le=100)] = 95,
    ):
        self.name = f"jpeg_{goal}"
        self.sign = -1.0 if goal == "compressibility" else 1.0
        self.quality = quality

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``: all of one sign."""
        from mmrl.media import to_pil

        sizes = []
        for image in images_of(samples, self.name).detach().cpu():
            file = io.BytesIO()
            to_pil(image).save(file, format="JPEG", quality=self.quality)
            sizes.append(file.tell() / 1000)
        return self.sign * torch.tensor(sizes)
