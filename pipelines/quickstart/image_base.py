"""Builds the quickstart's text-to-image base model: a real StableDiffusion3Pipeline that fits in a few megabytes.

    python -m pipelines.quickstart.image_base OUT_DIR

trains the autoencoder on drawn scenes and the text encoders on captions, then the denoiser with the ``sft`` algorithm
(``configs/quickstart/pretrain_image.yaml``), and writes the folder. No held-out request is in its data. About a quarter
of an hour on two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import torch
from pydantic import Field
from torch import nn

from mmrl.seeding import derive_seed
from mmrl.types import Prompt
from mmrl.world import draw, place
from mmrl.world.captions import TASKS, Target, all_targets, caption, is_held_out, vocabulary
from mmrl.world.prompts import read
from mmrl.world.scenes import COLOURS, OPPOSITE, SHAPES
from pipelines.quickstart.making import Report, build_t5_encoder, fit_autoencoder, mean_latents, write

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer, PreTrainedTokenizerFast

SIDE = 32
FACTOR = 4
LATENT_CHANNELS = 8
WIDTH = 128
LAYERS = 4
TEXT_WIDTH = 64
MAX_TOKENS = 10
T5_LENGTH = 1
VAE_STEPS = 1500
TEXT_STEPS = 600
CAPTIONS = Path(__file__).parents[2] / "configs" / "quickstart" / "shapes_train.jsonl"
CONFIG = CAPTIONS.with_name("pretrain_image.yaml")


def pretraining_prompts(
    pictures: Annotated[int, Field(ge=1)] = 16_000,
    untold: Annotated[float, Field(ge=0, lt=1)] = 0.08,
    mistold: Annotated[float, Field(ge=0, lt=1)] = 0.3,
    long: Annotated[float, Field(ge=0, lt=1)] = 0.12,
    seed: Annotated[int, Field(ge=0)] = 0,
) -> Iterator[Prompt]:
    """Captions of the quickstart's training file, each many times, every time with another picture as its target.

    Args:
        pictures: how many in all.
        untold: share of the pictures whose caption is withheld, for classifier-free guidance.
        mistold: share of the other captions that tell of another picture, as captions gathered from the web do. The
            model learns to draw well and to listen badly, which is what reinforcement learning is there to mend.
        long: share of the captions whose text is padded with 64 more tokens, so that the denoiser learns to overlook
            padding: a plain call of the pipeline pads to 256.
        seed: of places, sizes and shares.
    """
    rng = np.random.default_rng([seed, 2])
    rows = read(CAPTIONS)
    rng.shuffle(rows)
    for k in range(pictures):
        number = k % len(rows)
        row = rows[number]
        picture = draw([place(row.target, rng)], SIDE)[0]
        text = "" if rng.random() < untold else row.text
        if text and rng.random() < mistold:
            text = rows[rng.integers(len(rows))].text
        inputs = {"max_sequence_length": T5_LENGTH + 64} if text and number < long * len(rows) else {}
        yield Prompt(text=text, id=f"picture-{k}", target=picture, task=row.task, inputs=inputs)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer to which every word of the world is one token; other words fall into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator([*vocabulary(), *letters], trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def build_deaf_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer that hears nothing: every text is its end token.

    The pipeline does not load without a third text encoder. Captions as short as these are told well enough by CLIP,
    and without T5's words a step of training has a quarter fewer tokens; Stable Diffusion 3 can do without T5 as well.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {"<pad>": 0, "</s>": 1, "<unk>": 2}
    tokenizer = Tokenizer(models.WordLevel(special, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=MAX_TOKENS
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A small CLIP text model, untrained; the pipeline reads the last layer but one and the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def meaning(target: Target) -> list[int]:
    """What a caption says, as class numbers: how many, how arranged, and colour and shape of two objects (0 for none).

    The objects of a relation come left before right and top before bottom, whichever way it was told.
    """
    objects = target["objects"]
    first, arrangement, second = target["relation"] or (0, "none", min(1, len(objects) - 1))
    if arrangement in ("right of", "below"):
        first, arrangement, second = second, OPPOSITE[arrangement], first
    numbers = [len(objects) - 1, ("none", "left of", "above").index(arrangement)]
    for k in (first, second) if len(objects) > 1 else (0, None):
        kind = None if k is None else objects[k]
        numbers.append(0 if kind is None else 1 + list(COLOURS).index(kind["colour"]))
        numbers.append(0 if kind is None else 1 + SHAPES.index(kind["shape"]))
    return numbers


MEANING_CLASSES = (3, 3, 1 + len(COLOURS), 1 + len(SHAPES), 1 + len(COLOURS), 1 + len(SHAPES))


def train_text_encoder(
    tokenizer: CLIPTokenizer, seed: int, name: str, steps: int, report: Report
) -> CLIPTextModelWithProjection:
    """Train a CLIP text model so that what a caption means can be read off linearly, where the pipeline reads it.

    That is: off the pooled output and, in the last layer but one, off the token at the caption's end.
    """
    torch.manual_seed(derive_seed(seed, name))
    encoder = build_text_encoder(tokenizer)
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, sum(MEANING_CLASSES)) for _ in range(2))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    choices = {task: [t for t in all_targets(task) if not is_held_out(t)] for task in TASKS}
    rng = np.random.default_rng(derive_seed(seed, name, "captions"))
    for step in range(steps):
        targets = [choices[task][rng.integers(len(choices[task]))] for task in rng.choice(TASKS, size=128)]
        ids = tokenizer([caption(t, rng) for t in targets], padding="max_length", return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        at_end = output.hidden_states[-2][torch.arange(len(ids)), ends]
        right = torch.tensor([meaning(t) for t in targets])
        loss = torch.zeros(())
        for head, vectors in zip(heads, (output.text_embeds, at_end), strict=True):
            for number, logits in enumerate(head(vectors).split(MEANING_CLASSES, dim=1)):
                loss = loss + nn.functional.cross_entropy(logits, right[:, number]) / (2 * len(MEANING_CLASSES))
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        report(step, {"error": loss.item()})
    return encoder.eval().requires_grad_(False)


def build_transformer() -> SD3Transformer2DModel:
    """The denoiser, untrained: 2.3 M parameters, 16 picture tokens."""
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIDE // FACTOR,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        num_attention_heads=4,
        attention_head_dim=WIDTH // 4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=SIDE // FACTOR // 2,
    )


def train_vae(seed: int, steps: int, report: Report) -> AutoencoderKL:
    """Train an autoencoder on drawn scenes and set its scaling and shift so that latents have mean 0 and std 1.

    ``report(step, losses)`` is called after every step.
    """
    from diffusers import AutoencoderKL

    rng = np.random.default_rng([seed, 1])
    targets = [row.target for row in read(CAPTIONS)]
    pictures = draw([place(targets[k % len(targets)], rng) for k in range(4096)], SIDE) * 2 - 1
    torch.manual_seed(derive_seed(seed, "vae"))
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)
    fit_autoencoder(
        vae,
        pictures,
        lambda latents: vae.decode(latents).sample,
        seed=seed,
        steps=steps,
        lr=3e-3,
        batch_size=16,
        absolute=1.0,
        kl=1e-3,
        report=report,
    )
    latents = mean_latents(vae, pictures[:1024], 128)
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae


def assemble(
    vae: AutoencoderKL, encoders: Sequence[CLIPTextModelWithProjection], seed: int
) -> StableDiffusion3Pipeline:
    """The pipeline with an untrained denoiser, from an autoencoder and the two CLIP text models."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    torch.manual_seed(derive_seed(seed, "components"))
    t5_tokenizer = build_deaf_tokenizer()
    t5_encoder = build_t5_encoder(t5_tokenizer, 2 * TEXT_WIDTH)
    t5_encoder.shared.weight.data.zero_()
    return StableDiffusion3Pipeline(
        transformer=build_transformer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=build_tokenizer(),
        text_encoder_2=encoders[1],
        tokenizer_2=build_tokenizer(),
        text_encoder_3=t5_encoder,
        tokenizer_3=t5_tokenizer,
    )


def main(out: Path, seed: int = 0, overrides: Sequence[str] = ()) -> None:
    """Build and train everything and write it to ``out``; the training run stays in ``out`` + ``-run``.

    ``overrides`` are of the config, as on the command line of ``mmrl train``.
    """
    from diffusers import DiffusionPipeline
    from rich.progress import Progress

    from mmrl.config import load_config
    from mmrl.run import train

    run = out.with_name(out.name + "-run")
    with Progress() as progress:

        def bar(name: str, steps: int) -> Report:
            task = progress.add_task(name, total=steps)
            return lambda step, losses: progress.update(task, completed=step + 1)

        vae = train_vae(seed, VAE_STEPS, bar("autoencoder", VAE_STEPS))
        encoders = [
            train_text_encoder(build_tokenizer(), seed, name, TEXT_STEPS, bar(name, TEXT_STEPS))
            for name in ("text_encoder", "text_encoder_2")
        ]
    assemble(vae, encoders, seed).save_pretrained(run / "start")
    config = load_config(CONFIG, [f"pipeline.model={run / 'start'}", f"run_dir={run}", f"seed={seed}", *overrides])
    summary = train(config)
    write(DiffusionPipeline.from_pretrained(summary["model"]), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), overrides=sys.argv[2:])
