"""What the quickstart's diffusion base models are made with: autoencoders, words as tokens, how a folder is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmrl.seeding import generator

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderKLWan, DiffusionPipeline
    from transformers import T5EncoderModel, T5Tokenizer, UMT5EncoderModel

Report = Callable[[int, dict[str, float]], None]
"""Called with the number of a step that was made and its losses."""


def fit_autoencoder(
    vae: AutoencoderKL | AutoencoderKLWan,
    examples: Tensor,
    decode: Callable[[Tensor], Tensor],
    seed: int,
    steps: int,
    lr: float,
    batch_size: int,
    absolute: float,
    kl: float,
    report: Report,
) -> None:
    """Train an autoencoder in place on pictures or clips in [-1, 1], then freeze it.

    Args:
        examples: ``[N, ...]`` as the encoder takes them.
        decode: from latents.
        lr: the highest, of a one-cycle schedule.
        absolute: weight of the absolute error beside the squared one.
        kl: weight of the latents' divergence from a standard normal distribution.
        report: called after every step.
    """
    optimiser = torch.optim.AdamW(vae.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        draws = generator(seed, "vae", step)
        batch = examples[torch.randint(len(examples), (batch_size,), generator=draws)]
        posterior = vae.encode(batch).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws)
        off = decode(posterior.mean + posterior.std * noise) - batch
        error = off.square().mean() + absolute * off.abs().mean()
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimiser.zero_grad()
        (error + kl * divergence).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        report(step, {"error": error.item(), "kl": divergence.item()})
    vae.eval().requires_grad_(False)


@torch.no_grad()
def mean_latents(vae: AutoencoderKL | AutoencoderKLWan, examples: Tensor, batch_size: int) -> Tensor:
    """Means of the posteriors of examples, ``[N, ...]``."""
    return torch.cat([vae.encode(part).latent_dist.mean for part in examples.split(batch_size)])


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
