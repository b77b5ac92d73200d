"""Builds the quickstart's vision-language model: a real Qwen2_5_VLForConditionalGeneration of about two megabytes.

    python -m pipelines.quickstart.vlm_base OUT_DIR

trains the tokenizer on the words of the shapes world, then the whole model from nothing with the ``sft`` algorithm
(``configs/quickstart/pretrain_vlm.yaml``) on questions about drawn scenes, and writes the folder. No held-out pair of
kinds is in its data.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from mmrl.seeding import derive_seed, generator
from mmrl.world.captions import ASKED_COLOURS, ASKED_SHAPES, all_targets, is_held_out, vocabulary
from mmrl.world.captions import TASKS as CAPTION_TASKS
from mmrl.world.questions import JUDGED_SIDE, SIDE, TASKS, ask, picture, rows
from mmrl.world.scenes import RELATIONS, Scene, place

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

PATCH = 8
MERGE = 2
WIDTH = 128
LAYERS = 4
VISION_WIDTH = 96
VISION_LAYERS = 3
CONTEXT = 1024
THETA = 1e4
INIT = 0.06
VISION_LR = 2e-3
VISION_BATCH = 32
VISION_STEPS = 800
VISION_PICTURES = 8000
CONFIG = Path(__file__).parents[2] / "configs" / "quickstart" / "pretrain_vlm.yaml"

Report = Callable[[int, dict[str, float]], None]
"""Called with the number of a step that was made and its losses."""

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TAGS = ["<think>", "</think>", "<answer>", "</answer>"]
"""Added tokens as in Qwen's tokenizers; the tags are plain text to a decoder that skips special tokens."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def corpus() -> Iterator[str]:
    """Text for the tokenizer: questions, responses, and every word and number of the world by itself."""
    for row in rows(count=2000, tasks=TASKS):
        yield f"user\n{row['text']}"
        yield f"assistant\n{row['response']}"
    for _ in range(50):
        for item in [*vocabulary(), *RELATIONS, *map(str, range(SIDE + 1))]:
            yield f"{item} {item}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer to which every word and every coordinate of the world is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=40,
        special_tokens=[*CONTROL, *VISION],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for line in corpus() for text in _untagged(line))
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", *VISION],
        extra_special_tokens={"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
        padding_side="left",
        model_max_length=CONTEXT,
        chat_template=CHAT_TEMPLATE,
    )


def _untagged(line: str) -> list[str]:
    for tag in TAGS:
        line = line.replace(tag, "\0")
    return [text for text in line.split("\0") if text]


def build_processor() -> Qwen2_5_VLProcessor:
    """Pictures of any size become about 64 by 64 pixels, which the model sees as 16 tokens."""
    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    size = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "size": size}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=build_tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**sizes),
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """The model, untrained."""
    from transformers import GenerationConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("image_pad", "video_pad")}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": CONTEXT,
            "rope_parameters": {"rope_type": "default", "rope_theta": THETA, "mrope_section": [4, 6, 6]},
            "initializer_range": INIT,
            **ends,
        },
        vision_config={
            "depth": VISION_LAYERS,
            "hidden_size": VISION_WIDTH,
            "intermediate_size": 2 * VISION_WIDTH,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "window_size": SIDE,
            "fullatt_block_indexes": list(range(VISION_LAYERS)),
            "out_hidden_size": WIDTH,
            "initializer_range": INIT,
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=INIT,
        **ends,
    )
    torch.manual_seed(derive_seed(seed, "qwen-vl-shapes"))
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True, max_new_tokens=48
    )
    return model


def scenes(count: int, rng: np.random.Generator) -> Iterator[tuple[Scene, Image]]:
    """Random scenes of the training split with their pictures; every fourth is one of the image quickstart."""
    captions = [target for task in CAPTION_TASKS for target in all_targets(task) if not is_held_out(target)]
    for number in range(count):
        if number % 4 == 3:
            scene = place(captions[rng.integers(len(captions))], rng)
            yield scene, picture(scene, JUDGED_SIDE, shade=0)
        else:
            scene = ask("ground", rng, "train")[1]
            yield scene, picture(scene)


def cells(scene: Scene) -> torch.Tensor:
    """What each of the 16 tokens of a picture should tell: long ``[16, 5]``.

    Colour and shape of the object whose centre lies in its part of the picture, counted from 1 (0 for none), and in
    pixels its centre (x, y) and half-side, -100 where there is none.
    """
    number = SIDE // (PATCH * MERGE)
    found = torch.full((number * number, 5), -100)
    found[:, :2] = 0
    for o in scene.objects:
        cell = int(o.y * number) * number + int(o.x * number)
        kind = 1 + ASKED_COLOURS.index(o.colour), 1 + ASKED_SHAPES.index(o.shape)
        found[cell] = torch.tensor([*kind, round(o.x * SIDE), round(o.y * SIDE), round(o.size * SIDE)])
    return found


def train_vision(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    seed: int,
    steps: int,
    pictures: int,
    report: Report,
) -> None:
    """Train the vision tower alone, so that what is where can be read off its tokens linearly."""
    rng = np.random.default_rng([seed, 4])
    drawn = list(scenes(pictures, rng))
    wanted = torch.stack([cells(scene) for scene, _ in drawn])
    read = processor.image_processor(images=[image for _, image in drawn], return_tensors="pt")
    patches = read["pixel_values"].view(pictures, -1, read["pixel_values"].shape[-1])
    sizes = [1 + len(ASKED_COLOURS), 1 + len(ASKED_SHAPES), *[SIDE + 1] * 3]
    torch.manual_seed(derive_seed(seed, "vision"))
    heads = nn.Linear(WIDTH, sum(sizes))
    parameters = [*model.model.visual.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=VISION_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, VISION_LR, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        rows = torch.randint(pictures, (VISION_BATCH,), generator=generator(seed, "vision", step))
        grid = read["image_grid_thw"][rows]
        tokens = model.model.visual(patches[rows].flatten(0, 1), grid_thw=grid).pooler_output
        right = wanted[rows].flatten(0, 1)
        losses = [
            nn.functional.cross_entropy(logits, right[:, number], ignore_index=-100)
            for number, logits in enumerate(heads(tokens).split(sizes, dim=1))
        ]
        # Most tokens see nothing, so colours and shapes count for more than their share.
        loss = 8 * (losses[0] + losses[1]) + sum(losses[2:])
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        report(step, dict(zip(("colour", "shape", "x", "y", "size"), (loss.item() for loss in losses), strict=True)))


def main(out: Path, seed: int = 0, overrides: Sequence[str] = ()) -> None:
    """Build and train everything and write it to ``out``; the training run stays in ``out`` + ``-run``.

    ``overrides`` are of the config, as on the command line of ``mmrl train``.
    """
    from rich.progress import Progress
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from mmrl.config import load_config
    from mmrl.run import train

    run = out.with_name(out.name + "-run")
    processor = build_processor()
    model = build_model(processor.tokenizer, seed)
    with Progress() as progress:
        task = progress.add_task("vision tower", total=VISION_STEPS)
        report = lambda step, losses: progress.update(task, completed=step + 1)  # noqa: E731
        train_vision(model, processor, seed, VISION_STEPS, VISION_PICTURES, report)
    model.save_pretrained(run / "start")
    processor.save_pretrained(run / "start")
    config = load_config(CONFIG, [f"pipeline.model={run / 'start'}", f"run_dir={run}", f"seed={seed}", *overrides])
    summary = train(config)
    AutoModelForImageTextToText.from_pretrained(summary["model"]).bfloat16().save_pretrained(out)
    AutoProcessor.from_pretrained(summary["model"]).save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), overrides=sys.argv[2:])
