"""Where pipelines come from: a folder, a hub id, or this package."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch

from mmrl.errors import UserError, nearest

BUILTIN = Path(__file__).parent / "quickstart"


def resolve(model: str, marker: str = "model_index.json", kind: str = "diffusers pipeline") -> str:
    """``builtin:NAME`` as the folder of the model shipped with this package; anything else as it is.

    Args:
        marker: the file that every folder of this kind has.
        kind: for messages.

    Raises:
        UserError: there is no such folder, or ``model`` looks like a path and is none.
    """
    if model.startswith("builtin:"):
        name = model.removeprefix("builtin:")
        folders = sorted(path.name for path in BUILTIN.iterdir() if (path / marker).is_file())
        if name not in folders:
            raise UserError(f"pipeline '{model}' is not shipped with this package{nearest(name, folders)}")
        return str(BUILTIN / name)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / marker).is_file():
            raise UserError(f"pipeline folder '{model}' has no {marker}: it is not a {kind}")
        return str(path)
    if looks_like_path:
        raise UserError(f"pipeline folder '{model}' does not exist")
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of diffusers and transformers inside: for work of a moment."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = [library for library in (diffusers_logging, transformers_logging) if library.is_progress_bar_enabled()]
    for library in libraries:
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library in libraries:
            library.enable_progress_bar()


def is_small(folder: str) -> bool:
    """A local folder that loads in a moment."""
    path = Path(folder)
    return path.is_dir() and sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) < 100e6


def load_pipeline(
    model: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    revision: str | None = None,
    variant: str | None = None,
    scheduler: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    controlnet: str | None = None,
) -> Any:
    """A diffusers pipeline in ``dtype`` from a folder, ``builtin:NAME`` or a hub id; safetensors only.

    Args:
        controlnet: folder or hub id of a ControlNet (arXiv:2302.05543) for a UNet; prompts bring its condition picture.
        scheduler: entries of the scheduler's config to change, e.g. ``{shift: 3.0, use_dynamic_shifting: false}``.

    Raises:
        UserError: the model cannot be found, or its scheduler's config has no such entry.
    """
    folder = resolve(model)
    from diffusers import AutoPipelineForText2Image, ControlNetModel, DiffusionPipeline

    try:
        with quiet() if is_small(folder) else contextlib.nullcontext():
            kind, extra = DiffusionPipeline, {}
            if controlnet is not None:
                network = ControlNetModel.from_pretrained(controlnet, torch_dtype=getattr(torch, dtype))
                kind, extra = AutoPipelineForText2Image, {"controlnet": network}
            pipe = kind.from_pretrained(
                folder,
                **extra,
                dtype=getattr(torch, dtype),
                revision=revision,
                variant=variant,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
            )
    except OSError as error:
        raise UserError(f"pipeline '{model}' cannot be loaded: {error}") from error
    for key in scheduler or {}:
        if key not in pipe.scheduler.config:
            kind = type(pipe.scheduler).__name__
            raise UserError(f"pipeline.scheduler.{key}: {kind} has no such entry{nearest(key, pipe.scheduler.config)}")
    if scheduler:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **scheduler)
    if getattr(pipe, "safety_checker", None) is not None:
        logging.getLogger(__name__).warning(
            "the pipeline's safety checker is off during training: it would blacken pictures that rewards must see"
        )
        pipe.safety_checker = None
        pipe.register_to_config(requires_safety_checker=False)
    return pipe
