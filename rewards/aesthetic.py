"""LAION's aesthetic predictor: a small head on CLIP embeddings of pictures. Differentiable."""

from __future__ import annotations

import itertools
import re

from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.types import Samples
from rewards.clip import BatchSize
from rewards.encoders import Backend, Dtype, load_encoder
from rewards.media import images_of
from rewards.weights import find_file, load_tensors


class Aesthetic:
    """How pleasing people find a picture, about 1 to 10; the prompt plays no part.

    Args:
        model: the CLIP model, as for :class:`rewards.clip.ClipSimilarity`; it must be the one the head was trained on.
        head: weights of the head in the layout of LAION's predictor: a file, or ``"owner/repository:file"`` on the hub.
        backend, checkpoint, processor, batch_size, dtype, device: as for :class:`rewards.clip.ClipSimilarity`.

    Raises:
        UserError: weights that are not found, not a head, or made for embeddings of another width.
    """

    name = "aesthetic"
    differentiable = True

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        head: str = "trl-lib/ddpo-aesthetic-predictor:aesthetic-model.pth",
        backend: Backend = "transformers",
        checkpoint: str | None = None,
        processor: str | None = None,
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        path = find_file(head, "aesthetic: head")
        self.head = build_head(load_tensors(path, "aesthetic: head"), str(path))
        self.encoder = load_encoder(model, backend, checkpoint, processor, dtype, device)
        self.model = model
        self.batch_size = batch_size

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``."""
        features = self.encoder.images(images_of(samples, self.name), self.batch_size)
        if features.shape[-1] != self.head[0].in_features:
            raise UserError(
                f"aesthetic: the head takes embeddings of {self.head[0].in_features} numbers, but '{self.model}' gives "
                f"{features.shape[-1]}"
            )
        return self.head.to(features.device)(features).squeeze(-1)


def build_head(tensors: dict[str, Tensor], place: str) -> nn.Sequential:
    """The head of LAION's predictor from its weights.

    Version 2 is a row of linear layers, ``layers.<n>.weight``, with nothing but dropout in between; version 1 is a
    single one, ``weight``. Other tensors in the file (an encoder saved along with it) are left alone.

    Raises:
        UserError: there is no such layer, or they do not fit on each other or do not end in one number.
    """
    found = {
        int(match[1] or 0): name
        for name in tensors
        if (match := re.fullmatch(r"(?:layers\.(\d+)\.)?weight", name)) and tensors[name].ndim == 2
    }
    weights = [tensors[found[index]] for index in sorted(found)]
    biases = [tensors.get(found[index].removesuffix("weight") + "bias") for index in sorted(found)]
    widths = [weight.shape for weight in weights]
    fits = all(after[1] == before[0] for before, after in itertools.pairwise(widths))
    if not weights or not fits or widths[-1][0] != 1:
        raise UserError(
            f"aesthetic: '{place}' is not a head of LAION's layout (layers.0.weight [width, embedding], ..., "
            f"layers.7.weight [1, width]); it has {', '.join(sorted(tensors)[:6])}"
        )
    layers = []
    for weight, bias in zip(weights, biases, strict=True):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
        layers.append(layer)
    return nn.Sequential(*layers).requires_grad_(False).eval()
