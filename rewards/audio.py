"""Rewards computed from a waveform alone."""

from __future__ import annotations

from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples

FLOOR = -100.0
"""Level of silence, in dB."""


class Loudness:
    """Root-mean-square level of a waveform in dB of full scale, over all channels: 0 for a square wave of 1.

    Args:
        target: instead of "the louder the better", minus the distance to this level in dB.
    """

    name = "loudness"
    differentiable = True

    def __init__(self, target: float | None = None):
        self.target = target

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, at least -100 dB without a target."""
        if samples.audios is None:
            raise UserError(f"reward '{self.name}' scores audios, but the samples have none")
        power = samples.audios.float().square().mean((1, 2))
        # The constant bounds the gradient at silence.
        level = 10 * (power + 10 ** (FLOOR / 10)).log10()
        return level if self.target is None else -(level - self.target).abs()
