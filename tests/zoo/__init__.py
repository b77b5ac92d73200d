"""Tiny random instances of real diffusers pipelines, built offline in a fraction of a second each.

Every network, text encoder, tokenizer, VAE and scheduler is the class that the released model uses; only sizes and
weights differ. ``ZOO`` maps a name to a function that builds a fresh :class:`Entry`; the same name gives the same bits.
Latents are 4x4 to 8x8, so that a test can roll out, replay and take gradients on all of them within seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from zoo import extra_images, extra_videos, images, videos
from zoo.parts import Entry

__all__ = ["EXTRA", "ZOO", "Entry"]

ZOO: dict[str, Callable[[], Entry]] = {
    "StableDiffusion3": images.stable_diffusion_3,
    "Flux": images.flux,
    "FluxKontext": images.flux_kontext,
    "QwenImage": images.qwen_image,
    "QwenImageEdit": images.qwen_image_edit,
    "Sana": images.sana,
    "Lumina2": images.lumina2,
    "ZImage": images.z_image,
    "AuraFlow": images.aura_flow,
    "Chroma": images.chroma,
    "CogView4": images.cogview4,
    "HunyuanVideo": videos.hunyuan_video,
    "Wan": videos.wan,
    "LTX": videos.ltx,
    "StableDiffusion": images.stable_diffusion,
    "StableDiffusionXL": images.stable_diffusion_xl,
}

EXTRA: dict[str, Callable[[], Entry]] = {
    "Flux2": extra_images.flux2,
    "Flux2Klein": extra_images.flux2_klein,
    "FluxImg2Img": extra_images.flux_img2img,
    "StableDiffusion3Img2Img": extra_images.stable_diffusion_3_img2img,
    "QwenImageEditPlus": extra_images.qwen_image_edit_plus,
    "HunyuanImage": extra_images.hunyuan_image,
    "OvisImage": extra_images.ovis_image,
    "CogView3Plus": extra_images.cogview3_plus,
    "HunyuanVideo15": extra_videos.hunyuan_video_15,
    "Mochi": extra_videos.mochi,
    "CogVideoX": extra_videos.cogvideox,
    "WanTwoExperts": extra_videos.wan_two_experts,
    "WanImageToVideo": extra_videos.wan_image_to_video,
    "LTXImageToVideo": extra_videos.ltx_image_to_video,
    "SanaVideo": extra_videos.sana_video,
    "SkyReelsV2": extra_videos.skyreels_v2,
    "WanImageToVideoTwoExperts": extra_videos.wan_image_to_video_two_experts,
    "CogVideoXImageToVideo": extra_videos.cogvideox_image_to_video,
    "LatentConsistency": extra_images.latent_consistency,
    "PixArtSigma": extra_images.pixart_sigma,
    "StableAudio": extra_images.stable_audio,
}
