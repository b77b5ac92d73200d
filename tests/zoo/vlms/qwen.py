"""Tiny members of the Qwen-VL line: rotary positions in three dimensions, pictures of any size."""

from __future__ import annotations

from typing import Any

from zoo.vlms.parts import HIDDEN, MAX_LENGTH, byte_tokenizer, chat_template, finished, vocab_size

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


def tokenizer_and_ids() -> tuple[Any, dict[str, int]]:
    tokenizer = byte_tokenizer(chat_template(IMAGE, VIDEO))
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return tokenizer, {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def text_sizes(tokenizer: Any, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | more


def picture_limits(patch: int) -> dict[str, Any]:
    """Pictures keep their shape, between 4 and 64 tokens."""
    side = 2 * patch
    return {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 4 * side * side, "longest_edge": 64 * side * side},
    }


def qwen2_5_vl(seed: int) -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer, ids = tokenizer_and_ids()
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**picture_limits(14)),
        tokenizer,
        Qwen2VLVideoProcessor(**picture_limits(14)),
        chat_template=tokenizer.chat_template,
    )
    config = Qwen2_5_VLConfig(
        text_config=text_sizes(tokenizer),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "window_size": 112,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=False,
        **ids,
    )
    return finished(Qwen2_5_VLForConditionalGeneration(config), tokenizer, "qwen2_5_vl", seed), processor
