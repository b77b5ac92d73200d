"""Rewards of clips by the features of their frames; all are differentiable."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrl.errors import UserError
from mmrl.media import open_picture
from mmrl.types import Prompt, Samples
from rewards.clip import BatchSize
from rewards.encoders import Backend, Dtype, Encoder, load_encoder
from rewards.media import spread, videos_of

FrameCount = Annotated[int, Field(gt=0)]


class _FrameFeatures:
    """What the rewards below share: a CLIP-type model that sees frames.

    Args:
        model, backend, checkpoint, processor, dtype, device: as for :class:`rewards.clip.ClipSimilarity`.
        frames: how many of a clip's frames are looked at, spread evenly over it; None for all.
        batch_size: pictures per forward.
    """

    name = ""
    differentiable = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        backend: Backend = "transformers",
        checkpoint: str | None = None,
        processor: str | None = None,
        frames: FrameCount | None = None,
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        self.encoder = load_encoder(model, backend, checkpoint, processor, dtype, device)
        self.frames = frames
        self.batch_size = batch_size

    def features(self, samples: Samples) -> Tensor:
        """Unit vectors ``[N, frames, D]``."""
        videos = videos_of(samples, self.name)
        chosen = videos[:, spread(videos.shape[1], self.frames)]
        return self.encoder.images(chosen.flatten(0, 1), self.batch_size).unflatten(0, chosen.shape[:2])


class VideoClip(_FrameFeatures):
    """Cosine of a clip and the text of its prompt: the mean of the frames' features against the text's."""

    name = "video_clip"

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, in [-1, 1]."""
        clips = F.normalize(self.features(samples).mean(1), dim=-1)
        texts = self.encoder.texts([prompt.text for prompt in samples.prompts], self.batch_size)
        return (clips * texts).sum(-1)


class TemporalConsistency(_FrameFeatures):
    """How alike frames are to the one before and to the first: background consistency of VBench (arXiv 2311.17982).

    The mean over all frames but the first of half the two cosines. A still clip has 1, so balance it with a reward of
    motion such as ``dynamic_degree``.
    """

    name = "temporal_consistency"

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, in [-1, 1]."""
        features = self.features(samples)
        if features.shape[1] < 2:
            raise UserError("reward 'temporal_consistency' needs clips of two or more frames")
        to_previous = (features[:, 1:] * features[:, :-1]).sum(-1)
        to_first = (features[:, 1:] * features[:, :1]).sum(-1)
        return (to_previous + to_first).mean(1) / 2


class FirstFrame:
    """How faithful a clip's first frame is to the picture that it was to start from: ``Prompt.images[0]``.

    Args:
        model: a CLIP-type model whose cosine is the score; without it the score is 1 minus the mean absolute difference
            of pixels, the picture being resized to the clip's size.
        backend, checkpoint, processor, dtype, device: of the model, as for :class:`rewards.clip.ClipSimilarity`.
        batch_size: pictures per forward.
    """

    name = "first_frame"
    differentiable = True

    def __init__(
        self,
        model: str | None = None,
        backend: Backend = "transformers",
        checkpoint: str | None = None,
        processor: str | None = None,
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        self.encoder: Encoder | None = None
        if model is not None:
            self.encoder = load_encoder(model, backend, checkpoint, processor, dtype, device)
        self.batch_size = batch_size

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``: in [0, 1] by pixels, in [-1, 1] by a model."""
        first = videos_of(samples, self.name)[:, 0]
        wanted = torch.stack([self._wanted(prompt, first.shape[-2:]) for prompt in samples.prompts]).to(first.device)
        if self.encoder is None:
            return 1 - (first - wanted).abs().mean((1, 2, 3))
        with torch.no_grad():
            asked = self.encoder.images(wanted, self.batch_size)
        return (self.encoder.images(first, self.batch_size) * asked).sum(-1)

    def _wanted(self, prompt: Prompt, size: torch.Size) -> Tensor:
        from torchvision.transforms.functional import to_tensor

        if not prompt.images:
            place = prompt.id or prompt.text
            raise UserError(f"reward 'first_frame' compares with the prompt's picture, but row '{place}' has no images")
        picture = to_tensor(open_picture(prompt.images[0]))
        if picture.shape[-2:] == size:
            return picture
        return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)
