"""A reward of pictures on sampled frames of clips."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.scoring import as_scores
from mmrl.seeding import generator
from mmrl.types import Samples
from rewards import nested_reward
from rewards.media import videos_of


class Frames:
    """Weighted mean of an image reward over one frame from each of a clip's segments (InstructVideo, arXiv 2312.12490).

    Args:
        of: a reward of pictures by its ``type`` and options, e.g. ``{type: hpsv2}``. Gradients flow if they do there.
        segments: a clip is cut into so many equal parts; clips of fewer frames give all they have.
        choose: which frame of a segment: its ``middle``, its ``first``, or a ``random`` one. Random ones are a
            function of the clip's pixels and its prompt, so that the same clip gets the same score.
        attenuation: frame i of F has the weight ``exp(-attenuation * |i - F // 2|)``; 0 weighs all alike,
            InstructVideo has 1. Weights are made to sum to 1, which the released code leaves out: a sum that differs
            from clip to clip would make the score depend on which frames were drawn.

    Raises:
        UserError: ``of`` has no ``type``, or one that there is not.
    """

    differentiable = True

    def __init__(
        self,
        of: dict[str, Any],
        segments: Annotated[int, Field(ge=1)] = 4,
        choose: Literal["middle", "first", "random"] = "middle",
        attenuation: Annotated[float, Field(ge=0)] = 0.0,
    ):
        self.of = nested_reward("frames", of)
        self.name = f"frames_{getattr(self.of, 'name', of['type'])}"
        self.differentiable = bool(getattr(self.of, "differentiable", False))
        self.partial = bool(getattr(self.of, "partial", False))
        self.segments, self.choose, self.attenuation = segments, choose, attenuation

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        videos = videos_of(samples, self.name)
        count, length = videos.shape[:2]
        keys = [prompt.id or prompt.text for prompt in samples.prompts]
        chosen = torch.stack([self._frames(clip, key) for clip, key in zip(videos, keys, strict=True)])
        segments = chosen.shape[1]
        frames = videos[torch.arange(count)[:, None], chosen].flatten(0, 1)
        group = None
        if samples.group is not None:
            # Frames of one segment are compared with each other, not with the rest of their own clip.
            group = (samples.group[:, None] * segments + torch.arange(segments).to(samples.group.device)).flatten()
        pictures = Samples([prompt for prompt in samples.prompts for _ in range(segments)], images=frames, group=group)
        scores = as_scores(self.name, self.of(pictures), pictures, self.partial)
        weights = torch.exp(-self.attenuation * (chosen - length // 2).abs().float())
        weights = (weights / weights.sum(1, keepdim=True)).to(scores.device)
        return (scores.view(count, segments) * weights).sum(1)

    def _frames(self, clip: Tensor, key: str) -> Tensor:
        """Numbers ``[segments]`` of the frames that are scored."""
        length = len(clip)
        edges = torch.linspace(0, length, min(self.segments, length) + 1).long()
        first, last = edges[:-1], edges[1:] - 1
        if self.choose == "first":
            return first
        if self.choose == "middle":
            return (first + last + 1) // 2
        draws = torch.rand(len(first), generator=generator(0, "frames", key, repr(float(clip.detach().double().sum()))))
        return first + (draws * (last - first + 1)).long()
