"""Image pipelines beyond the promised ones: newer families, more editing, and some that have no seam."""

from __future__ import annotations

from typing import Any

import diffusers

from zoo import text
from zoo.images import flux_transformer, image_vae, qwen_transformer, qwen_vae, stable_diffusion_3, unet
from zoo.parts import Entry, finish, flow, picture
from zoo.text import WIDTH


def flux2_parts(guidance: bool = True) -> dict[str, Any]:
    return {
        "transformer": diffusers.Flux2Transformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            timestep_guidance_channels=32,
            guidance_embeds=guidance,
            axes_dims_rope=(4, 4, 4, 4),
        ),
        "scheduler": flow(shift=3.0, use_dynamic_shifting=True),
        "vae": diffusers.AutoencoderKLFlux2(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=2,
        ),
    }


def flux2() -> Entry:
    tokenizer, encoder = text.mistral_text()
    pipe = diffusers.Flux2Pipeline(**flux2_parts(), text_encoder=encoder, tokenizer=tokenizer)
    call = {
        "height": 16,
        "width": 16,
        "guidance_scale": 4.0,
        "max_sequence_length": 192,
        "text_encoder_out_layers": (1,),
    }
    return finish(pipe, call=call)


def flux2_klein() -> Entry:
    tokenizer, encoder = text.qwen3_text(head=True)
    pipe = diffusers.Flux2KleinPipeline(**flux2_parts(guidance=False), text_encoder=encoder, tokenizer=tokenizer)
    call = {
        "height": 16,
        "width": 16,
        "guidance_scale": 3.0,
        "max_sequence_length": 64,
        "text_encoder_out_layers": (1,),
    }
    return finish(pipe, call=call)


def flux_img2img() -> Entry:
    tokenizer, encoder = text.clip_text()
    tokenizer_2, encoder_2 = text.t5_text()
    pipe = diffusers.FluxImg2ImgPipeline(
        transformer=flux_transformer(),
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
    )
    call = {"height": 16, "width": 16, "strength": 0.8, "guidance_scale": 3.5, "max_sequence_length": 16}
    return finish(pipe, call=call, inputs={"image": picture()})


def stable_diffusion_3_img2img() -> Entry:
    entry = stable_diffusion_3()
    pipe = diffusers.StableDiffusion3Img2ImgPipeline(**entry.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return Entry(pipe, {**entry.call, "strength": 0.8}, {"image": picture()})


def qwen_image_edit_plus() -> Entry:
    """This pipeline enlarges the picture for the VAE to a megapixel too, hence the deep VAE."""
    tokenizer, encoder = text.qwen_vl_text()
    pipe = diffusers.QwenImageEditPlusPipeline(
        transformer=qwen_transformer(),
        scheduler=flow(use_dynamic_shifting=True, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02),
        vae=qwen_vae(6, res_blocks=0),
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=text.qwen_vl_processor(tokenizer),
    )
    call = {"height": 256, "width": 256, "true_cfg_scale": 3.0, "negative_prompt": "blurry"}
    return finish(pipe, call=call, inputs={"image": picture()})


def hunyuan_image() -> Entry:
    tokenizer, encoder = text.qwen_vl_text(layers=3)
    tokenizer_2, encoder_2 = text.byt5_text()
    pipe = diffusers.HunyuanImagePipeline(
        transformer=diffusers.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            rope_axes_dim=(4, 4),
        ),
        scheduler=flow(shift=5.0),
        vae=diffusers.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
            sample_size=32,
            scaling_factor=0.48,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=2),
        ocr_guider=diffusers.AdaptiveProjectedMixGuidance(adaptive_projected_guidance_start_step=3),
    )
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 64, 16
    return finish(pipe, call={"height": 16, "width": 16})


def pixart_sigma() -> Entry:
    """A diffusion transformer that also predicts a variance, half of its channels, which the pipeline drops."""
    tokenizer, encoder = text.t5_text()
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_channels=WIDTH,
            cross_attention_dim=16,
            in_channels=4,
            out_channels=8,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
        vae=image_vae(shift_factor=None),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"height": 16, "width": 16, "guidance_scale": 3.0, "max_sequence_length": 16}
    return finish(pipe, call={**call, "use_resolution_binning": False})


def stable_audio() -> Entry:
    """Audio in EDM's parameterisation; its own scheduler is a cosine variant of this one that needs another library."""
    tokenizer, encoder = text.t5_text()
    pipe = diffusers.StableAudioPipeline(
        transformer=diffusers.StableAudioDiTModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            cross_attention_dim=WIDTH,
            cross_attention_input_dim=WIDTH,
            time_proj_dim=8,
            global_states_input_dim=2 * WIDTH,
        ),
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(
            solver_order=2, prediction_type="v_prediction", sigma_data=1.0, sigma_schedule="exponential"
        ),
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=6,
            downsampling_ratios=[1, 2],
            decoder_channels=4,
            decoder_input_channels=4,
            audio_channels=2,
            channel_multiples=[2, 4],
            sampling_rate=4,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        projection_model=diffusers.StableAudioProjectionModel(
            text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
        ),
    )
    return finish(pipe, call={"guidance_scale": 3.0, "audio_end_in_s": 4.0})


def ovis_image() -> Entry:
    tokenizer, encoder = text.qwen3_text()
    pipe = diffusers.OvisImagePipeline(
        transformer=diffusers.OvisImageTransformer2DModel(
            in_channels=16,
            out_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(4, 4, 8),
        ),
        scheduler=flow(shift=3.0, use_dynamic_shifting=True),
        vae=image_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"height": 16, "width": 16, "guidance_scale": 3.0, "negative_prompt": "blurry", "max_sequence_length": 64}
    return finish(pipe, call=call)


def cogview3_plus() -> Entry:
    tokenizer, encoder = text.t5_text()
    pipe = diffusers.CogView3PlusPipeline(
        transformer=diffusers.CogView3PlusTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=WIDTH,
            time_embed_dim=8,
            condition_dim=4,
            pos_embed_max_size=8,
            sample_size=8,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=4.0,
        ),
        vae=image_vae(shift_factor=None),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"height": 16, "width": 16, "guidance_scale": 3.0, "max_sequence_length": 16}
    return finish(pipe, call=call)


def latent_consistency() -> Entry:
    tokenizer, encoder = text.clip_text()
    pipe = diffusers.LatentConsistencyModelPipeline(
        unet=unet(WIDTH, time_cond_proj_dim=16),
        scheduler=diffusers.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        vae=image_vae(quant=True, shift_factor=None, scaling_factor=0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return finish(pipe, call={"height": 16, "width": 16, "guidance_scale": 3.0})
