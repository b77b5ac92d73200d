"""Tiny random instances of real diffusers pipelines, built offline in a fraction of a second each.

Every network, text encoder, tokenizer, VAE and scheduler is the class that the released model uses; only sizes and
weights differ. ``ZOO`` maps a name to a function that builds a fresh :class:`Entry`; the same name gives the same bits.
Latents are 4x4 to 8x8, so that a test can roll out, replay and take gradients on all of them within seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from zoo import extra, images, videos
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
    "Flux2": extra.flux2,
    "Flux2Klein": extra.flux2_klein,
    "FluxImg2Img": extra.flux_img2img,
    "StableDiffusion3Img2Img": extra.stable_diffusion_3_img2img,
    "QwenImageEditPlus": extra.qwen_image_edit_plus,
    "HunyuanImage": extra.hunyuan_image,
    "HunyuanVideo15": extra.hunyuan_video_15,
    "Mochi": extra.mochi,
    "CogVideoX": extra.cogvideox,
    "WanTwoExperts": extra.wan_two_experts,
    "WanImageToVideo": extra.wan_image_to_video,
    "LTXImageToVideo": extra.ltx_image_to_video,
    "PixArtSigma": extra.pixart_sigma,
    "StableAudio": extra.stable_audio,
}
