"""Video pipelines beyond the promised ones: newer families, image-to-video, two experts."""

from __future__ import annotations

import diffusers

from zoo import text
from zoo.parts import Entry, finish, flow, picture
from zoo.text import WIDTH, set_random_weights
from zoo.videos import ltx, wan_parts, wan_vae


def hunyuan_video_15() -> Entry:
    tokenizer, encoder = text.qwen_vl_text(layers=3)
    tokenizer_2, encoder_2 = text.byt5_text()
    pipe = diffusers.HunyuanVideo15Pipeline(
        transformer=diffusers.HunyuanVideo15Transformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_refiner_layers=1,
            mlp_ratio=2.0,
            text_embed_dim=WIDTH,
            text_embed_2_dim=WIDTH,
            image_embed_dim=12,
            rope_axes_dim=(2, 2, 4),
            target_size=16,
            task_type="t2v",
        ),
        scheduler=flow(shift=7.0),
        vae=diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(16, 16),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        ),
        text_encoder=encoder.model.language_model,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )
    pipe.system_message, pipe.prompt_template_encode_start_idx = "Describe the video", 8
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length = 64, 16
    return finish(pipe, call={"height": 16, "width": 16, "num_frames": 5})


def mochi() -> Entry:
    """Smaller than the others: the VAE has at least 32 channels, which is slow in bf16 on a CPU."""
    tokenizer, encoder = text.t5_text()
    pipe = diffusers.MochiPipeline(
        transformer=diffusers.MochiTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=12,
            text_embed_dim=WIDTH,
            time_embed_dim=4,
            max_sequence_length=16,
        ),
        scheduler=flow(invert_sigmas=True, shift=1.0),
        vae=diffusers.AutoencoderKLMochi(
            latent_channels=12,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"height": 16, "width": 16, "num_frames": 7, "guidance_scale": 3.0, "max_sequence_length": 16}
    return finish(pipe, call=call)


def cogvideox() -> Entry:
    tokenizer, encoder = text.t5_text()
    pipe = diffusers.CogVideoXPipeline(
        transformer=diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            time_embed_dim=4,
            text_embed_dim=WIDTH,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=5,
            max_text_seq_length=16,
        ),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            snr_shift_scale=1.0,
        ),
        vae=diffusers.AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(4, 4, 4, 4),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
    return finish(pipe, call=call)


def wan_two_experts() -> Entry:
    """Wan 2.2 A14B: one transformer for high noise, another below the boundary."""
    entry_parts = wan_parts()
    pipe = diffusers.WanPipeline(
        **entry_parts, transformer_2=wan_parts()["transformer"], boundary_ratio=0.875, expand_timesteps=False
    )
    call = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 3.0,
        "guidance_scale_2": 2.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
    }
    return finish(pipe, call=call)


def wan_image_to_video() -> Entry:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=8,
            projection_dim=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            intermediate_size=16,
            patch_size=8,
        )
    )
    pipe = diffusers.WanImageToVideoPipeline(
        **wan_parts(in_channels=12, image_dim=8),
        image_encoder=set_random_weights(vision, "vision"),
        image_processor=CLIPImageProcessor(crop_size=16, size=16),
    )
    call = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 3.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
    }
    return finish(pipe, call=call, inputs={"image": picture(32)})


def ltx_image_to_video() -> Entry:
    entry = ltx()
    pipe = diffusers.LTXImageToVideoPipeline(**entry.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return Entry(pipe, entry.call, {"image": picture(32)})


def sana_video() -> Entry:
    tokenizer, encoder = text.gemma_text()
    pipe = diffusers.SanaVideoPipeline(
        transformer=diffusers.SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=WIDTH,
            sample_size=4,
            rope_max_seq_len=32,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0
        ),
        vae=wan_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    call = {
        "height": 32,
        "width": 32,
        "frames": 5,
        "guidance_scale": 3.0,
        "max_sequence_length": 16,
        "complex_human_instruction": None,
        "use_resolution_binning": False,
    }
    return finish(pipe, call=call)


def skyreels_v2() -> Entry:
    parts = wan_parts()
    parts["transformer"] = diffusers.SkyReelsV2Transformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
    )
    call = {
        "height": 32,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": 3.0,
        "negative_prompt": "blurry",
        "max_sequence_length": 16,
    }
    return finish(diffusers.SkyReelsV2Pipeline(**parts), call=call)


def wan_image_to_video_two_experts() -> Entry:
    """Wan 2.2 A14B from a picture: two experts, and no image encoder."""
    pipe = diffusers.WanImageToVideoPipeline(
        **wan_parts(in_channels=12),
        transformer_2=wan_parts(in_channels=12)["transformer"],
        image_encoder=None,
        image_processor=None,
        boundary_ratio=0.9,
    )
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
    return finish(pipe, call=call | {"negative_prompt": "blurry"}, inputs={"image": picture(32)})


def cogvideox_image_to_video() -> Entry:
    parts = cogvideox().pipe.components
    parts["transformer"] = diffusers.CogVideoXTransformer3DModel(
        **{**parts["transformer"].config, "in_channels": 8, "use_learned_positional_embeddings": False}
    )
    call = {"height": 32, "width": 32, "num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 16}
    return finish(diffusers.CogVideoXImageToVideoPipeline(**parts), call=call, inputs={"image": picture(32)})
