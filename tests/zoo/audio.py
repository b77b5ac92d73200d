"""Text-to-audio pipelines."""

from __future__ import annotations

import diffusers

from zoo import text
from zoo.parts import Entry, finish
from zoo.text import WIDTH


def longcat_audio() -> Entry:
    """LongCat-AudioDiT: flow matching on latents of a waveform, text by UMT5."""
    tokenizer, encoder = text.t5_text(multilingual=True)
    pipe = diffusers.LongCatAudioDiTPipeline(
        transformer=diffusers.LongCatAudioDiTTransformer(
            dit_dim=16, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True),
        vae=diffusers.LongCatAudioDiTVae(
            channels=8,
            c_mults=[1, 2],
            strides=[2, 4],
            latent_dim=8,
            encoder_latent_dim=16,
            downsampling_ratio=8,
            sample_rate=800,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
    )
    return finish(pipe, call={"audio_duration_s": 0.32, "guidance_scale": 3.0})
