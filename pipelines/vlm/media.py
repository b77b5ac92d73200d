"""Pictures and clips of prompts: opened once, processed once per content, named by it."""

from __future__ import annotations

import contextlib
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import located
from mmrl.media import open_clip, open_picture


@dataclass(eq=False)
class Media:
    """The processed pictures and clips of a prompt; prompts with the same pictures share one.

    Attributes:
        tensors: what the processor made of them: ``pixel_values``, ``image_grid_thw`` and so on.
        images, videos: how many.
        clips_as_pictures: the place holders of clips are those of pictures.
        features: per modality the output of the vision tower, kept while the tower does not train.
    """

    tensors: dict[str, Any]
    images: int = 0
    videos: int = 0
    clips_as_pictures: bool = False
    features: dict[str, Any] | None = field(default=None, repr=False)


def content_key(opened: Any) -> str:
    """Name of an opened picture or clip by its content."""
    digest = hashlib.blake2b(digest_size=16)
    for picture in opened if isinstance(opened, list) else [opened]:
        if isinstance(picture, str):
            stat = Path(picture).stat()
            digest.update(f"{picture} {stat.st_mtime_ns} {stat.st_size}".encode())
        else:
            digest.update(repr(picture.size).encode())
            digest.update(picture.tobytes())
    return digest.hexdigest()


class Shelf:
    """What one batch of prompts has opened and processed, so that nothing is done twice.

    Args:
        counters: ``images_processed`` and ``videos_processed`` count up here.
    """

    def __init__(self, counters: Counter):
        self.counters = counters
        self.media: dict[Any, Media] = {}
        self._opened: dict[Any, Any] = {}
        self._keys: dict[int, str] = {}
        self._outputs: dict[Any, Any] = {}

    def picture(self, value: Any, row: str) -> Any:
        """The opened picture; equal contents give the same object."""
        return self._open(value, row, open_picture)

    def clip(self, value: Any, row: str) -> Any:
        """The opened clip; equal contents give the same object."""
        return self._open(value, row, open_clip)

    def key(self, opened: Any) -> str:
        """The content's name of something this shelf opened."""
        return self._keys[id(opened)]

    def _open(self, value: Any, row: str, open_it: Any) -> Any:
        place = str(value) if isinstance(value, (str, Path)) else None
        if place is not None and place in self._opened:
            return self._opened[place]
        with located(f"row '{row}'"):
            opened = open_it(value)
        key = content_key(opened)
        opened = self._opened.setdefault((open_it, key), opened)
        self._keys[id(opened)] = key
        if place is not None:
            self._opened[place] = opened
        return opened

    @contextlib.contextmanager
    def in_processor(self, processor: Any) -> Iterator[None]:
        """Inside, the processor's image and video parts process each content once while this shelf lives."""
        parts = {name: getattr(processor, name, None) for name in ("image_processor", "video_processor")}
        parts = {name: part for name, part in parts.items() if part is not None}
        for name, part in parts.items():
            setattr(processor, name, _Remembering(part, self, "images" if name == "image_processor" else "videos"))
        try:
            yield
        finally:
            for name, part in parts.items():
                setattr(processor, name, part)

    def output(self, part: Any, kind: str, opened: Any, kwargs: Mapping[str, Any]) -> Any:
        """What ``part`` makes of nested lists of things this shelf opened."""
        flat = list(_flat(opened, self._keys))
        if any(id(item) not in self._keys for item in flat):
            return part(opened, **kwargs)
        key = (kind, tuple(self._keys[id(item)] for item in flat), repr(sorted(kwargs.items(), key=str)))
        if key not in self._outputs:
            self._outputs[key] = part(opened, **kwargs)
            self.counters[f"{kind}_processed"] += len(flat)
        found = self._outputs[key]
        return type(found)(dict(found))


class _Remembering:
    """Stands in for a part of a processor; everything but the call is the part's own."""

    def __init__(self, part: Any, shelf: Shelf, kind: str):
        self._part, self._shelf, self._kind = part, shelf, kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)

    def __call__(self, opened: Any, **kwargs: Any) -> Any:
        return self._shelf.output(self._part, self._kind, opened, kwargs)


def processed_sizes(processor: Any, tensors: Mapping[str, Any], pictures: Sequence[Any]) -> list[tuple[int, int]]:
    """(height, width) of each picture as the model sees it.

    Pictures that the processor cuts into tiles keep their own size: coordinates then refer to the whole picture.
    """
    if not pictures:
        return []
    grid = tensors.get("image_grid_thw")
    if grid is not None:
        patch = getattr(processor.image_processor, "patch_size", 14)
        patch = patch.get("height", 14) if isinstance(patch, Mapping) else patch
        return [(int(h) * patch, int(w) * patch) for _, h, w in grid.tolist()]
    pixels, sizes = tensors.get("pixel_values"), tensors.get("image_sizes")
    if isinstance(pixels, Tensor) and pixels.ndim == 4 and len(pixels) == len(pictures):
        if sizes is not None:
            return [(int(h), int(w)) for h, w in sizes.tolist()]
        return [tuple(pixels.shape[-2:])] * len(pictures)
    return [(picture.height, picture.width) for picture in pictures]


def _flat(opened: Any, known: Mapping[int, str]) -> Iterator[Any]:
    if isinstance(opened, (list, tuple)) and id(opened) not in known:
        for item in opened:
            yield from _flat(item, known)
    else:
        yield opened


def moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors on ``device``, those of real numbers in ``dtype``."""
    if not isinstance(value, Tensor):
        return value
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)
