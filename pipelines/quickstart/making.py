"""What the quickstart's diffusion base models are made with: words as tokens, and how a folder is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from transformers import T5EncoderModel, T5Tokenizer, UMT5EncoderModel

Report = Callable[[int, dict[str, float]], None]
"""Called with the number of a step that was made and its losses."""


def build_t5_tokenizer(vocabulary: Sequence[str], max_tokens: int) -> T5Tokenizer:
    """A T5 tokenizer with one piece for every word of ``vocabulary`` and for every letter."""
    from transformers import T5Tokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = ["▁" + word for word in vocabulary]
    # Unigram takes the split with the highest sum of scores, so a whole word beats its letters.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(word, -1.0) for word in words] + [(letter, -4.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=max_tokens)


def build_t5_encoder(
    tokenizer: T5Tokenizer, width: int, multilingual: bool = False
) -> T5EncoderModel | UMT5EncoderModel:
    """A T5 (or UMT5) encoder without layers: fixed random word vectors, and zero for padding.

    Pipelines give such an encoder no attention mask, or pad its output with zeros to some hundred tokens, so only one
    that keeps padding apart from words says the same at every length.
    """
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config_class, model_class = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    encoder = model_class(
        config_class(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=16,
            d_ff=width // 2,
            num_layers=0,
            num_heads=4,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    nn.init.normal_(encoder.shared.weight)
    encoder.shared.weight.data[tokenizer.pad_token_id] = 0
    return encoder.eval().requires_grad_(False)


def write(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write the folder with the large networks in half precision, in files of less than 4 MB.

    The text encoders stay in single precision: unlike diffusers, transformers loads what it finds in the precision in
    which it finds it, and a plain ``from_pretrained`` would mix the two.
    """
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(folder, max_shard_size="3MB")
    for file in (folder / "model_index.json", *folder.glob("*/config.json")):
        saved = json.loads(file.read_text())
        saved.pop("_name_or_path", None)  # where this machine had it
        file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")
