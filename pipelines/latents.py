"""Pictures to the latents that a pipeline's denoiser works on, and back in tiles."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.data import CLIPS
from mmrl.errors import UserError
from mmrl.media import clip_frames
from mmrl.types import Prompt, Samples


def normalise(vae: Any, z: Tensor) -> Tensor:
    """Scale raw VAE latents ``[N, C, ...]`` as denoisers see them: the inverse of what pipelines do before decoding.

    Per-channel mean and std where the VAE has them (Wan, Qwen-Image, LTX), then shift and factor (all others).
    """
    config = vae.config
    factor = config.get("scaling_factor") or 1.0
    statistics = {**config, **dict(vae.named_buffers(recurse=False))}
    mean, std = statistics.get("latents_mean"), statistics.get("latents_std")
    if mean is not None and std is not None:
        shape = (1, -1, *[1] * (z.ndim - 2))
        mean = torch.as_tensor(mean, device=z.device, dtype=z.dtype).view(shape)
        std = torch.as_tensor(std, device=z.device, dtype=z.dtype).view(shape)
        return (z - mean) * factor / std
    return (z - (config.get("shift_factor") or 0.0)) * factor


def pack(pipe: Any, z: Tensor, shape: torch.Size) -> Tensor:
    """Bring ``z [N, C, (F,) H, W]`` to rows of ``shape``, with the pipeline's own ``_pack_latents`` if need be."""
    if z.shape[1:] == shape:
        return z
    if z.ndim == len(shape) + 2 and z.shape[2] == 1 and z[:, :, 0].shape[1:] == shape:
        return z[:, :, 0]
    if z.ndim == 5 and z.transpose(1, 2).shape[1:] == shape:
        return z.transpose(1, 2)
    if hasattr(pipe, "_pack_latents"):
        names = inspect.signature(pipe._pack_latents).parameters
        known = {
            "latents": z if "height" not in names or z.ndim == 4 else z.transpose(1, 2),
            "batch_size": z.shape[0],
            "num_channels_latents": z.shape[1],
            "height": z.shape[-2],
            "width": z.shape[-1],
            "patch_size": getattr(pipe, "transformer_spatial_patch_size", 1),
            "patch_size_t": getattr(pipe, "transformer_temporal_patch_size", 1),
        }
        if all(name in known for name in names):
            packed = pipe._pack_latents(**{name: known[name] for name in names})
            if packed.shape[1:] == shape:
                return packed
    raise UserError(
        f"pictures of this size become latents {tuple(z.shape[1:])}, but {type(pipe).__name__} works on "
        f"{tuple(shape)}: set 'call' to the pictures' height and width"
    )


@torch.no_grad()
def encode(pipe: Any, samples: Samples, shapes: Sequence[torch.Size], batch_size: int) -> Tensor:
    """Latents ``[N, ...]`` float32 of ``samples.images`` or ``.videos``, or of the prompts' ``target`` pictures.

    Args:
        pipe: a pipeline with a VAE.
        samples: N rows.
        shapes: shape of each row's latents.
        batch_size: pictures per VAE call.

    Raises:
        UserError: a target is not a picture, or sizes do not fit.
    """
    vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    if vae is None:
        raise UserError(f"pipeline {type(pipe).__name__} has no VAE to encode pictures with")
    media = samples.images if samples.images is not None else samples.videos
    if media is None:
        media = torch.stack([target(prompt) for prompt in samples.prompts])
    weight = next(vae.parameters())
    latents = []
    for begin in range(0, len(media), batch_size):
        part = media[begin : begin + batch_size].to(weight.device, weight.dtype) * 2 - 1
        if part.ndim == 5:
            part = part.transpose(1, 2)
        elif _takes_frames(vae):
            part = part[:, :, None]
        with torch.autocast(weight.device.type, enabled=False):
            if hasattr(pipe, "_patchify_latents") and hasattr(pipe, "_encode_vae_image"):
                z = pipe._encode_vae_image(part, None).float()  # FLUX.2 scales patches, by its VAE's batch norm
            else:
                encoded = vae.encode(part)
                z = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latent
                z = normalise(vae, z.float())
        latents.append(pack(pipe, z, shapes[begin]))
    return torch.cat(latents)


def target(prompt: Prompt) -> Tensor:
    """A prompt's ``target``, a picture ``[3, H, W]`` or a clip ``[F, 3, H, W]``, in [0, 1].

    Raises:
        UserError: it is neither, or a file that cannot be read.
    """
    value, name = prompt.target, f"target of '{prompt.id or prompt.text}'"
    if isinstance(value, str) and value.lower().endswith(CLIPS):
        value = clip_frames(value)
        if value is None:
            raise UserError(f"{name}: '{prompt.target}' takes PyAV to be read: pip install \"mmrl[video]\"")
    if isinstance(value, (list, tuple)):
        return torch.stack([picture(frame, name) for frame in value])
    return picture(value, name)


def picture(value: Any, name: str) -> Tensor:
    """A picture given as tensor ``[3, H, W]`` in [0, 1], PIL image or path, as such a tensor."""
    if isinstance(value, Tensor):
        return value.float()
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, str) or hasattr(value, "__fspath__"):
        try:
            with Image.open(value) as opened:
                value = opened.convert("RGB")
        except (FileNotFoundError, UnidentifiedImageError) as error:
            raise UserError(f"{name} cannot be read as a picture: {error}") from error
    if not isinstance(value, Image.Image):
        raise UserError(f"{name} must be a picture (tensor, PIL image or path), not {type(value).__name__}")
    from torchvision.transforms.functional import to_tensor

    return to_tensor(value.convert("RGB"))


def to_host(states: Tensor) -> Tensor:
    """``states`` in the host's memory, pinned where they come from a GPU, so that they are back in no time."""
    if states.device.type == "cpu":
        return states
    kept = torch.empty(states.shape, dtype=states.dtype, pin_memory=True)
    return kept.copy_(states)


def _takes_frames(vae: Any) -> bool:
    """Whether the VAE's first convolution is over time too."""
    return any(weight.ndim == 5 for weight in vae.encoder.parameters())


def enable_tiling(pipe: Any) -> None:
    """Let the VAE work on overlapping tiles; raises ``UserError`` where it cannot."""
    vae = getattr(pipe, "vae", None)
    if not hasattr(vae, "enable_tiling"):
        raise UserError(f"vae_tiling: the VAE of {type(pipe).__name__} has no tiles; set it to false")
    vae.enable_tiling()
    if hasattr(vae, "enable_slicing"):
        vae.enable_slicing()
    if hasattr(vae, "use_framewise_decoding"):
        vae.use_framewise_decoding = True
