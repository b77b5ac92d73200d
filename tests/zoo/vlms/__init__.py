"""Tiny random instances of real vision-language models with their real processors, built offline in a second.

Every model, tokenizer, image and video processor is the class that the released model uses; only sizes, vocabulary and
weights differ. Models are float32 and in evaluation mode; the same family and seed give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zoo.vlms import gemma, idefics, linear, llama, llava, qwen

__all__ = ["VLM_FAMILIES", "build_vlm"]

BUILDERS: dict[str, Callable[[int], tuple[Any, Any]]] = {
    "qwen2_5_vl": qwen.qwen2_5_vl,
    "qwen2_vl": qwen.qwen2_vl,
    "qwen3_vl": qwen.qwen3_vl,
    "qwen3_5": linear.qwen3_5,
    "glm4v": qwen.glm4v,
    "idefics3": idefics.idefics3,
    "smolvlm": idefics.smolvlm,
    "llava": llava.llava,
    "llava_next": llava.llava_next,
    "pixtral": llava.pixtral,
    "llava_onevision": llava.llava_onevision,
    "internvl": llava.internvl,
    "mistral3": llava.mistral3,
    "gemma3": gemma.gemma3,
    "paligemma": gemma.paligemma,
    "mllama": llama.mllama,
    "llama4": llama.llama4,
}

VLM_FAMILIES: tuple[str, ...] = tuple(name for name in BUILDERS if name != "mllama")


def build_vlm(family: str, seed: int = 0) -> tuple[Any, Any]:
    """``(model, processor)`` of one of ``VLM_FAMILIES``, with random weights that follow from ``seed``."""
    return BUILDERS[family](seed)
