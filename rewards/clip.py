"""Rewards that are a similarity of picture and prompt in a CLIP-type model; all are differentiable."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from mmrl.types import Samples
from rewards.encoders import Backend, Dtype, load_encoder
from rewards.media import images_of

BatchSize = Annotated[int, Field(gt=0)]
Output = Literal["cosine", "logit"]


class ClipSimilarity:
    """Similarity of a picture and the text of its prompt.

    Args:
        model: a repository on the hub or a folder; for open_clip also an architecture, see
            :class:`rewards.encoders.OpenClipEncoder`.
        backend: the library that loads it.
        checkpoint: open_clip only: weights for an architecture.
        processor: transformers only: where image processor and tokenizer are, if not with the model.
        output: ``cosine`` in [-1, 1], or ``logit``, the cosine times the model's own logit scale (about 100 for CLIP).
        resize: open_clip only: ``shortest`` (and crop), ``longest`` (and pad) or ``squash``; default as the model says.
        batch_size: pictures per forward.
        dtype: of the network.
        device: default, that of the pictures.
    """

    name = "clip"
    differentiable = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        backend: Backend = "transformers",
        checkpoint: str | None = None,
        processor: str | None = None,
        output: Output = "cosine",
        resize: Literal["shortest", "longest", "squash"] | None = None,
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        self.encoder = load_encoder(model, backend, checkpoint, processor, dtype, device, resize)
        self.factor = self.encoder.logit_scale if output == "logit" else 1.0
        self.batch_size = batch_size

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        images = self.encoder.images(images_of(samples, self.name), self.batch_size)
        texts = self.encoder.texts([prompt.text for prompt in samples.prompts], self.batch_size)
        return self.factor * (images * texts).sum(-1)


class PickScore(ClipSimilarity):
    """PickScore (arXiv 2305.01569): the cosine times the model's logit scale, about 18 to 24. Flow-GRPO divides by 26.

    Args as for :class:`ClipSimilarity`.
    """

    name = "pickscore"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        super().__init__(model, processor=processor, output="logit", batch_size=batch_size, dtype=dtype, device=device)


class HPSv2(ClipSimilarity):
    """Human Preference Score v2 (arXiv 2306.09341): a cosine, about 0.2 to 0.35. Pictures are padded, not cropped.

    Args as for :class:`ClipSimilarity`.
    """

    name = "hpsv2"

    def __init__(
        self,
        model: str = "ViT-H-14",
        checkpoint: str | None = "xswu/HPSv2:HPS_v2.1_compressed.pt",
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        super().__init__(
            model, "open_clip", checkpoint, resize="longest", batch_size=batch_size, dtype=dtype, device=device
        )
