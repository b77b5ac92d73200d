"""Where pipelines come from: a folder, a hub id, or this package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from mmrl.errors import UserError, nearest

BUILTIN = Path(__file__).parent / "quickstart"


def resolve(model: str) -> str:
    """``builtin:NAME`` as the folder of the pipeline shipped with this package; anything else as it is.

    Raises:
        UserError: there is no such folder, or ``model`` looks like a path and is none.
    """
    if model.startswith("builtin:"):
        name = model.removeprefix("builtin:")
        folders = sorted(path.name for path in BUILTIN.iterdir() if (path / "model_index.json").is_file())
        if name not in folders:
            raise UserError(f"pipeline '{model}' is not shipped with this package{nearest(name, folders)}")
        return str(BUILTIN / name)
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise UserError(f"pipeline folder '{model}' has no model_index.json: it is not a diffusers pipeline")
        return str(path)
    if looks_like_path:
        raise UserError(f"pipeline folder '{model}' does not exist")
    return model


def load_pipeline(
    model: str,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    revision: str | None = None,
    variant: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """A diffusers pipeline in ``dtype`` from a folder, ``builtin:NAME`` or a hub id; safetensors only.

    Raises:
        UserError: the model cannot be found.
    """
    folder = resolve(model)
    from diffusers import DiffusionPipeline

    try:
        pipe = DiffusionPipeline.from_pretrained(
            folder,
            torch_dtype=getattr(torch, dtype),
            revision=revision,
            variant=variant,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except OSError as error:
        raise UserError(f"pipeline '{model}' cannot be loaded: {error}") from error
    if getattr(pipe, "safety_checker", None) is not None:
        logging.getLogger(__name__).warning(
            "the pipeline's safety checker is off during training: it would blacken pictures that rewards must see"
        )
        pipe.safety_checker = None
        pipe.register_to_config(requires_safety_checker=False)
    return pipe
