"""Text halves of the zoo: small tokenizers learned in memory, and tiny random text encoders that fit them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import pre_tokenizers
from torch import nn

from mmrl.seeding import generator

WIDTH = 16
CORPUS = [
    "a photo of a red circle left of a blue square, two green triangles above a yellow ring",
    "the quick brown fox jumps over the lazy dog; PACK MY BOX WITH FIVE DOZEN LIQUOR JUGS. 0123456789",
    "a video of a shape that moves to the right, bad quality, blurry image, worst quality",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:",
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how "
    "the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate.",
    "You are an assistant designed to generate superior images with the superior degree of image-text alignment based "
    "on textual prompts or user prompts. <Prompt Start> system user assistant\n",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{{ part['text'] if part['type'] == 'text' else '' }}{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def set_random_weights(module: nn.Module, *path: str) -> nn.Module:
    """Fill every parameter from a stateless seed and switch to eval.

    Constructors leave some parameters unset (``torch.empty``) and some output layers at zero, where a network would
    pass no gradient; this gives every layer a signal of about unit size.
    """
    for name, value in module.named_parameters():
        noise = torch.randn(value.shape, generator=generator(0, "zoo", *path, name), dtype=torch.float32)
        if value.ndim >= 2:
            noise *= 0.8 / value[0].numel() ** 0.5
        else:
            noise = noise * 0.05 + float(name.endswith("weight"))
        value.data.copy_(noise)
    return module.eval()


def spell_out(words: list[str], vocab: list[str], suffix: str = "") -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A BPE table over ``vocab`` in which every one of ``words`` is reached by merging from left to right.

    The trainers of the tokenizers library break ties by hash order, which differs between processes; this does not.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in words:
        pieces = [*word[:-1], word[-1] + suffix]
        left = pieces[0]
        for right in pieces[1:]:
            merges[left, right] = None
            left += right
    tokens = dict.fromkeys([*vocab, *(left + right for left, right in merges)])
    return {token: i for i, token in enumerate(tokens)}, list(merges)


def corpus_words(blank: Any) -> list[str]:
    """The words of ``CORPUS`` as the normaliser and splitter of the tokenizer ``blank`` show them to its model."""
    backend = blank.backend_tokenizer
    words: dict[str, None] = {}
    for text in CORPUS:
        text = backend.normalizer.normalize_str(text) if backend.normalizer else text
        for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text):
            words.update(dict.fromkeys(word for word in re.split("(?=▁)", piece) if word))
    return list(words)


def learn_bpe(tokenizer_class: type, specials: Sequence[str], bytes_as: str, suffix: str = "", **options: Any) -> Any:
    """A BPE tokenizer of a real class whose tokens are the specials, all bytes and the words of ``CORPUS``.

    ``bytes_as="level"`` writes bytes as printable characters (CLIP, Qwen), ``"fallback"`` as ``<0x41>`` (Gemma, Llama).
    """
    words = corpus_words(tokenizer_class(**options))
    if bytes_as == "level":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        alphabet += [letter + suffix for letter in alphabet if suffix]
    else:
        alphabet = [f"<0x{i:02X}>" for i in range(256)] + sorted({letter for word in words for letter in word})
    vocab, merges = spell_out(words, [*specials, *alphabet], suffix)
    return tokenizer_class(vocab=vocab, merges=merges, **options)


def clip_text(projection: bool = False, hidden: int = WIDTH) -> tuple[Any, Any]:
    """CLIP tokenizer and text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = learn_bpe(CLIPTokenizer, ["<|startoftext|>", "<|endoftext|>"], "level", "</w>", model_max_length=77)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=hidden,
        projection_dim=hidden,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=2,
    )
    model = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return tokenizer, set_random_weights(model, "clip")


def t5_text(multilingual: bool = False) -> tuple[Any, Any]:
    """T5 (or UMT5) tokenizer and encoder."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

    words = corpus_words(T5Tokenizer(extra_ids=0))
    letters = sorted({letter for word in words for letter in word} - {"▁"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -9.0) for letter in letters] + [(word, -6.0) for word in words if len(word) > 1]
    tokenizer = T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)
    config_class, model_class = (UMT5Config, UMT5EncoderModel) if multilingual else (T5Config, T5EncoderModel)
    return tokenizer, set_random_weights(model_class(config_class(**t5_sizes(len(tokenizer)))), "t5")


def t5_sizes(vocab_size: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab_size,
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 32,
        "dropout_rate": 0.0,
    }


def byt5_text() -> tuple[Any, Any]:
    """The byte tokenizer and a T5 encoder for it."""
    from transformers import ByT5Tokenizer, T5Config, T5EncoderModel

    tokenizer = ByT5Tokenizer()
    return tokenizer, set_random_weights(T5EncoderModel(T5Config(**t5_sizes(len(tokenizer)))), "byt5")


def gemma_text() -> tuple[Any, Any]:
    """Gemma tokenizer and Gemma 2 decoder without a head."""
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer

    tokenizer = learn_bpe(
        GemmaTokenizer, ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"], "fallback", model_max_length=256
    )
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        head_dim=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, set_random_weights(Gemma2Model(config), "gemma")


def llama_text() -> tuple[Any, Any]:
    """Llama tokenizer and decoder without a head."""
    from transformers import LlamaConfig, LlamaModel, LlamaTokenizer

    tokenizer = learn_bpe(
        LlamaTokenizer,
        ["<unk>", "<s>", "</s>", "<pad>"],
        "fallback",
        pad_token="<pad>",
        padding_side="right",
        model_max_length=256,
    )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=3,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return tokenizer, set_random_weights(LlamaModel(config), "llama")


def qwen_tokenizer() -> Any:
    """Qwen 2 tokenizer with the chat and vision markers and a chat template."""
    from transformers import Qwen2Tokenizer

    return learn_bpe(
        Qwen2Tokenizer,
        ["<|endoftext|>", *QWEN_TOKENS],
        "level",
        extra_special_tokens=list(QWEN_TOKENS),
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
    )


def qwen3_text(head: bool = False) -> tuple[Any, Any]:
    """Qwen 2 tokenizer and Qwen 3 decoder, with or without a language head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model

    tokenizer = qwen_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        head_dim=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, set_random_weights((Qwen3ForCausalLM if head else Qwen3Model)(config), "qwen3")


def qwen_vl_text(layers: int = 2) -> tuple[Any, Any]:
    """Qwen 2 tokenizer and Qwen 2.5 VL, the text encoder of Qwen-Image."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    ids = dict(zip(QWEN_TOKENS, tokenizer.convert_tokens_to_ids(list(QWEN_TOKENS)), strict=True))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_hidden_layers": layers,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [0],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    return tokenizer, set_random_weights(Qwen2_5_VLForConditionalGeneration(config), "qwen_vl")


def qwen_vl_processor(tokenizer: Any) -> Any:
    """Processor that shrinks every picture to 16 patches."""
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    return Qwen2VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=size),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(size=size),
    )


def glm_text() -> tuple[Any, Any]:
    """A byte-level tokenizer with GLM's prefix tokens, and a GLM decoder."""
    from tokenizers import processors
    from transformers import GlmConfig, GlmForCausalLM, Qwen2Tokenizer

    tokenizer = learn_bpe(
        Qwen2Tokenizer,
        ["<|endoftext|>", "[gMASK]", "<sop>"],
        "level",
        extra_special_tokens=["[gMASK]", "<sop>"],
        padding_side="left",
        model_max_length=1024,
    )
    prefix = tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=list(zip(["[gMASK]", "<sop>"], prefix, strict=True))
    )
    config = GlmConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        head_dim=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return tokenizer, set_random_weights(GlmForCausalLM(config), "glm")


def mistral_text() -> tuple[Any, Any]:
    """Processor and Mistral 3, the text encoder of FLUX.2."""
    from transformers import (
        LlamaTokenizer,
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        PixtralImageProcessor,
        PixtralProcessor,
    )

    marks = ["[IMG]", "[IMG_BREAK]", "[IMG_END]", "<|im_start|>", "<|im_end|>"]
    tokenizer = learn_bpe(
        LlamaTokenizer,
        ["<unk>", "<s>", "</s>", "<pad>", *marks],
        "fallback",
        pad_token="<pad>",
        padding_side="right",
        extra_special_tokens=marks,
        model_max_length=512,
    )
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=CHAT_TEMPLATE)
    config = Mistral3Config(
        text_config={
            "model_type": "mistral",
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "image_size": 32,
            "patch_size": 16,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return processor, set_random_weights(Mistral3ForConditionalGeneration(config), "mistral")
