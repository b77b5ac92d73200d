"""Predicted reward of the noisy states of a sampler: a critic for actor-critic training (AC-Flow, arXiv:2510.18072)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmrl.types import Prompt
from pipelines.seam import Call, Facts, Seam

WIDTH = 128
OCTAVES = 3


class StateValue(nn.Module):
    """``V(x_t, t, prompt)``: a small network that reads a state, the denoiser's clean estimate of it, time and text.

    Every place of the latents goes through the same layers, with its coordinates; their mean, the time and the text
    give the value. So latents of any size and layout will do, and none but the value's own weights get its gradient.
    The estimate carries what the denoiser knows of the prompt and of what will come. Values are 0 before training.

    Args:
        row: shape of one row's state: ``[C, ...]``, or ``[places, C]`` for packed latents.
        text_dim: size of the pooled text; 0 where there is none.
    """

    def __init__(self, row: Sequence[int], text_dim: int):
        super().__init__()
        self.packed = len(row) == 2
        channels, axes = (row[1], 1) if self.packed else (row[0], len(row) - 1)
        self.places = nn.Sequential(
            nn.Linear(2 * channels + 2 * OCTAVES * axes, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH), nn.SiLU()
        )
        self.text = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, WIDTH)) if text_dim else None
        inner = WIDTH * (2 if text_dim else 1) + 2 * OCTAVES
        self.head = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, WIDTH), nn.SiLU(), nn.Linear(WIDTH, 1))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def forward(self, text: Tensor, x: Tensor, x0hat: Tensor, time: float) -> Tensor:
        """Values ``[n]`` of float32 states ``x [n, ...]`` with clean estimates ``x0hat``, at ``time`` in (0, 1].

        ``text [n, text_dim]`` is :attr:`pipelines.seam.Facts.text`.
        """
        with torch.autocast(x.device.type, enabled=False):
            state = torch.cat([x, x0hat], -1 if self.packed else 1).detach().float()
            state = state if self.packed else state.movedim(1, -1)
            grid = torch.cartesian_prod(*(torch.linspace(-1, 1, size, device=x.device) for size in state.shape[1:-1]))
            where = _waves(grid.reshape(-1, state.ndim - 2)).expand(len(x), -1, -1)
            parts = [self.places(torch.cat([state.flatten(1, -2), where], -1)).mean(1)]
            parts += [] if self.text is None else [self.text(text.to(x.device))]
            parts += [_waves(torch.full((len(x), 1), time, device=x.device))]
            return self.head(torch.cat(parts, 1))[:, 0]


def state_value(seam: Seam, call: Call) -> StateValue:
    """A critic for the states of a pipeline under a call; the same weights each time."""
    facts = probe(seam, call)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return StateValue(facts.latent_shape, len(facts.text)).to(seam.device)


def probe(seam: Seam, call: Call) -> Facts:
    """Shapes of a pipeline's states and text, from a prompt without words and, for one that edits, a grey picture."""
    from PIL import Image

    pictures = (Image.new("RGB", (64, 64), "grey"),) if "image" in seam.arguments else ()
    return seam.inspect(Prompt("", images=pictures), call)


def _waves(position: Tensor) -> Tensor:
    """Sines and cosines of several wavelengths: ``[n, A]`` in [-1, 1] to ``[n, 2 OCTAVES A]``."""
    angles = torch.cat([position * math.pi / 2 * 2**octave for octave in range(OCTAVES)], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)
