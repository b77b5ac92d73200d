"""Trains the quickstart's picture-text model: a real CLIPModel of the shape world in one megabyte.

    python -m rewards.quickstart.clip_shapes OUT_DIR

It is the differentiable reward of the quickstart, ``{type: clip, model: "builtin:clip-shapes"}``, and never sees the
held-out targets. Training is contrastive in both directions (arXiv:2103.00020). Three things differ from plain CLIP:

* The captions of a batch are about five kinds of objects, so each is a hard negative of many others.
* Most pictures are flawed and show several captions a little. The labels are therefore not one-hot but the softmax of
  the marks of the exact verifier.
* Some pictures have been changed to raise the model's own similarity with a caption and then marked by the verifier. A
  reward that is differentiated through would otherwise be raised by changes that nobody sees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrl.seeding import derive_seed, generator
from mmrl.world import detect
from mmrl.world.captions import (
    ASKED_COLOURS,
    ASKED_SHAPES,
    KINDS,
    TASKS,
    Target,
    all_targets,
    caption,
    is_held_out,
    key_of,
    vocabulary,
)
from mmrl.world.verify import judge
from rewards.quickstart.flawed_pictures import flawed

if TYPE_CHECKING:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

SIDE = 32
PATCH = 8
WIDTH = 128
LAYERS = 4
TEXT_WIDTH = 96
MAX_TOKENS = 16
MEAN, STD = 0.85, 0.25
"""Of the pixels, for the image processor; close to the pale background."""

PICTURES = 80
TASK_CAPTIONS = {"single": 5, "count": 5, "pair": 6, "relation": 16}
"""Captions of each task in a batch."""

LABEL_TEMPERATURE = 0.05
FOOLED_FROM, FOOLED_EVERY = 0.4, 6
"""After that share of the steps, the pictures of every sixth batch are changed to raise the model's score."""


@dataclass(frozen=True)
class Batch:
    """Pictures ``[N, 3, SIDE, SIDE]``, targets (M) and how well each picture shows each target, ``[N, M]``."""

    pictures: Tensor
    targets: list[Target]
    marks: Tensor


def marks_of(pictures: Tensor, targets: list[Target]) -> Tensor:
    """The verifier's graded score of each picture for each target, ``[N, M]`` in [0, 1]."""
    rows = [[judge(found, target).values() for target in targets] for found in detect(pictures)]
    return torch.tensor([[sum(marks) / len(marks) for marks in row] for row in rows])


def random_batch(rng: np.random.Generator) -> Batch:
    """Training targets about five kinds of objects, two colours and two shapes and one more, and flawed pictures."""
    colours, shapes = rng.choice(ASKED_COLOURS, 2, replace=False), rng.choice(ASKED_SHAPES, 2, replace=False)
    kinds = [{"colour": str(c), "shape": str(s)} for c in colours for s in shapes]
    kinds.append(KINDS[rng.integers(len(KINDS))])
    targets: list[Target] = []
    for task in TASKS:
        possible = [t for t in all_targets(task) if not is_held_out(t) and all(o in kinds for o in t["objects"])]
        # All that is asked of the same two objects stays together: "left of" is the hard negative of "right of".
        order = {key: rng.random() for key in sorted({_objects_of(t) for t in possible})}
        targets += sorted(possible, key=lambda t, order=order: order[_objects_of(t)])[: TASK_CAPTIONS[task]]
    shown = [targets[k] for k in rng.integers(len(targets), size=PICTURES)]
    pictures = flawed(shown, SIDE, rng)
    return Batch(pictures, targets, marks_of(pictures, targets))


def _objects_of(target: Target) -> str:
    return key_of({"objects": target["objects"], "relation": None})


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer to which every word of the world is one token; other words fall into letters."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: dict[tuple[str, str], None] = {}
    # Long words first: merges of short ones ("re" of "red") would otherwise tear them ("th", "re", "e").
    for word in sorted(vocabulary(), key=len, reverse=True):
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges[left, right] = None
            left += right
    tokens = ["<|startoftext|>", "<|endoftext|>", *alphabet, *(letter + "</w>" for letter in alphabet)]
    tokens = dict.fromkeys([*tokens, *(left + right for left, right in merges)])
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=list(merges), model_max_length=MAX_TOKENS)


def build_processor() -> CLIPImageProcessor:
    """Resizes to ``SIDE`` and normalises."""
    from transformers import CLIPImageProcessor

    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3)


def build_model(tokenizer: CLIPTokenizer, seed: int) -> CLIPModel:
    """The untrained model, 0.7 M parameters."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": 2 * TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "weights"))
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
        # CLIP's tiny initial embeddings would drown in what attention adds; these learn much faster.
        words, patches = model.text_model.embeddings, model.vision_model.embeddings
        nn.init.normal_(words.token_embedding.weight, std=1.0)
        nn.init.normal_(words.position_embedding.weight, std=0.5)
        nn.init.normal_(patches.patch_embedding.weight, std=patches.patch_embedding.weight[0].numel() ** -0.5)
    with torch.no_grad():
        patches.position_embedding.weight[1:] = _waves(SIDE // PATCH, WIDTH)
    return model


def _waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the row and of the column, ``[side * side, width]``."""
    place = torch.outer(torch.arange(side) + 0.5, torch.arange(1, width // 4 + 1) * torch.pi / (2 * side))
    place = torch.cat([place.sin(), place.cos()], 1)
    rows, columns = place[:, None].expand(side, side, -1), place[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).reshape(side * side, width)


def image_features(model: CLIPModel, pictures: Tensor) -> Tensor:
    """Unit vectors of pictures in [0, 1]."""
    pooled = model.vision_model((pictures - MEAN) / STD).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Unit vectors of texts."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    return F.normalize(model.text_projection(model.text_model(**tokens).pooler_output), dim=-1)


def contrast(logits: Tensor, marks: Tensor) -> Tensor:
    """How far the model is from the verifier: KL divergence of the softmax over captions plus that over pictures.

    With one-hot labels it would be CLIP's loss (twice). Both arguments ``[N, M]``; 0 when the logits are the marks over
    ``LABEL_TEMPERATURE``, up to a constant.
    """
    labels = marks / LABEL_TEMPERATURE
    parts = (
        F.kl_div(logits.log_softmax(dim), labels.log_softmax(dim), reduction="none", log_target=True).sum(dim).mean()
        for dim in (0, 1)
    )
    return torch.stack(list(parts)).sum()


def fooling(model: CLIPModel, texts: Tensor, batch: Batch, rng: np.random.Generator) -> Batch:
    """The pictures of a batch after a few steps up the similarity with one of its captions, marked anew.

    The change is smooth or fine, small or large, at random; it may or may not make the picture show the caption.
    """
    cells = int(rng.choice([4, 8, 16, SIDE]))
    size = float(rng.uniform(0.02, 0.1))
    wanted = texts[torch.from_numpy(rng.integers(len(texts), size=len(batch.pictures)))]
    change = torch.zeros(len(batch.pictures), 3, cells, cells)

    def changed() -> Tensor:
        return (batch.pictures + F.interpolate(change, SIDE, mode="bicubic")).clamp(0, 1)

    for _ in range(4):
        change.requires_grad_(True)
        (gradient,) = torch.autograd.grad((image_features(model, changed()) * wanted).sum(), change)
        change = change.detach() + size * gradient / gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
    pictures = changed().detach()
    return Batch(pictures, batch.targets, marks_of(pictures, batch.targets))


def augment(pictures: Tensor, draws: torch.Generator) -> Tensor:
    """A shift by up to a pixel, the same for all, a slight tint and up to 5% of noise."""
    top, left = torch.randint(3, (2,), generator=draws).tolist()
    pictures = F.pad(pictures, (1, 1, 1, 1), mode="replicate")[:, :, top : top + SIDE, left : left + SIDE]
    strength = 0.05 * torch.rand(len(pictures), 1, 1, 1, generator=draws)
    noise = strength * torch.randn(pictures.shape, generator=draws)
    tint = 0.02 * torch.randn(len(pictures), 3, 1, 1, generator=draws)
    return (pictures + tint + noise).clamp(0, 1)


def train(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    pool: list[Batch],
    steps: int,
    seed: int,
    report: Callable[[int, float], None],
    lr: float = 1.5e-3,
) -> None:
    """Train in place, going round the pool. ``report(step, loss)`` is called after every step."""
    pool = list(pool)
    rng = np.random.default_rng([seed, 2])
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        place = step % len(pool)
        texts = text_features(model, tokenizer, [caption(t, rng) for t in pool[place].targets])
        if step >= FOOLED_FROM * steps and step % FOOLED_EVERY == 0:
            pool[place] = fooling(model, texts.detach(), pool[place], rng)
        pictures = augment(pool[place].pictures, generator(seed, "augment", step))
        logits = model.logit_scale.exp() * image_features(model, pictures) @ texts.T
        loss = contrast(logits, pool[place].marks)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        report(step, loss.item())


def main(out: Path, seed: int = 0, batches: int = 479, steps: int = 2600) -> None:
    """Train the model and write it to ``out`` with tokenizer and image processor, in half precision."""
    from rich.progress import Progress

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    with Progress() as progress:
        drawing = progress.add_task("pictures", total=batches)
        pool = []
        for k in range(batches):
            pool.append(random_batch(np.random.default_rng([seed, 1, k])))
            progress.advance(drawing)
        training = progress.add_task("training", total=steps)

        def report(step: int, loss: float) -> None:
            progress.update(training, completed=step + 1, description=f"training, loss {loss:.2f}")

        train(model, tokenizer, pool, steps, seed, report)
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    build_processor().save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
