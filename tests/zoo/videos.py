"""Text-to-video pipelines of the zoo."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo import text
from zoo.parts import Entry, finish, flow
from zoo.text import WIDTH


def hunyuan_video() -> Entry:
    tokenizer, encoder = text.llama_text()
    tokenizer_2, encoder_2 = text.clip_text()
    pipe = diffusers.HunyuanVideoPipeline(
        transformer=diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=WIDTH,
            pooled_projection_dim=WIDTH,
            rope_axes_dim=(4, 2, 2),
        ),
        scheduler=flow(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            layers_per_block=1,
            norm_num_groups=2,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )
    return finish(
        pipe,
        call={
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "guidance_scale": 6.0,
            "max_sequence_length": 16,
            "prompt_template": {"template": "{}", "crop_start": 0},
        },
    )


def wan_vae() -> diffusers.AutoencoderKLWan:
    return diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


def wan_parts(in_channels: int = 4, image_dim: int | None = None) -> dict[str, Any]:
    tokenizer, encoder = text.t5_text(multilingual=True)
    return {
        "transformer": diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=in_channels,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
            image_dim=image_dim,
        ),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
        ),
        "vae": wan_vae(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
    }


def wan() -> Entry:
    return finish(
        diffusers.WanPipeline(**wan_parts()),
        call={
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "guidance_scale": 3.0,
            "negative_prompt": "blurry",
            "max_sequence_length": 16,
        },
    )


def ltx() -> Entry:
    tokenizer, encoder = text.t5_text()
    pipe = diffusers.LTXPipeline(
        transformer=diffusers.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=WIDTH,
        ),
        scheduler=flow(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, shift_terminal=0.1
        ),
        vae=diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(
        pipe,
        call={
            "height": 32,
            "width": 32,
            "num_frames": 5,
            "guidance_scale": 3.0,
            "negative_prompt": "blurry",
            "max_sequence_length": 16,
        },
    )
