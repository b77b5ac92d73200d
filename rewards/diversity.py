"""How different the samples of one prompt are: the gauge against collapse and reward hacking."""

from __future__ import annotations

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples


class Diversity:
    """Mean distance of a sample to the other samples of its group.

    The distance is the root-mean-square difference over all pixels and channels: 0 for identical pictures, 1 for black
    and white. Does not apply (NaN) to a sample that is alone in its group. The mean over a group is its mean pairwise
    distance.
    """

    name = "diversity"
    differentiable = True
    partial = True

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        media = samples.images if samples.videos is None else samples.videos
        if media is None or samples.group is None:
            raise UserError("reward 'diversity' compares the images or videos of a group, but the samples have none")
        return group_distances(media.float().flatten(1), samples.group.to(media.device))


def group_distances(points: Tensor, group: Tensor) -> Tensor:
    """Mean root-mean-square distance to the others of the group.

    Args:
        points: ``[N, D]``.
        group: long ``[N]``.

    Returns:
        ``[N]``; NaN for a group of one.
    """
    out = torch.full_like(points[:, 0], torch.nan)
    for index in group.unique():
        rows = (group == index).nonzero().flatten()
        if len(rows) > 1:
            # The direct form: by way of a matrix product near-identical pictures would lose their small distances.
            distances = torch.cdist(points[rows], points[rows], compute_mode="donot_use_mm_for_euclid_dist")
            out = out.index_put((rows,), distances.sum(1) / (len(rows) - 1) / points.shape[1] ** 0.5)
    return out
