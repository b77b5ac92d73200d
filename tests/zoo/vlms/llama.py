"""Tiny Llama 3.2 Vision (cross-attention to the picture) and Llama 4 (experts, chunked attention)."""

from __future__ import annotations

from typing import Any

from zoo.vlms.parts import byte_tokenizer, chat_template, finished, text_sizes

TURN = {"start": "<|start_header_id|>", "end": "<|eot_id|>"}


def mllama(seed: int) -> tuple[Any, Any]:
    """Text attends to the tiles of all pictures before it, in one layer of three."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessor, MllamaProcessor

    template = chat_template("<|image|>", before="<|begin_of_text|>", **TURN)
    marks = ["<|begin_of_text|>", *TURN.values(), "<|python_tag|>"]
    tokenizer = byte_tokenizer(template, [*marks, "<|image|>"], bos_token="<|begin_of_text|>", eos_token=TURN["end"])
    processor = MllamaProcessor(MllamaImageProcessor(size={"height": 56, "width": 56}, max_image_tiles=4), tokenizer)
    processor.chat_template = template
    text = text_sizes(tokenizer, "mllama_text_model", num_hidden_layers=3, cross_attention_layers=[1])
    config = MllamaConfig(
        text_config=text,
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "vision_output_dim": 64,
            "image_size": 56,
            "patch_size": 14,
            "intermediate_layers_indices": [0],
        },
        image_token_index=processor.image_token_id,
    )
    return finished(MllamaForConditionalGeneration(config), tokenizer, "mllama", seed), processor


def llama4(seed: int) -> tuple[Any, Any]:
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4ImageProcessor, Llama4Processor

    template = chat_template("<|image|>", before="<|begin_of_text|>", **TURN)
    pictures = [
        "<|image|>",
        "<|image_start|>",
        "<|image_end|>",
        "<|patch|>",
        "<|tile_x_separator|>",
        "<|tile_y_separator|>",
    ]
    tokenizer = byte_tokenizer(
        template,
        ["<|begin_of_text|>", *TURN.values(), *pictures],
        bos_token="<|begin_of_text|>",
        eos_token=TURN["end"],
    )
    processor = Llama4Processor(
        Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4),
        tokenizer,
        patch_size=14,
        pixel_shuffle_ratio=0.5,
        chat_template=template,
    )
    config = Llama4Config(
        text_config=text_sizes(
            tokenizer,
            "llama4_text",
            head_dim=16,
            intermediate_size_mlp=128,
            num_local_experts=2,
            interleave_moe_layer_step=2,
            no_rope_layers=[1, 0],
            attention_chunk_size=32,
        ),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "vision_output_dim": 64,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "image_size": 56,
            "patch_size": 14,
        },
        boi_token_index=tokenizer.convert_tokens_to_ids("<|image_start|>"),
        eoi_token_index=tokenizer.convert_tokens_to_ids("<|image_end|>"),
        image_token_index=tokenizer.convert_tokens_to_ids("<|patch|>"),
    )
    return finished(Llama4ForConditionalGeneration(config), tokenizer, "llama4", seed), processor
