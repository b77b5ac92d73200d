"""CLIP-type models, from transformers or open_clip, as encoders of pictures (with gradient) and texts (cached)."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrl.errors import UserError
from rewards.preprocess import Preprocess, from_open_clip, from_transformers
from rewards.weights import find_file, find_model, first_line

Backend = Literal["transformers", "open_clip"]
Dtype = Literal["float32", "bfloat16", "float16"]

_TEXTS_KEPT = 10_000


class Encoder(ABC):
    """A frozen model that maps pictures and texts to one space.

    Attributes:
        model: the network; moves to the device of the first pictures it sees, unless ``device`` was given.
        preprocess: what it does to pictures first.
        encoded: texts encoded so far, repeats not counted.
    """

    def __init__(self, model: nn.Module, preprocess: Preprocess, device: str | None):
        self.model = model.eval().requires_grad_(False)
        self.preprocess = preprocess
        self.device = None if device is None else torch.device(device)
        self.encoded = 0
        self._texts: dict[str, Tensor] = {}

    @property
    def logit_scale(self) -> float:
        """What the model multiplies cosines with (the inverse temperature, not its logarithm)."""
        return self.model.logit_scale.exp().item()

    def images(self, images: Tensor, batch_size: int = 32) -> Tensor:
        """Unit vectors ``[N, D]``, float32, of ``images [N, 3, H, W]`` in [0, 1]; differentiable."""
        self._place(images.device)
        dtype, device = next(self.model.parameters()).dtype, next(self.model.parameters()).device
        parts = [self._image_features(self.preprocess(part.to(device)).to(dtype)) for part in images.split(batch_size)]
        return F.normalize(torch.cat(parts).float(), dim=-1)

    def texts(self, texts: Sequence[str], batch_size: int = 32) -> Tensor:
        """Unit vectors ``[N, D]``, float32, without gradient; each distinct text is encoded once."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if len(self._texts) + len(missing) > _TEXTS_KEPT:
            self._texts.clear()
            missing = list(dict.fromkeys(texts))
        for start in range(0, len(missing), batch_size):
            part = missing[start : start + batch_size]
            with torch.no_grad():
                features = F.normalize(self._text_features(part).float(), dim=-1)
            self._texts.update(zip(part, features, strict=True))
        self.encoded += len(missing)
        return torch.stack([self._texts[text] for text in texts])

    def _place(self, device: torch.device) -> None:
        device = self.device or device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
            self._texts.clear()

    @abstractmethod
    def _image_features(self, pixels: Tensor) -> Tensor:
        """Projected features ``[N, D]`` of preprocessed pictures."""

    @abstractmethod
    def _text_features(self, texts: list[str]) -> Tensor:
        """Projected features ``[N, D]``."""


class TransformersEncoder(Encoder):
    """A CLIP-type model of transformers: one with ``get_image_features`` and ``get_text_features`` (CLIP, SigLIP...).

    Args:
        model: repository or folder.
        processor: repository or folder of image processor and tokenizer; default the model's.
        dtype: of the network; scores are float32 in any case.
        device: default, that of the pictures.

    Raises:
        UserError: not found, or a model of another kind.
    """

    def __init__(self, model: str, processor: str | None, dtype: Dtype, device: str | None):
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        try:
            network = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype))
            image_processor = AutoImageProcessor.from_pretrained(processor or model)
            self.tokenizer = AutoTokenizer.from_pretrained(processor or model)
        except (OSError, ValueError) as error:
            raise UserError(
                f"CLIP model '{model}'{f' with processor {processor!r}' if processor else ''} could not be loaded by "
                f"transformers: {first_line(error)}"
            ) from error
        if not hasattr(network, "get_image_features") or not hasattr(network, "get_text_features"):
            raise UserError(f"'{model}' is a {type(network).__name__}, not a model of pictures and texts such as CLIP")
        super().__init__(network, from_transformers(image_processor), device)
        limit = network.config.text_config.max_position_embeddings
        self.max_length = min(self.tokenizer.model_max_length, limit)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def _text_features(self, texts: list[str]) -> Tensor:
        # Padded to full length, as SigLIP-type models were trained; CLIP does not look behind the end.
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return _pooled(self.model.get_text_features(**tokens.to(self.model.device)))


class OpenClipEncoder(Encoder):
    """A model of open_clip.

    Args:
        model: an architecture (``"ViT-H-14"``), which needs a checkpoint; ``"hf-hub:owner/repository"``; or a folder
            with ``open_clip_config.json`` and weights.
        checkpoint: a name that open_clip knows for the architecture, a file, or ``"owner/repository:file"`` on the hub.
        dtype: of the network; scores are float32 in any case.
        device: default, that of the pictures.
        resize: instead of the way of resizing in the model's own preprocessing.

    Raises:
        UserError: not found, or the weights do not fit.
    """

    def __init__(self, model: str, checkpoint: str | None, dtype: Dtype, device: str | None, resize: str | None = None):
        import open_clip

        place = f"local-dir:{model}" if Path(model).is_dir() else model
        named = open_clip.list_pretrained_tags_by_model(model)
        if checkpoint is not None and checkpoint not in named:
            checkpoint = str(find_file(checkpoint, f"checkpoint of '{model}'"))
        precision = {"float32": "fp32", "bfloat16": "pure_bf16", "float16": "pure_fp16"}[dtype]
        try:
            network = open_clip.create_model(place, checkpoint, precision=precision, require_pretrained=True)
            self.tokenizer = open_clip.get_tokenizer(place)
        except (RuntimeError, OSError, ValueError, KeyError, AssertionError) as error:
            hint = f" (checkpoints: {', '.join(named)})" if named and checkpoint is None else ""
            raise UserError(
                f"CLIP model '{model}' with checkpoint {checkpoint!r} could not be loaded by open_clip: "
                f"{first_line(error)}{hint}"
            ) from error
        config: dict[str, Any] = dict(network.visual.preprocess_cfg)
        if resize is not None:
            config["resize_mode"] = resize
        super().__init__(network, from_open_clip(config), device)

    def _image_features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)

    def _text_features(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(next(self.model.parameters()).device))


def _pooled(output: Any) -> Tensor:
    # transformers 5 returns an output object where version 4 returned the tensor.
    return output if isinstance(output, Tensor) else output.pooler_output


_loaded: weakref.WeakValueDictionary[tuple, Encoder] = weakref.WeakValueDictionary()


def load_encoder(
    model: str,
    backend: Backend = "transformers",
    checkpoint: str | None = None,
    processor: str | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
    resize: str | None = None,
) -> Encoder:
    """The encoder; rewards that ask for the same one share it.

    Raises:
        UserError: see the two classes; also an option that is for the other backend.
    """
    model, processor = find_model(model), processor and find_model(processor)
    key = (model, backend, checkpoint, processor, dtype, device, resize)
    encoder = _loaded.get(key)
    if encoder is None:
        if backend == "open_clip":
            if processor is not None:
                raise UserError(f"processor is '{processor}', but models of backend=open_clip bring their own")
            encoder = OpenClipEncoder(model, checkpoint, dtype, device, resize)
        else:
            if checkpoint is not None or resize is not None:
                raise UserError(
                    f"checkpoint is {checkpoint!r} and resize {resize!r}, but both are for backend=open_clip only"
                )
            encoder = TransformersEncoder(model, processor, dtype, device)
        _loaded[key] = encoder
    return encoder
