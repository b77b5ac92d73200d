"""Pictures of the shape world with the flaws that a half-trained generator makes, for training judges on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmrl.world import Object, Scene, draw, place
from mmrl.world.scenes import COLOURS, MAX_SIZE, MIN_SIZE, SHAPES

FLAWS = ("none", "mix", "halves", "repaint", "morph", "smear", "crowd", "lose")
SHARES = (0.44, 0.08, 0.08, 0.08, 0.08, 0.08, 0.08, 0.08)


def flawed(targets: Sequence[dict[str, Any]], side: int, rng: np.random.Generator) -> Tensor:
    """A picture ``[N, 3, side, side]`` in [0, 1] per target: almost half show it, the others have a flaw.

    The flaws: mixed with a scene of another of the targets, half of it from there, objects in two colours or between
    two shapes, smeared, with an extra object, with one missing. Half of all are also blurred, tinted or noisy.
    """
    scenes = [place(target, rng) for target in targets]
    flaws = rng.choice(FLAWS, size=len(scenes), p=SHARES)
    partners = rng.permutation(len(scenes))
    second = [_partner(scene, flaw, scenes[k], rng) for scene, flaw, k in zip(scenes, flaws, partners, strict=True)]
    pictures, others = draw(scenes, side), draw(second, side)
    for k, flaw in enumerate(flaws):
        if flaw in ("mix", "morph"):
            pictures[k] = torch.lerp(pictures[k], others[k], float(rng.uniform(0.1, 0.9)))
        elif flaw in ("halves", "repaint"):
            pictures[k] = torch.where(_half_plane(scenes[k], side, rng), pictures[k], others[k])
        elif flaw == "smear":
            pictures[k] = _smear(pictures[k], rng)
        elif flaw in ("crowd", "lose"):
            pictures[k] = others[k]
        pictures[k] = _degrade(pictures[k], rng)
    return pictures


def _partner(scene: Scene, flaw: str, other: Scene, rng: np.random.Generator) -> Scene:
    """The scene whose picture is combined with that of ``scene`` to make the flaw."""
    if flaw in ("mix", "halves"):
        return other
    objects = list(scene.objects)
    if flaw == "repaint":
        objects = [replace(o, colour=str(rng.choice(list(COLOURS)))) for o in objects]
    elif flaw == "morph":
        objects = [replace(o, shape=str(rng.choice(SHAPES))) for o in objects]
    elif flaw == "crowd":
        x, y = rng.uniform(MAX_SIZE, 1 - MAX_SIZE, 2)
        kind = objects[0] if rng.random() < 0.5 else other.objects[0]
        objects.append(Object(kind.shape, kind.colour, float(x), float(y), float(rng.uniform(MIN_SIZE, MAX_SIZE))))
    elif flaw == "lose":
        objects.pop(int(rng.integers(len(objects))))
    return replace(scene, objects=tuple(objects))


def _half_plane(scene: Scene, side: int, rng: np.random.Generator) -> Tensor:
    """True on one side of a random line through one of the objects."""
    o = scene.objects[rng.integers(len(scene.objects))]
    angle = rng.uniform(0, 2 * np.pi)
    grid = (torch.arange(side) + 0.5) / side
    return (grid - o.x) * float(np.cos(angle)) + (grid[:, None] - o.y) * float(np.sin(angle)) > 0


def _smear(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """The mean of up to eight copies, each shifted one pixel further."""
    reach, across = int(rng.integers(2, 9)), bool(rng.random() < 0.5)
    padded = F.pad(picture[None], (reach,) * 4, mode="replicate")[0]
    side = picture.shape[-1]
    shifts = [padded[:, reach:, k:] if across else padded[:, k:, reach:] for k in range(reach)]
    return torch.stack([s[:, :side, :side] for s in shifts]).mean(0)


def _degrade(picture: Tensor, rng: np.random.Generator) -> Tensor:
    """Blur as by an autoencoder, blotches, a tint and noise, each sometimes."""
    side = picture.shape[-1]
    if rng.random() < 0.5:
        return picture
    if rng.random() < 0.5:
        small = F.interpolate(picture[None], int(rng.integers(side // 3, side)), mode="bilinear", antialias=True)
        picture = F.interpolate(small, side, mode="bicubic")[0]
    if rng.random() < 0.3:
        cells = int(rng.integers(2, side // 2))
        blotches = torch.from_numpy(rng.normal(0, rng.uniform(0.02, 0.2), (1, 3, cells, cells))).float()
        picture = picture + F.interpolate(blotches, side, mode="bicubic")[0]
    if rng.random() < 0.5:
        picture = picture + torch.from_numpy(rng.normal(0, 0.04, (3, 1, 1))).float()
    if rng.random() < 0.3:
        picture = picture + torch.from_numpy(rng.normal(0, rng.uniform(0.01, 0.12), picture.shape)).float()
    return picture.clamp(0, 1)
