"""A differentiable reward of the ControlNet++ recipe: does the picture have the edges that its condition asks for."""

import torch
from torch.nn.functional import conv2d, interpolate
from torchvision.transforms.functional import to_tensor

from mmrl.media import open_picture

SOBEL = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])


def edges(pictures):
    """Strength ``[N, 1, H, W]`` in [0, 1] of the brightness edges of ``[N, 3, H, W]``."""
    grey = pictures.mean(1, keepdim=True)
    kernels = torch.stack([SOBEL, SOBEL.T])[:, None].to(grey)
    strength = (conv2d(grey, kernels, padding=1).square().sum(1, keepdim=True) + 1e-6).sqrt() / 4
    return strength.clamp(max=1)


def agreement(samples):
    """Minus the mean squared difference of the picture's edges and the condition picture, which is an edge map."""
    found = edges(samples.images)
    wanted = torch.stack(
        [to_tensor(open_picture(prompt.images[0])).mean(0, keepdim=True) for prompt in samples.prompts]
    )
    wanted = interpolate(wanted.to(found), found.shape[-2:], mode="bilinear")
    return -(found - wanted).square().flatten(1).mean(1)


agreement.differentiable = True
