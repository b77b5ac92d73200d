"""How well clips of the quickstart world show what their prompts ask for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples
from mmrl.world.motion import check_target
from mmrl.world.motion_verify import score


class MovingShapes:
    """Exact verifier of clips of moving shapes: colour, shape, direction and speed against ``Prompt.target``.

    Args:
        mode: "graded" is the mean of the marks of the parts, "strict" 1 when all are right and else 0. Both are in
            [0, 1]; see :mod:`mmrl.world.motion_verify`.
    """

    name = "moving_shapes"
    differentiable = False
    partial = False

    def __init__(self, mode: Literal["graded", "strict"] = "graded"):
        self.mode = mode

    def __call__(self, samples: Samples) -> Tensor:
        """Scores ``[N]``.

        Raises:
            UserError: the samples are not square clips, or a prompt's target is not a request of this world.
        """
        if samples.videos is None:
            raise UserError("reward 'moving_shapes' scores videos, but the samples have none")
        if samples.videos.shape[-1] != samples.videos.shape[-2]:
            raise UserError(f"reward 'moving_shapes' needs square frames, not {tuple(samples.videos.shape[-2:])}")
        for prompt in samples.prompts:
            check_target(prompt.target, prompt.id or prompt.text)
        targets = [prompt.target for prompt in samples.prompts]
        return torch.tensor(score(samples.videos, targets, strict=self.mode == "strict"), dtype=torch.float32)
