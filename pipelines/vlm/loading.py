"""Where vision-language models come from: a folder, a hub id, or this package."""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch

from mmrl.errors import UserError
from pipelines import loading

SMALLEST_AREA_LIMIT = 10_000


@dataclass
class LoadedVLM:
    """A model with the processor that prepares its inputs."""

    model: Any
    processor: Any


def resolve(model: str) -> str:
    """``builtin:NAME`` as the folder of the model shipped with this package; anything else as it is."""
    return loading.resolve(model, "config.json", "model of transformers")


def load_vlm(
    model: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    revision: str | None = None,
    attention: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    trust_remote_code: bool = False,
) -> LoadedVLM:
    """Model and processor from a folder, ``builtin:NAME`` or a hub id, through the Auto classes; safetensors only.

    Args:
        attention: implementation, e.g. ``sdpa``, ``eager`` or ``flash_attention_2``; None leaves it to the library.
        min_pixels, max_pixels: bounds on the area of pictures, for processors that scale them.

    Raises:
        UserError: the model cannot be found, or processor and model do not belong together.
    """
    folder = resolve(model)
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    more = {} if attention is None else {"attn_implementation": attention}
    try:
        with loading.quiet() if loading.is_small(folder) else contextlib.nullcontext():
            network = AutoModelForImageTextToText.from_pretrained(
                folder, dtype=getattr(torch, dtype), use_safetensors=True, **options, **more
            )
            processor = AutoProcessor.from_pretrained(folder, **options)
    except (OSError, ValueError, ImportError) as error:
        # "no such file", "no such class for this task" and "this attention is not installed".
        raise UserError(f"model '{model}' cannot be loaded: {error}") from error
    limit_pixels(processor, min_pixels, max_pixels)
    return LoadedVLM(network, processor)


def limit_pixels(processor: Any, least: int | None, most: int | None) -> None:
    """Bound the area of pictures; raises ``UserError`` for a processor that does not scale them by area."""
    if least is None and most is None:
        return
    part = getattr(processor, "image_processor", None)
    size = dict(getattr(part, "size", None) or {})
    # Other processors call the length of a side by the same name.
    if (size.get("longest_edge") or 0) < SMALLEST_AREA_LIMIT:
        raise UserError(
            f"pipeline.max_pixels: {type(part).__name__} does not scale pictures by area; set its size in the "
            "preprocessor config of the model"
        )
    bounds = {"shortest_edge": least, "longest_edge": most}
    part.size = type(part.size)(**(size | {key: value for key, value in bounds.items() if value is not None}))


def check_pair(model: Any, processor: Any) -> None:
    """Raise ``UserError`` where processor and model do not belong together, or the model reads pictures another way."""
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None:
        raise UserError(f"{type(processor).__name__} has no tokenizer: give the processor that belongs to the model")
    if model.config.is_encoder_decoder or "cross_attention_mask" in inspect.signature(model.forward).parameters:
        raise UserError(
            f"{type(model).__name__} reads pictures by cross-attention, which is not supported: choose a family that "
            "reads them as tokens (docs/vlms.md has a list)"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows and largest != getattr(model.config, "image_token_id", None):
        raise UserError(
            f"processor and model disagree: the tokenizer has ids up to {largest}, the model only {rows} embeddings; "
            "load both from one place"
        )
