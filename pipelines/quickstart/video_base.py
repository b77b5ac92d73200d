"""Builds the quickstart's text-to-video base model: a real WanPipeline that fits in a few megabytes.

    python -m pipelines.quickstart.video_base OUT_DIR

trains the autoencoder on clips of moving shapes, then the denoiser with the ``sft`` algorithm
(``configs/quickstart/pretrain_video.yaml``), and writes the folder. No held-out request is in its data. The folder that
is shipped comes from shorter runs of the same parts: its autoencoder saw about 20,000 clips and blurs outlines.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mmrl.seeding import derive_seed
from mmrl.world.motion import film, place, rows, vocabulary
from pipelines.quickstart.making import (
    Report,
    build_t5_encoder,
    build_t5_tokenizer,
    fit_autoencoder,
    mean_latents,
    write,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel

LATENT_CHANNELS = 16
FACTOR = 8
WIDTH = 128
LAYERS = 4
TEXT_WIDTH = 64
MAX_TOKENS = 8
VAE_STEPS = 3000
VAE_BATCH = 16
VAE_LR = 2e-3
VAE_CLIPS = 2048
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart" / "pretrain_video.yaml"


def build_vae() -> AutoencoderKLWan:
    """An untrained autoencoder in the form of Wan 2.2's (patches of 2x2 pixels): 5x16x16 become 2x2x2 latents."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan(
        base_dim=16,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=FACTOR,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    # Noise as strong as the signal would teach the decoder to overlook both.
    vae.quant_conv.bias.data[LATENT_CHANNELS:] = -6.0
    return vae


def decode_unclipped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """Clips as the decoder says them: ``vae.decode`` clips to [-1, 1], and from beyond that no gradient comes back."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

    said: list[Tensor] = []
    with vae.decoder.register_forward_hook(lambda module, given, output: said.append(output)):
        vae.decode(latents)
    return unpatchify(torch.cat(said, 2), patch_size=vae.config.patch_size)


def train_vae(seed: int, steps: int, report: Report) -> AutoencoderKLWan:
    """Train an autoencoder on drawn clips and note the mean and std of each of its latent channels.

    ``report(step, losses)`` is called after every step.
    """
    rng = np.random.default_rng([seed, 6])
    clips = film([place(row["target"], rng) for row in rows(VAE_CLIPS, "train", seed)]).transpose(1, 2) * 2 - 1
    torch.manual_seed(derive_seed(seed, "vae"))
    vae = build_vae()
    fit_autoencoder(
        vae,
        clips,
        partial(decode_unclipped, vae),
        seed=seed,
        steps=steps,
        lr=VAE_LR,
        batch_size=VAE_BATCH,
        absolute=0.5,
        kl=1e-5,
        report=report,
    )
    latents = mean_latents(vae, clips[:1024], 64)
    channels = latents.transpose(0, 1).flatten(1)
    vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())
    return vae


def build_transformer() -> WanTransformer3DModel:
    """The denoiser, untrained: 1.2 M parameters, 8 tokens a clip."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=WIDTH // 2,
        ffn_dim=4 * WIDTH,
        num_layers=LAYERS,
        rope_max_seq_len=32,
    )


def assemble(vae: AutoencoderKLWan, seed: int) -> WanPipeline:
    """The pipeline with an untrained denoiser, from an autoencoder."""
    from diffusers import UniPCMultistepScheduler, WanPipeline

    torch.manual_seed(derive_seed(seed, "components"))
    tokenizer = build_t5_tokenizer(vocabulary(), MAX_TOKENS)
    return WanPipeline(
        transformer=build_transformer(),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
        ),
        vae=vae,
        text_encoder=build_t5_encoder(tokenizer, TEXT_WIDTH, multilingual=True),
        tokenizer=tokenizer,
    )


def main(out: Path, seed: int = 0, overrides: Sequence[str] = ()) -> None:
    """Build and train everything and write it to ``out``; the training run stays in ``out`` + ``-run``.

    ``overrides`` are of the config, as on the command line of ``mmrl train``.
    """
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from mmrl.config import load_config
    from mmrl.run import train

    run = out.with_name(out.name + "-run")
    with Progress() as progress:
        task = progress.add_task("autoencoder", total=VAE_STEPS)
        vae = train_vae(seed, VAE_STEPS, lambda step, losses: progress.update(task, completed=step + 1))
    assemble(vae, seed).save_pretrained(run / "start")
    config = load_config(CONFIG, [f"pipeline.model={run / 'start'}", f"run_dir={run}", f"seed={seed}", *overrides])
    summary = train(config)
    write(DiffusionPipeline.from_pretrained(summary["model"]), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), overrides=sys.argv[2:])
