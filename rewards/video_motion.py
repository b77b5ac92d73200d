"""Rewards of clips by optical flow, by OpenCV (``pip install "mmrl[video]"``); flow has no gradient."""

from __future__ import annotations

import itertools
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrl.errors import UserError
from mmrl.types import Samples
from rewards.media import videos_of
from rewards.pixels import luma

FLOW = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
"""Parameters of Farneback's method as in OpenCV's own example."""


class DynamicDegree:
    """How far the fastest parts of a clip move from frame to frame, as a fraction of its shorter side.

    As in VBench (arXiv 2311.17982) the mean of the largest 5 % of the flow's lengths, averaged over pairs of frames,
    with Farneback's flow in place of a network's.

    Args:
        enough: with it the score is the share of this that is reached, at most 1, so that more motion is not
            always better. VBench calls clips dynamic from 6 / 256 = 0.023 on.
        top: share of the pixels that count.
    """

    name = "dynamic_degree"
    differentiable = False
    partial = False

    def __init__(
        self,
        enough: Annotated[float, Field(gt=0)] | None = None,
        top: Annotated[float, Field(gt=0, le=1)] = 0.05,
    ):
        self.cv2 = _opencv(self.name)
        self.enough, self.top = enough, top

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, at least 0."""
        frames = _grey(samples, self.name)
        short = min(frames.shape[-2:])
        count = max(1, round(self.top * frames[0, 0].size))
        scores = []
        for clip in frames:
            lengths = [np.hypot(*flow(self.cv2, a, b)) / short for a, b in itertools.pairwise(clip)]
            fastest = [np.partition(length.ravel(), -count)[-count:].mean() for length in lengths]
            scores.append(float(np.mean(fastest)))
        found = torch.tensor(scores)
        return found if self.enough is None else (found / self.enough).clamp(max=1)


class MotionSmoothness:
    """How well each frame is foreseen from its two neighbours, in [0, 1]: 1 for even motion, less for jerks.

    Motion smoothness of VBench (arXiv 2311.17982): 1 minus the mean absolute difference of a frame and the one that is
    interpolated between its neighbours; here by moving either half way along Farneback's flow, there by a network.
    """

    name = "motion_smoothness"
    differentiable = False
    partial = False

    def __init__(self):
        self.cv2 = _opencv(self.name)

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        videos = videos_of(samples, self.name).detach().cpu()
        if videos.shape[1] < 3:
            raise UserError(f"reward '{self.name}' needs clips of three or more frames, not {videos.shape[1]}")
        scores = []
        for clip, grey in zip(videos, _grey(samples, self.name), strict=True):
            errors = []
            for k in range(1, len(clip) - 1):
                there, back = flow(self.cv2, grey[k - 1], grey[k + 1]), flow(self.cv2, grey[k + 1], grey[k - 1])
                middle = (_moved(clip[k - 1], back) + _moved(clip[k + 1], there)) / 2
                errors.append((middle - clip[k]).abs().mean())
            scores.append(1 - torch.stack(errors).mean())
        return torch.stack(scores)


def flow(cv2: Any, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Where each pixel of ``before`` (uint8 ``[H, W]``) has moved in ``after``: ``[2, H, W]`` in pixels, x first."""
    return cv2.calcOpticalFlowFarneback(before, after, None, **FLOW).transpose(2, 0, 1)


def _moved(picture: Tensor, way: np.ndarray) -> Tensor:
    """``picture [3, H, W]`` with each pixel taken from half of ``way`` further on."""
    height, width = picture.shape[-2:]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    x, y = x + torch.from_numpy(way[0]) / 2, y + torch.from_numpy(way[1]) / 2
    grid = torch.stack([2 * x / max(width - 1, 1) - 1, 2 * y / max(height - 1, 1) - 1], -1)
    return F.grid_sample(picture[None], grid[None], padding_mode="border", align_corners=True)[0]


def _grey(samples: Samples, name: str) -> np.ndarray:
    """Brightness of all frames as uint8 ``[N, F, H, W]``."""
    videos = videos_of(samples, name).detach().cpu()
    if videos.shape[1] < 2:
        raise UserError(f"reward '{name}' needs clips of two or more frames")
    grey = luma(videos.flatten(0, 1)).unflatten(0, videos.shape[:2])
    return (grey.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def _opencv(name: str) -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise UserError(f"reward '{name}' finds motion with OpenCV: pip install \"mmrl[video]\"") from error
    return cv2
