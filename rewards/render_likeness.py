"""How alike two pictures are, in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def ssim(a: Tensor, b: Tensor, side: int = 11, sigma: float = 1.5) -> float:
    """Structural similarity (Wang et al., 2004) of pictures ``[3, H, W]`` in [0, 1], mean over windows and channels.

    Gaussian windows that lie wholly in the picture; smaller ones if the picture is smaller than a window.
    """
    side = min(side, *a.shape[-2:])
    offsets = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    line /= line.sum()
    x, y = (picture.double()[:, None] for picture in (a, b))

    def mean(picture: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(picture, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mx, my = mean(x), mean(y)
    vx, vy, both = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float(((2 * mx * my + c1) * (2 * both + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean())


def nearness(a: Tensor, b: Tensor) -> float:
    """1 minus the root mean square difference of the pixels."""
    return 1 - float((a.double() - b.double()).square().mean().sqrt())


def beyond_blank(measure, picture: Tensor, target: Tensor) -> float:
    """A likeness moved so that an empty page gets 0 and the target itself 1; worse than an empty page is 0 too.

    Most of a chart is background, so that an empty page is much like it. The page has the median colour of the target.
    """
    colour = target.flatten(1).median(dim=1).values
    blank = measure(colour[:, None, None].expand_as(target), target)
    found = measure(picture, target)
    if 1 - blank < 1e-6:
        return max(found, 0.0)
    return min(max((found - blank) / (1 - blank), 0.0), 1.0)
