"""A tiny member of the Qwen3.5 line: most layers are linear attention, whose cache is a state and not keys."""

from __future__ import annotations

from typing import Any

from zoo.vlms.parts import HIDDEN, finished
from zoo.vlms.qwen import QWEN_IDS, picture_limits, qwen_tokenizer, rotary_text, token_ids, video_limits


def qwen3_5(seed: int) -> tuple[Any, Any]:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor
    from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    tokenizer = qwen_tokenizer(between_marks=False)
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**picture_limits(16)),
        tokenizer,
        Qwen3VLVideoProcessor(**video_limits(16)),
        chat_template=tokenizer.chat_template,
    )
    text = rotary_text(tokenizer, "qwen3_5_text", head_dim=64, rope={"mrope_interleaved": True})
    text |= {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    }
    config = Qwen3_5Config(
        text_config=text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": HIDDEN,
            "num_position_embeddings": 256,
        },
        tie_word_embeddings=False,
        **token_ids(tokenizer, QWEN_IDS),
    )
    return finished(Qwen3_5ForConditionalGeneration(config), tokenizer, "qwen3_5", seed), processor
