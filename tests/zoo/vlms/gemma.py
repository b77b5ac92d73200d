"""Tiny Gemma 3 and PaliGemma: SigLIP, and language models in which the tokens of a picture see each other both ways."""

from __future__ import annotations

from typing import Any

from zoo.text import learn_bpe
from zoo.vlms.parts import HIDDEN, MAX_LENGTH, chat_template, finished, text_sizes

VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}


def gemma_tokenizer(template: str, marks: list[str], **options: Any) -> Any:
    from transformers import GemmaTokenizer

    return learn_bpe(
        GemmaTokenizer,
        ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *marks],
        "fallback",
        padding_side="left",
        chat_template=template,
        model_max_length=MAX_LENGTH,
        **options,
    )


def gemma3(seed: int) -> tuple[Any, Any]:
    """Layers with a sliding window (shorter than a prompt here) and with full attention in turn."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3ImageProcessor, Gemma3Processor

    template = chat_template("<start_of_image>", start="<start_of_turn>", end="<end_of_turn>", before="<bos>")
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    turns = ["<start_of_turn>", "<end_of_turn>"]
    tokenizer = gemma_tokenizer(
        template,
        [*turns, *named.values()],
        eos_token="<end_of_turn>",
        extra_special_tokens=[*turns, *named.values()],
        model_specific_special_tokens=named,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessor(size={"height": 56, "width": 56}), tokenizer, image_seq_length=4, chat_template=template
    )
    config = Gemma3Config(
        text_config=text_sizes(
            tokenizer,
            "gemma3_text",
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
        ),
        vision_config=VISION,
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return finished(Gemma3ForConditionalGeneration(config), tokenizer, "gemma3", seed), processor


def paligemma(seed: int) -> tuple[Any, Any]:
    """The whole prompt, picture and text, is one block in which every token sees every other; Gemma."""
    from transformers import (
        PaliGemmaConfig,
        PaliGemmaForConditionalGeneration,
        PaliGemmaProcessor,
        SiglipImageProcessor,
    )

    template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for part in m['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
        "{% endif %}{% endfor %}"
    )
    tokenizer = gemma_tokenizer(template, [])
    pictures = SiglipImageProcessor(size={"height": 56, "width": 56})
    pictures.image_seq_length = 16
    processor = PaliGemmaProcessor(pictures, tokenizer, chat_template=template)
    config = PaliGemmaConfig(
        text_config=text_sizes(tokenizer, "gemma", head_dim=16),
        vision_config=VISION,
        image_token_index=processor.image_token_id,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
        vocab_size=len(tokenizer),
    )
    return finished(PaliGemmaForConditionalGeneration(config), tokenizer, "paligemma", seed), processor
