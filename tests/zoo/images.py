"""Text-to-image and image-editing pipelines of the zoo."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo import text
from zoo.parts import Entry, finish, flow, image_vae, picture
from zoo.text import WIDTH


def stable_diffusion_3() -> Entry:
    tokenizer, encoder = text.clip_text(projection=True, hidden=WIDTH // 2)
    tokenizer_2, encoder_2 = text.clip_text(projection=True, hidden=WIDTH // 2)
    tokenizer_3, encoder_3 = text.t5_text()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        scheduler=flow(shift=3.0),
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )
    return finish(pipe, call={"height": 16, "width": 16, "guidance_scale": 3.0, "max_sequence_length": 16})


def flux_transformer(guidance: bool = True) -> diffusers.FluxTransformer2DModel:
    return diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 8),
    )


def flux_parts() -> dict[str, Any]:
    tokenizer, encoder = text.clip_text()
    tokenizer_2, encoder_2 = text.t5_text()
    return {
        "transformer": flux_transformer(),
        "scheduler": flow(shift=3.0, use_dynamic_shifting=True),
        "vae": image_vae(),
        "text_encoder": encoder,
        "tokenizer": tokenizer,
        "text_encoder_2": encoder_2,
        "tokenizer_2": tokenizer_2,
    }


def flux() -> Entry:
    return finish(
        diffusers.FluxPipeline(**flux_parts()),
        call={"height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": 16},
    )


def flux_kontext() -> Entry:
    return finish(
        diffusers.FluxKontextPipeline(**flux_parts()),
        call={
            "height": 16,
            "width": 16,
            "max_area": 256,
            "_auto_resize": False,
            "guidance_scale": 3.5,
            "max_sequence_length": 16,
        },
        inputs={"image": picture()},
    )


def qwen_transformer(channels: int = 4) -> diffusers.QwenImageTransformer2DModel:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 4, 4),
    )


def qwen_vae(halvings: int, res_blocks: int = 1, channels: int = 4) -> diffusers.AutoencoderKLQwenImage:
    """The VAE of Qwen-Image with factor ``2**halvings``."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=3,
        z_dim=channels,
        dim_mult=[1] * (halvings + 1),
        num_res_blocks=res_blocks,
        temperal_downsample=[False] * halvings,
        latents_mean=[0.0] * channels,
        latents_std=[1.0] * channels,
    )


def qwen_image() -> Entry:
    tokenizer, encoder = text.qwen_vl_text()
    pipe = diffusers.QwenImagePipeline(
        transformer=qwen_transformer(),
        scheduler=flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=qwen_vae(1),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(pipe, call={"height": 16, "width": 16, "true_cfg_scale": 3.0, "negative_prompt": "blurry"})


def qwen_image_edit() -> Entry:
    """The pipeline enlarges every picture to about a megapixel, so this VAE divides by 64 to keep latents small."""
    tokenizer, encoder = text.qwen_vl_text()
    pipe = diffusers.QwenImageEditPipeline(
        transformer=qwen_transformer(),
        scheduler=flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=qwen_vae(6, res_blocks=0),
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=text.qwen_vl_processor(tokenizer),
    )
    return finish(
        pipe,
        call={"height": 256, "width": 256, "true_cfg_scale": 3.0, "negative_prompt": "blurry"},
        inputs={"image": picture()},
    )


def sana() -> Entry:
    tokenizer, encoder = text.gemma_text()
    channels = (4, 4, 8)
    blocks = ("ResBlock", "ResBlock", "EfficientViTBlock")
    pipe = diffusers.SanaPipeline(
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=8,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=diffusers.AutoencoderDC(
            in_channels=3,
            latent_channels=4,
            attention_head_dim=2,
            encoder_block_types=blocks,
            decoder_block_types=blocks,
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            encoder_qkv_multiscales=((), (), (5,)),
            decoder_qkv_multiscales=((), (), (5,)),
            encoder_layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1),
            downsample_block_type="conv",
            upsample_block_type="interpolate",
            scaling_factor=0.41,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(
        pipe,
        call={
            "height": 32,
            "width": 32,
            "guidance_scale": 3.0,
            "max_sequence_length": 16,
            "complex_human_instruction": None,
            "use_resolution_binning": False,
        },
    )


def lumina2() -> Entry:
    """The pipeline divides sizes by 8 whatever the VAE, so 64 pixels asked for are 8x8 latents."""
    tokenizer, encoder = text.gemma_text()
    pipe = diffusers.Lumina2Pipeline(
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=16,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 2, 2),
            axes_lens=(300, 32, 32),
            cap_feat_dim=WIDTH,
        ),
        scheduler=flow(shift=6.0),
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(pipe, call={"height": 64, "width": 64, "guidance_scale": 3.0, "max_sequence_length": 64})


def z_image() -> Entry:
    tokenizer, encoder = text.qwen3_text()
    pipe = diffusers.ZImagePipeline(
        transformer=diffusers.ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=WIDTH,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
        scheduler=flow(shift=3.0),
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(
        pipe,
        call={
            "height": 16,
            "width": 16,
            "guidance_scale": 3.0,
            "max_sequence_length": 32,
        },
    )


def aura_flow() -> Entry:
    tokenizer, encoder = text.t5_text(multilingual=True)
    pipe = diffusers.AuraFlowPipeline(
        transformer=diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=WIDTH,
            pos_embed_max_size=64,
        ),
        scheduler=flow(shift=1.73),
        vae=image_vae(shift_factor=None),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(pipe, call={"height": 16, "width": 16, "guidance_scale": 3.0, "max_sequence_length": 16})


def chroma() -> Entry:
    tokenizer, encoder = text.t5_text()
    pipe = diffusers.ChromaPipeline(
        transformer=diffusers.ChromaTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        scheduler=flow(shift=1.0),
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(
        pipe,
        call={
            "height": 16,
            "width": 16,
            "guidance_scale": 3.0,
            "negative_prompt": "blurry",
            "max_sequence_length": 16,
        },
    )


def cogview4() -> Entry:
    tokenizer, encoder = text.glm_text()
    pipe = diffusers.CogView4Pipeline(
        transformer=diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            sample_size=8,
            rope_axes_dim=(16, 16),
        ),
        scheduler=flow(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True, time_shift_type="linear"
        ),
        vae=image_vae(shift_factor=0.0),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(pipe, call={"height": 16, "width": 16, "guidance_scale": 3.0, "max_sequence_length": 32})


def unet(cross_dim: int, **config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        cross_attention_dim=cross_dim,
        norm_num_groups=4,
        **config,
    )


def stable_diffusion() -> Entry:
    tokenizer, encoder = text.clip_text()
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet(WIDTH),
        scheduler=diffusers.PNDMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
        ),
        vae=image_vae(quant=True, shift_factor=None, scaling_factor=0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return finish(pipe, call={"height": 16, "width": 16, "guidance_scale": 3.0})


def stable_diffusion_xl() -> Entry:
    tokenizer, encoder = text.clip_text()
    tokenizer_2, encoder_2 = text.clip_text(projection=True)
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=unet(
            2 * WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + WIDTH,
        ),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
        vae=image_vae(quant=True, shift_factor=None, scaling_factor=0.13025, force_upcast=False),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        add_watermarker=False,
    )
    return finish(pipe, call={"height": 16, "width": 16, "guidance_scale": 3.0})
