"""What both sides of ``vlm_step.py`` share: saved tiny weights, rows of pictures and questions, a reward, counters."""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from mmrl.media import to_pil
from mmrl.world.captions import PLURALS, all_targets
from mmrl.world.drawing import draw
from mmrl.world.scenes import place

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from zoo.vlms import build_vlm


def save_model(folder: Path, seed: int = 0) -> None:
    """A random Qwen2.5-VL of 0.2 M parameters with its processor, as ``from_pretrained`` takes them."""
    model, processor = build_vlm("qwen2_5_vl", seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_model(folder: Path) -> tuple[Any, Any]:
    """Model and processor of :func:`save_model`."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, AutoProcessor.from_pretrained(folder, padding_side="left")


def write_rows(folder: Path, count: int, side: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` questions, each about a picture of its own, drawn and saved as PNG: ``{"text", "image", "answer"}``."""
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "rows.json"
    if index.is_file():
        return json.loads(index.read_text(encoding="utf-8"))
    rng = np.random.default_rng(seed)
    targets = all_targets("relation")
    rows = []
    for number in range(count):
        target = targets[int(rng.integers(len(targets)))]
        thing = target["objects"][number % 2]
        path = folder / f"{number:03d}.png"
        to_pil(draw([place(target, rng)], side)[0]).save(path)
        # Questions of unequal length, so that prompts need padding.
        text = f"Where is the {thing['colour']} {thing['shape']}?"
        if number % 2:
            text = f"How many {PLURALS[thing['shape']]} are there? Count those that are {thing['colour']}."
        rows.append({"text": text, "image": str(path), "answer": thing["colour"]})
    index.write_text(json.dumps(rows), encoding="utf-8")
    return rows


def score(text: str) -> float:
    """A cheap reward that nearly never ties, so that every group has a signal."""
    return sum(ord(letter) % 17 for letter in text) / (16 * max(len(text), 1)) + len(text) / 1000


class Work:
    """Counts what is done to pictures and prompts while it watches a model and an image processor.

    Keys: ``pictures decoded`` (PNG), ``pictures processed``, ``encoded, sampling`` and ``encoded, update`` (pictures
    through the vision tower), ``prefill rows`` (rows of a prompt that is run without gradient), ``decode calls`` (runs
    of one token a row), ``update rows`` and ``update tokens`` (rows and padded tokens of the language model's runs with
    gradient).
    """

    def __init__(self) -> None:
        self.counts: Counter = Counter()

    @contextlib.contextmanager
    def watching(self, model: Any, processor: Any) -> Iterator[None]:
        """Count inside, from zero."""
        from PIL.PngImagePlugin import PngImageFile

        self.counts.clear()
        backend = type(processor.image_processor)
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._counted(PngImageFile, "load_prepare", lambda *_: {"pictures decoded": 1}))
            stack.enter_context(
                self._counted(backend, "_preprocess", lambda _, images, *a: {"pictures processed": len(images)})
            )
            for module, count in (
                (model.model.visual, self._encoded),
                (model.model.language_model, self._run),
            ):
                handle = module.register_forward_pre_hook(self._hook(count), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    @contextlib.contextmanager
    def _counted(self, owner: Any, name: str, count: Any) -> Iterator[None]:
        function = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts.update(count(*args, *kwargs.values()))
            return function(*args, **kwargs)

        with mock.patch.object(owner, name, counted):
            yield

    def _hook(self, count: Any) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict) -> None:
            self.counts.update(count(args, kwargs))

        return hook

    def _encoded(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, int]:
        grid = kwargs.get("grid_thw", args[1] if len(args) > 1 else None)
        return {"encoded, update" if torch.is_grad_enabled() else "encoded, sampling": len(grid)}

    def _run(self, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, int]:
        rows, tokens = kwargs["inputs_embeds"].shape[:2]
        if torch.is_grad_enabled():
            return {"update rows": rows, "update tokens": rows * tokens}
        return {"decode calls": 1} if tokens == 1 else {"prefill rows": rows}
