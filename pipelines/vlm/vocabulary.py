"""Tokens with a meaning of their own: those that end a completion and those a model must not say."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError

MEDIA = re.compile(
    r"(image|img|picture|video|vision|visual|audio|fake_token_around|frame)|^<(\||\[)?(row|tile|patch|col)_",
    re.IGNORECASE,
)
CONFIG_NAMES = re.compile(r"(image|video|vision|audio|boi|eoi|img).*(token_id|token_index)$|^(boi|eoi)_token_index$")


def end_ids(model: Any, tokenizer: Any) -> Tensor:
    """Ids that end a completion, long ``[E]``: all of the generation config, else the tokenizer's.

    Raises:
        UserError: there are none.
    """
    declared = getattr(model.generation_config, "eos_token_id", None)
    if declared is None:
        declared = tokenizer.eos_token_id
    if declared is None:
        raise UserError(f"{type(model).__name__} declares no end token: set eos_token_id in its generation config")
    return torch.tensor(sorted({declared} if isinstance(declared, int) else set(declared)))


def banned_ids(model: Any, processor: Any, eos: Tensor) -> Tensor:
    """Ids that only the processor may write: place holders and marks of pictures, and rows without a token.

    The forward of a model that said one would look for the picture that belongs there.
    """
    tokenizer = processor.tokenizer
    found: set[int] = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in config.to_dict().items():
            if isinstance(value, int) and CONFIG_NAMES.search(name):
                found.add(value)
    for name in ("image_token_id", "video_token_id", "audio_token_id", "image_ids", "video_ids", "audio_ids"):
        value = getattr(processor, name, None)
        if isinstance(value, int):
            found.add(value)
        elif isinstance(value, (list, tuple)):
            found |= {item for item in value if isinstance(item, int)}
    special = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    found |= {index for index, token in special.items() if MEDIA.search(token.content)}
    rows = model.get_output_embeddings().weight.shape[0]
    found |= set(range(rows)) - set(tokenizer.get_vocab().values())
    return torch.tensor(sorted(index for index in found - set(eos.tolist()) if 0 <= index < rows))
