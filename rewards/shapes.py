"""How well pictures of the quickstart world show what their prompts ask for."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples
from mmrl.world.captions import check_target
from mmrl.world.verify import score


class Shapes:
    """Exact verifier of the shape world: colour, shape, count and position against ``Prompt.target``.

    Args:
        mode: "graded" is the mean of the marks of the parts, "strict" 1 when all are right and else 0. Both are in
            [0, 1]; see :mod:`mmrl.world.verify`.
    """

    name = "shapes"
    differentiable = False
    partial = False

    def __init__(self, mode: Literal["graded", "strict"] = "graded"):
        self.mode = mode

    def __call__(self, samples: Samples) -> Tensor:
        """Scores ``[N]``.

        Raises:
            UserError: the samples are not square pictures, or a prompt's target is not a request of the shape world.
        """
        if samples.images is None:
            raise UserError("reward 'shapes' scores images, but the samples have none")
        if samples.images.shape[-1] != samples.images.shape[-2]:
            raise UserError(f"reward 'shapes' needs square pictures, not {tuple(samples.images.shape[-2:])}")
        for prompt in samples.prompts:
            check_target(prompt.target, prompt.id or prompt.text)
        targets = [prompt.target for prompt in samples.prompts]
        return torch.tensor(score(samples.images, targets, strict=self.mode == "strict"), dtype=torch.float32)
