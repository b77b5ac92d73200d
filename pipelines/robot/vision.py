"""Encoders of pictures: a convolutional stem, transformer layers, and vision backbones of transformers.

A picture is uint8 ``[n, 3, h, w]``; an encoder makes ``[n, S, width]`` tokens of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate, scaled_dot_product_attention

from mmrl.errors import UserError


class ConvStem(nn.Module):
    """Three convolutions of stride 2, each place of what is left a token with its own position, which is learned.

    A linear map of patches instead does not learn where things are within the few thousand pictures of a small clone;
    positions that begin as sines and cosines of the place save a third of its steps.

    Args:
        image_shape: (3, h, w); sides of at least 8.
        width: of a token, a multiple of 4.
    """

    def __init__(self, image_shape: Sequence[int], width: int):
        super().__init__()
        channels = [3, width // 4, width // 2, width]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in pairwise(channels)
        )
        rows, columns = self._convolved(torch.zeros(1, *image_shape)).shape[2:]
        self.positions = nn.Parameter(places(rows, columns, width))

    def forward(self, image: Tensor) -> Tensor:
        """``[n, 3, h, w]`` to ``[n, S, width]``."""
        pixels = image.to(self.positions.dtype) / 127.5 - 1
        return self._convolved(pixels).flatten(2).transpose(1, 2) + self.positions

    def _convolved(self, pixels: Tensor) -> Tensor:
        for number, convolution in enumerate(self.convolutions):
            pixels = convolution(pixels if number == 0 else gelu(pixels))
        return pixels


def places(rows: int, columns: int, width: int) -> Tensor:
    """Sines and cosines of the places of a grid, ``[rows * columns, width]``, of the size that convolutions give."""
    frequencies = torch.exp(torch.linspace(0, math.log(8), width // 4)) * math.pi / 2
    y, x = torch.meshgrid(torch.linspace(-1, 1, rows), torch.linspace(-1, 1, columns), indexing="ij")
    angles = torch.stack([x, y]).flatten(1)[:, :, None] * frequencies
    return 0.3 * torch.cat([*angles.sin(), *angles.cos()], 1)


class Layer(nn.Module):
    """A transformer layer (pre-norm) whose tokens attend to each other and to a memory beside them.

    Args:
        width: of a token; a multiple of ``heads``.
        memory_width: of the tokens of the memory, where there is one.
    """

    def __init__(self, width: int, heads: int, memory_width: int | None = None):
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if memory_width is not None:
            self.before_memory = nn.LayerNorm(memory_width)
            self.memory_in = nn.Linear(memory_width, 2 * width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            tokens: ``[n, Q, width]``.
            mask: bool, broadcasts to ``[n, 1, Q, S + Q]``; which of memory and tokens each token sees.
            memory: ``[n, S, memory_width]``.
        """
        query, key, value = self._split(self.attention_in(self.before_attention(tokens)), 3)
        if memory is not None:
            more_keys, more_values = self._split(self.memory_in(self.before_memory(memory)), 2)
            key, value = torch.cat([more_keys, key], 2), torch.cat([more_values, value], 2)
        found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        tokens = tokens + self.attention_out(found.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.before_mlp(tokens))

    def _split(self, joined: Tensor, parts: int) -> tuple[Tensor, ...]:
        """``[n, S, parts * width]`` to as many ``[n, heads, S, width / heads]``."""
        return joined.unflatten(2, (parts, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()


class Backbone(nn.Module):
    """The vision model of a folder or hub id, through ``AutoModel`` of transformers: ViT, DINO, SigLIP, CLIP...

    Args:
        model: folder or id, of safetensors; a model for pictures and text gives its vision part.
        freeze: its weights do not train.

    Raises:
        UserError: it cannot be loaded, or is no vision model.
    """

    def __init__(self, model: str, freeze: bool = True):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        try:
            network = AutoModel.from_pretrained(model, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(f"vision backbone '{model}' cannot be loaded: {error}") from error
        network = getattr(network, "vision_model", network)
        config = getattr(network.config, "vision_config", network.config)
        if network.main_input_name != "pixel_values" or getattr(config, "image_size", None) is None:
            raise UserError(f"{type(network).__name__} is no vision model of fixed picture size: choose a ViT")
        self.network = network.eval().requires_grad_(not freeze)
        self.freeze = freeze
        self.width = config.hidden_size
        size = config.image_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)
        for name, values in (("mean", processor.image_mean), ("std", processor.image_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """``[n, 3, h, w]``, resized to what the model knows, to ``[n, S, width]``."""
        pixels = interpolate(image.float() / 255, self.size, mode="bilinear", antialias=True)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return self.network(pixel_values=(pixels - self.mean) / self.std).last_hidden_state
