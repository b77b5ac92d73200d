"""What every entry of the zoo is made with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch

from mmrl.seeding import generator
from zoo.text import set_random_weights

PROMPTS = ("a red circle left of a blue square", "two green triangles")


@dataclass
class Entry:
    """A pipeline and how to call it.

    Attributes:
        pipe: the pipeline, on the CPU, float32, evaluation mode.
        call: keyword arguments of every call (sizes, guidance...), without prompts and outputs.
        inputs: keyword arguments of one prompt's call (the picture to edit), for pipelines that need them.
    """

    pipe: diffusers.DiffusionPipeline
    call: dict[str, Any]
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> torch.nn.Module:
        """The denoiser."""
        return self.pipe.transformer if hasattr(self.pipe, "transformer") else self.pipe.unet

    @property
    def prompts(self) -> list[str]:
        """Two different prompts, or one where a picture goes with it."""
        return list(PROMPTS[: 1 if self.inputs else 2])


def finish(pipe: diffusers.DiffusionPipeline, **entry: Any) -> Entry:
    """Give every model of ``pipe`` that has none yet its random weights, and wrap it."""
    for name, part in pipe.components.items():
        if isinstance(part, diffusers.ModelMixin):
            set_random_weights(part, type(pipe).__name__, name)
    pipe.set_progress_bar_config(disable=True)
    return Entry(pipe, **entry)


def picture(size: int = 16) -> Any:
    """A PIL picture of seeded noise."""
    from PIL import Image

    pixels = torch.randint(0, 256, (size, size, 3), generator=generator(0, "zoo", "picture"), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def image_vae(channels: int = 4, quant: bool = False, **config: Any) -> diffusers.AutoencoderKL:
    """AutoencoderKL with factor 2."""
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        use_quant_conv=quant,
        use_post_quant_conv=quant,
        **{"shift_factor": 0.06, "scaling_factor": 1.5, **config},
    )


def flow(**config: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """The scheduler of the flow-matching pipelines."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)
