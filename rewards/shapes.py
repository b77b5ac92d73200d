"""How well pictures and clips of the quickstart world show what their prompts ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples
from mmrl.world import captions, motion, motion_verify, verify


class Shapes:
    """Exact verifier of the shape world: colour, shape, count and position against ``Prompt.target``.

    Args:
        mode: "graded" is the mean of the marks of the parts, "strict" 1 when all are right and else 0. Both are in
            [0, 1]; see :mod:`mmrl.world.verify`.
    """

    name = "shapes"
    differentiable = False
    partial = False
    output: ClassVar[str] = "images"
    check: ClassVar[Callable] = staticmethod(captions.check_target)
    score: ClassVar[Callable] = staticmethod(verify.score)

    def __init__(self, mode: Literal["graded", "strict"] = "graded"):
        self.mode = mode

    def __call__(self, samples: Samples) -> Tensor:
        """Scores ``[N]``.

        Raises:
            UserError: the samples are not of this kind, not square, or a prompt's target is not a request of the world.
        """
        made = getattr(samples, self.output)
        if made is None:
            raise UserError(f"reward '{self.name}' scores {self.output}, but the samples have none")
        if made.shape[-1] != made.shape[-2]:
            raise UserError(f"reward '{self.name}' needs square {self.output}, not {tuple(made.shape[-2:])}")
        for prompt in samples.prompts:
            self.check(prompt.target, prompt.id or prompt.text)
        targets = [prompt.target for prompt in samples.prompts]
        return torch.tensor(self.score(made, targets, strict=self.mode == "strict"), dtype=torch.float32)


class MovingShapes(Shapes):
    """The same for clips of moving shapes: colour, shape, direction and speed (:mod:`mmrl.world.motion_verify`)."""

    name = "moving_shapes"
    output = "videos"
    check = staticmethod(motion.check_target)
    score = staticmethod(motion_verify.score)
