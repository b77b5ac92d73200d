"""What the tiny vision-language models share: tokenizers with chat templates, and weights drawn from a seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from zoo.text import learn_bpe, set_random_weights

HIDDEN = 64
MAX_LENGTH = 4096
QWEN_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def chat_template(
    image: str, video: str = "", start: str = "<|im_start|>", end: str = "<|im_end|>", before: str = ""
) -> str:
    """A chat template that takes strings or lists of parts and writes ``image`` and ``video`` for parts of that type.

    What the assistant says, with its end mark, stands between ``{% generation %}`` tags: masks for supervised training.
    """
    part = "{% for part in m['content'] %}"
    part += f"{{% if part['type'] == 'image' %}}{image}{{% elif part['type'] == 'video' %}}{video}"
    part += "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    content = "{% if m['content'] is string %}{{ m['content'] }}{% else %}" + part + "{% endif %}"
    newline = "{{ '\\n' }}"
    return (
        f"{before}{{% for m in messages %}}{start}{{{{ m['role'] }}}}{newline}"
        f"{{% if m['role'] == 'assistant' %}}{{% generation %}}{content}{end}{{% endgeneration %}}"
        f"{{% else %}}{content}{end}{{% endif %}}{newline}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{start}assistant{newline}{{% endif %}}"
    )


def byte_tokenizer(template: str, marks: Sequence[str], **options: Any) -> Any:
    """The byte-level BPE tokenizer of Qwen 2 with ``marks`` as special tokens; a turn ends with ``<|im_end|>``."""
    from transformers import Qwen2Tokenizer

    return learn_bpe(
        Qwen2Tokenizer,
        ["<|endoftext|>", *marks],
        "level",
        extra_special_tokens=list(marks),
        pad_token="<|endoftext|>",
        padding_side="left",
        chat_template=template,
        model_max_length=MAX_LENGTH,
        **({"eos_token": "<|im_end|>"} | options),
    )


def vocab_size(tokenizer: Any) -> int:
    """Rows of the embedding: the tokens, rounded up to a multiple of 64 as released models do."""
    return -(-len(tokenizer) // 64) * 64


def text_sizes(tokenizer: Any, model_type: str, **more: Any) -> dict[str, Any]:
    """Configuration of a tiny language model of a Llama-like kind."""
    return {
        "model_type": model_type,
        "vocab_size": vocab_size(tokenizer),
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    } | more


def finished(model: nn.Module, tokenizer: Any, family: str, seed: int) -> nn.Module:
    """``model`` with weights that follow from ``family`` and ``seed``, and the stop tokens of ``tokenizer``."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return set_random_weights(model, family, f"seed {seed}")
