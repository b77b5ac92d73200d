"""Tiny members of the Qwen-VL line and GLM-4V: rotary positions in three dimensions, pictures of any size."""

from __future__ import annotations

from typing import Any

from zoo.vlms.parts import HIDDEN, QWEN_MARKS, byte_tokenizer, chat_template, finished, text_sizes

QWEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
GLM_IDS = {
    "image_token_id": "<|image|>",
    "video_token_id": "<|video|>",
    "image_start_token_id": "<|begin_of_image|>",
    "image_end_token_id": "<|end_of_image|>",
    "video_start_token_id": "<|begin_of_video|>",
    "video_end_token_id": "<|end_of_video|>",
}


def qwen_tokenizer(between_marks: bool = True) -> Any:
    """The Qwen tokenizer. Qwen 3 VL sets the marks around each frame of a video itself: ``between_marks=False``."""
    image, video = "<|image_pad|>", "<|video_pad|>"
    marked = f"<|vision_start|>{image}<|vision_end|>"
    return byte_tokenizer(
        chat_template(marked, f"<|vision_start|>{video}<|vision_end|>" if between_marks else video), QWEN_MARKS
    )


def token_ids(tokenizer: Any, names: dict[str, str]) -> dict[str, int]:
    return {key: tokenizer.convert_tokens_to_ids(token) for key, token in names.items()}


def rotary_text(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    """A tiny language model whose rotary positions have a temporal, a vertical and a horizontal part."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    return text_sizes(tokenizer, model_type, rope_parameters=rope | more.pop("rope", {}), **more)


def picture_limits(patch: int) -> dict[str, Any]:
    """Pictures keep their shape and take between 4 and 64 tokens."""
    side = 2 * patch
    return {
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 4 * side * side, "longest_edge": 64 * side * side},
    }


def video_limits(patch: int, frames: int = 2) -> dict[str, Any]:
    """Limits of the processors that count the tokens of all frames together."""
    limits = picture_limits(patch)
    return limits | {"size": {key: frames * value for key, value in limits["size"].items()}}


def qwen2_vl(seed: int) -> tuple[Any, Any]:
    from transformers import (
        Qwen2VLConfig,
        Qwen2VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = qwen_tokenizer()
    processor = Qwen2VLProcessor(
        Qwen2VLImageProcessor(**picture_limits(14)),
        tokenizer,
        Qwen2VLVideoProcessor(**picture_limits(14)),
        chat_template=tokenizer.chat_template,
    )
    config = Qwen2VLConfig(
        text_config=rotary_text(tokenizer, "qwen2_vl_text"),
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2, "num_heads": 2},
        tie_word_embeddings=False,
        **token_ids(tokenizer, QWEN_IDS),
    )
    return finished(Qwen2VLForConditionalGeneration(config), tokenizer, "qwen2_vl", seed), processor


def qwen2_5_vl(seed: int) -> tuple[Any, Any]:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    tokenizer = qwen_tokenizer()
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**picture_limits(14)),
        tokenizer,
        Qwen2VLVideoProcessor(**picture_limits(14)),
        chat_template=tokenizer.chat_template,
    )
    config = Qwen2_5_VLConfig(
        text_config=rotary_text(tokenizer, "qwen2_5_vl_text"),
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
        **token_ids(tokenizer, QWEN_IDS),
    )
    return finished(Qwen2_5_VLForConditionalGeneration(config), tokenizer, "qwen2_5_vl", seed), processor


def qwen3_vl(seed: int) -> tuple[Any, Any]:
    """Vision features also enter the first layers of the language model (deepstack)."""
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = qwen_tokenizer(between_marks=False)
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**picture_limits(16)),
        tokenizer,
        Qwen3VLVideoProcessor(**video_limits(16)),
        chat_template=tokenizer.chat_template,
    )
    config = Qwen3VLConfig(
        text_config=rotary_text(tokenizer, "qwen3_vl_text", head_dim=16, rope={"mrope_interleaved": True}),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
        **token_ids(tokenizer, QWEN_IDS),
    )
    return finished(Qwen3VLForConditionalGeneration(config), tokenizer, "qwen3_vl", seed), processor


def glm4v(seed: int) -> tuple[Any, Any]:
    from transformers import (
        Glm4vConfig,
        Glm4vForConditionalGeneration,
        Glm4vImageProcessor,
        Glm4vProcessor,
        Glm4vVideoProcessor,
    )

    marks = ["<|im_start|>", "<|im_end|>", *GLM_IDS.values()]
    template = chat_template(
        "<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"
    )
    tokenizer = byte_tokenizer(template, marks)
    processor = Glm4vProcessor(
        Glm4vImageProcessor(**video_limits(14)),
        tokenizer,
        Glm4vVideoProcessor(**video_limits(14)),
        chat_template=template,
    )
    config = Glm4vConfig(
        text_config=rotary_text(tokenizer, "glm4v_text"),
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "image_size": 112,
        },
        tie_word_embeddings=False,
        **token_ids(tokenizer, GLM_IDS),
    )
    return finished(Glm4vForConditionalGeneration(config), tokenizer, "glm4v", seed), processor
