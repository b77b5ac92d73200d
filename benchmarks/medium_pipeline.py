"""A random StableDiffusion3Pipeline, every part of its real class, built offline at a size to time."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# The root goes first: the folder of tests has one called 'pipelines' too.
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]


@dataclass(frozen=True)
class Size:
    """What decides the cost of a forward.

    Attributes:
        width: of the denoiser, a multiple of 64.
        layers: of the denoiser.
        latent: side of the latent picture; a token covers 2x2 of it. The VAE has factor 8.
        text_width, text_layers: of the T5 encoder.
        tokens: of the T5 prompt; CLIP adds 16.
    """

    width: int
    layers: int
    latent: int
    text_width: int
    text_layers: int
    tokens: int = 32


# In medium and large the text of a prompt costs about half of a row of a denoiser forward, close to what parameter
# counts give for SD3.5-M at 512 px with T5-XXL at 128 tokens (0.6).
SIZES = {
    "tiny": Size(width=64, layers=2, latent=8, text_width=128, text_layers=2, tokens=16),
    "medium": Size(width=192, layers=6, latent=16, text_width=192, text_layers=6),
    "large": Size(width=256, layers=8, latent=16, text_width=256, text_layers=8),
}


def build_pipeline(size: Size) -> Any:
    """The pipeline on the CPU in float32; the same size gives the same weights."""
    import diffusers
    from transformers import T5Config, T5EncoderModel
    from zoo import text

    clip_width = 64
    parts: dict[str, Any] = {}
    for suffix in ("", "_2"):
        parts["tokenizer" + suffix], parts["text_encoder" + suffix] = text.clip_text(projection=True, hidden=clip_width)
        parts["tokenizer" + suffix].model_max_length = 16
    parts["tokenizer_3"], _ = text.t5_text()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts["text_encoder_3"] = T5EncoderModel(
            T5Config(
                vocab_size=len(parts["tokenizer_3"]),
                d_model=size.text_width,
                d_kv=64,
                d_ff=5 * size.text_width // 2,
                num_heads=size.text_width // 64,
                num_layers=size.text_layers,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        transformer = diffusers.SD3Transformer2DModel(
            sample_size=size.latent,
            in_channels=16,
            out_channels=16,
            num_layers=size.layers,
            attention_head_dim=64,
            num_attention_heads=size.width // 64,
            joint_attention_dim=max(size.text_width, 2 * clip_width),
            caption_projection_dim=size.width,
            pooled_projection_dim=2 * clip_width,
            pos_embed_max_size=size.latent,
            dual_attention_layers=tuple(range(size.layers // 2)),
            qk_norm="rms_norm",
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.0,
            scaling_factor=1.0,
        )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=vae, **parts)
    # The zoo's random weights: the constructor leaves the output layer at zero, through which no gradient would pass.
    for name in ("transformer", "vae", "text_encoder_3"):
        text.set_random_weights(getattr(pipe, name), "benchmark", name)
    pipe.set_progress_bar_config(disable=True)
    return pipe
