"""Tiny models in which a projector hands the features of a vision transformer to a plain language model."""

from __future__ import annotations

from typing import Any

from zoo.text import learn_bpe
from zoo.vlms.parts import MAX_LENGTH, byte_tokenizer, chat_template, finished, text_sizes

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def llava(seed: int) -> tuple[Any, Any]:
    """LLaVA 1.5: CLIP of a fixed size, Llama."""
    from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    template = chat_template("<image>", before="<s>")
    tokenizer = llama_tokenizer(template, ["<image>"])
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaConfig(
        text_config=text_sizes(tokenizer, "llama"),
        vision_config={"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14} | VISION,
        image_token_index=processor.image_token_id,
        image_seq_length=16,
    )
    return finished(LlavaForConditionalGeneration(config), tokenizer, "llava", seed), processor


def llava_next(seed: int) -> tuple[Any, Any]:
    """LLaVA 1.6: CLIP over the whole picture and its tiles, a newline after every row of features; Llama."""
    from transformers import (
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
        LlavaNextImageProcessor,
        LlavaNextProcessor,
    )

    template = chat_template("<image>", before="<s>")
    tokenizer = llama_tokenizer(template, ["<image>"])
    grids = [[56, 112], [112, 56], [112, 112]]
    pictures = LlavaNextImageProcessor(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=grids
    )
    processor = LlavaNextProcessor(
        pictures,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    config = LlavaNextConfig(
        text_config=text_sizes(tokenizer, "llama"),
        vision_config={"model_type": "clip_vision_model", "image_size": 56, "patch_size": 14} | VISION,
        image_token_index=processor.image_token_id,
        image_grid_pinpoints=grids,
    )
    return finished(LlavaNextForConditionalGeneration(config), tokenizer, "llava_next", seed), processor


def pixtral(seed: int) -> tuple[Any, Any]:
    """Pixtral 12B, which is a LLaVA with Pixtral's vision transformer: pictures at their own shape; Mistral."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    template = chat_template("[IMG]", before="<s>")
    tokenizer = llama_tokenizer(template, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    pictures = PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 16, "width": 16})
    processor = PixtralProcessor(pictures, tokenizer, patch_size=16, chat_template=template)
    config = LlavaConfig(
        text_config=text_sizes(tokenizer, "mistral", sliding_window=None),
        vision_config={"model_type": "pixtral", "image_size": 112, "patch_size": 16} | VISION,
        image_token_index=processor.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return finished(LlavaForConditionalGeneration(config), tokenizer, "pixtral", seed), processor


def llava_onevision(seed: int) -> tuple[Any, Any]:
    """SigLIP over tiles of a large picture, one tile each for several pictures, pooled frames of a video; Qwen 2."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    template = chat_template("<image>", "<video>")
    tokenizer = byte_tokenizer(template, ["<|im_start|>", "<|im_end|>", "<image>", "<video>"])
    size = {"height": 56, "width": 56}
    grids = [[56, 56], [56, 112], [112, 56], [112, 112]]
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=grids),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    config = LlavaOnevisionConfig(
        text_config=text_sizes(tokenizer, "qwen2"),
        vision_config={
            "model_type": "siglip_vision_model",
            "image_size": 56,
            "patch_size": 14,
            "vision_use_head": False,
        }
        | VISION,
        image_token_index=processor.image_token_id,
        video_token_index=processor.video_token_id,
        image_grid_pinpoints=grids,
    )
    return finished(LlavaOnevisionForConditionalGeneration(config), tokenizer, "llava_onevision", seed), processor


def internvl(seed: int) -> tuple[Any, Any]:
    """InternVL 3 in its transformers form: tiles and a thumbnail, four patches folded into one token; Qwen 2."""
    from transformers import (
        GotOcr2ImageProcessor,
        InternVLConfig,
        InternVLForConditionalGeneration,
        InternVLProcessor,
        InternVLVideoProcessor,
    )

    template = chat_template("<IMG_CONTEXT>", "<video>")
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    marks = ["<|im_start|>", "<|im_end|>", *named.values()]
    tokenizer = byte_tokenizer(template, marks, model_specific_special_tokens=named)
    size = {"height": 56, "width": 56}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size, max_patches=4),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template,
    )
    config = InternVLConfig(
        text_config=text_sizes(tokenizer, "qwen2"),
        vision_config={"image_size": [56, 56], "patch_size": [14, 14]} | VISION,
        image_token_id=processor.image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return finished(InternVLForConditionalGeneration(config), tokenizer, "internvl", seed), processor


def mistral3(seed: int) -> tuple[Any, Any]:
    """Pixtral at the picture's own shape, with a mark after every row of patches; Mistral."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    template = chat_template("[IMG]", before="<s>")
    tokenizer = llama_tokenizer(template, ["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
    processor = PixtralProcessor(
        PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14}),
        tokenizer,
        patch_size=14,
        spatial_merge_size=2,
        chat_template=template,
    )
    config = Mistral3Config(
        text_config=text_sizes(tokenizer, "mistral", sliding_window=None),
        vision_config={"model_type": "pixtral", "image_size": 112, "patch_size": 14} | VISION,
        image_token_index=processor.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return finished(Mistral3ForConditionalGeneration(config), tokenizer, "mistral3", seed), processor


def llama_tokenizer(template: str, marks: list[str]) -> Any:
    """A Llama tokenizer (words start with ``▁``, unknown bytes as ``<0x41>``) whose turns end with ``</s>``."""
    from transformers import LlamaTokenizer

    marks = ["<|im_start|>", "<|im_end|>", *marks]
    return learn_bpe(
        LlamaTokenizer,
        ["<unk>", "<s>", "</s>", "<pad>", *marks],
        "fallback",
        pad_token="<pad>",
        eos_token="<|im_end|>",
        padding_side="left",
        extra_special_tokens=marks,
        chat_template=template,
        model_max_length=MAX_LENGTH,
    )
