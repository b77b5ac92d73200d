"""Tiny Idefics 3 (the class of SmolVLM 1) and SmolVLM 2: tiles between row and column marks, pixel shuffle, Llama."""

from __future__ import annotations

from typing import Any

from zoo.vlms.parts import byte_tokenizer, chat_template, finished, text_sizes

TILE = 56
PLACES = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<end_of_utterance>",
    "<global-img>",
    "<video>",
    *PLACES,
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 14,
}


def idefics3(seed: int) -> tuple[Any, Any]:
    from transformers import (
        Idefics3Config,
        Idefics3ForConditionalGeneration,
        Idefics3ImageProcessor,
        Idefics3Processor,
    )

    template = chat_template("<image>")
    tokenizer = byte_tokenizer(template, MARKS)
    pictures = Idefics3ImageProcessor(size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE})
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=4, chat_template=template)
    config = Idefics3Config(
        text_config=text_sizes(tokenizer, "llama"),
        vision_config=VISION,
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return finished(Idefics3ForConditionalGeneration(config), tokenizer, "idefics3", seed), processor


def smolvlm(seed: int) -> tuple[Any, Any]:
    from transformers import (
        SmolVLMConfig,
        SmolVLMForConditionalGeneration,
        SmolVLMImageProcessor,
        SmolVLMProcessor,
        SmolVLMVideoProcessor,
    )

    template = chat_template("<image>", "<video>")
    tokenizer = byte_tokenizer(template, MARKS)
    size, tile = {"longest_edge": 2 * TILE}, {"longest_edge": TILE}
    processor = SmolVLMProcessor(
        SmolVLMImageProcessor(size=size, max_image_size=tile),
        tokenizer,
        SmolVLMVideoProcessor(size=size, max_image_size=tile, video_sampling={"max_frames": 8, "fps": 1}),
        image_seq_len=4,
        chat_template=template,
    )
    config = SmolVLMConfig(
        text_config=text_sizes(tokenizer, "llama"),
        vision_config=VISION,
        image_token_id=processor.image_token_id,
        scale_factor=2,
    )
    return finished(SmolVLMForConditionalGeneration(config), tokenizer, "smolvlm", seed), processor
