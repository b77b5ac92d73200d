"""An exact judge of pictures: which shapes are in them, and how much of a request they fulfil.

In the manner of GenEval (arXiv:2310.11513): detect objects, then check shape, colour, count and position against the
request. Here the detector is no network: pixels take the nearest colour, connected pixels of one colour are an object,
and its shape is the template of the same area and centroid that overlaps it most.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mmrl.world.drawing import AREA, CENTROID, coverage
from mmrl.world.scenes import BACKGROUND, COLOURS, SHAPES, holds

MIN_AREA, MAX_AREA = 0.02, 0.20
"""Areas, as fractions of the picture, that an object can have; drawn ones have 0.04 to 0.15."""

MIN_OVERLAP = 0.70
"""Intersection over union with the best template below which an object has no shape."""

MAX_OBJECTS = 6
"""The largest objects that are looked at in one picture; more are only counted."""

MAX_RESIDUAL = 0.4
"""RGB distance from all mixtures of background and one paint beyond which a pixel is soiled: it is no object's."""

CLEAN = 0.9
"""Share of the painted area that must belong to objects; with less, the score falls in proportion."""

PARTS = ("colour", "shape", "count", "position")

_NAMES = tuple(COLOURS)
_GROUND = np.array(BACKGROUND, dtype=np.float32)
_TOWARDS = np.array([*COLOURS.values()], dtype=np.float32) - _GROUND
_SOILED, _BARE = len(_NAMES), len(_NAMES) + 1


@dataclass(frozen=True)
class Found:
    """A detected object: centre and half-side as fractions of the picture's side; ``shape`` "" when none fits.

    ``overlap`` is the intersection over union with the template of that shape.
    """

    shape: str
    colour: str
    x: float
    y: float
    size: float
    overlap: float


@dataclass(frozen=True)
class Detection:
    """What one picture shows.

    Attributes:
        objects: the objects of plausible size, largest first, at most ``MAX_OBJECTS``.
        count: how many objects of plausible size there are.
        clean: share of the painted area that belongs to them, in [0, 1]; 0 for an empty picture.
    """

    objects: tuple[Found, ...]
    count: int
    clean: float


def detect(pictures: Tensor) -> list[Detection]:
    """Detect the objects of ``[N, 3, S, S]`` pictures in [0, 1]."""
    rgb = pictures.detach().float().cpu().numpy()
    n, _, side, _ = rgb.shape
    colour, amount = _paints(rgb)
    painted = colour != _BARE
    labels = _components(colour, colour < _SOILED)

    area = np.bincount(labels.ravel(), minlength=labels.size)
    limits = MIN_AREA * side * side, MAX_AREA * side * side
    roots = np.flatnonzero((area >= limits[0]) & (area <= limits[1]))
    roots = roots[colour.ravel()[roots] < _SOILED]
    owner = roots // (side * side)
    order = np.lexsort((-area[roots], owner))
    roots, owner = roots[order], owner[order]
    count = np.bincount(owner, minlength=n)
    rank = np.arange(len(roots)) - (np.cumsum(count) - count)[owner]
    kept = rank < MAX_OBJECTS

    total = painted.reshape(n, -1).sum(1)
    clean = np.bincount(owner, weights=area[roots], minlength=n) / np.maximum(total, 1)
    found: list[list[Found]] = [[] for _ in range(n)]
    for k, item in zip(owner[kept], _describe(colour, amount, labels, roots[kept], owner[kept]), strict=True):
        found[k].append(item)
    return [Detection(tuple(f), int(c), float(p)) for f, c, p in zip(found, count, clean, strict=True)]


def _paints(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The paint of each pixel (an index into ``_NAMES``, ``_SOILED`` or ``_BARE``) and how much of it, in [0, 1].

    A pixel at an edge is part paint, part background, so a pixel is compared with the lines from the background to each
    paint: the nearest line tells the paint, the place on it the amount. Half or less counts as bare.
    """
    offset = rgb - _GROUND[:, None, None]
    square = (_TOWARDS**2).sum(1)
    cross = np.einsum("nchw,kc->nkhw", offset, _TOWARDS)
    along = np.clip(cross / square[:, None, None], 0, 1)
    residual = (offset**2).sum(1)[:, None] - 2 * along * cross + along**2 * square[:, None, None]
    colour = residual.argmin(1)
    amount = np.take_along_axis(along, colour[:, None], 1)[:, 0]
    far = np.take_along_axis(residual, colour[:, None], 1)[:, 0] > MAX_RESIDUAL**2
    colour[amount <= 0.5] = _BARE
    colour[far] = _SOILED
    return colour, amount


def _components(colour: np.ndarray, painted: np.ndarray) -> np.ndarray:
    """Label ``[N, S, S]`` of each pixel: the smallest flat index in its 4-connected region of one colour.

    Minima travel to neighbours and then along the pointers that they are, so that long winding regions take few rounds.
    """
    labels = np.arange(colour.size).reshape(colour.shape)
    down = (colour[:, 1:] == colour[:, :-1]) & painted[:, 1:]
    right = (colour[:, :, 1:] == colour[:, :, :-1]) & painted[:, :, 1:]
    while True:
        new = labels.copy()
        for joined, a, b in ((down, new[:, :-1], new[:, 1:]), (right, new[:, :, :-1], new[:, :, 1:])):
            low = np.where(joined, np.minimum(a, b), labels.size)
            np.minimum(a, low, out=a)
            np.minimum(b, low, out=b)
        new = new.ravel()[new]
        if np.array_equal(new, labels):
            return labels
        labels = new


def _describe(
    colour: np.ndarray, amount: np.ndarray, labels: np.ndarray, roots: np.ndarray, owner: np.ndarray
) -> list[Found]:
    """Shape, place and size of the objects with the labels ``roots`` in the pictures ``owner``."""
    if not len(roots):
        return []
    side = colour.shape[-1]
    mask = labels[owner] == roots[:, None, None]
    fringe = _grow(mask) & (colour[owner] == _BARE)
    amount = np.where(mask | fringe, amount[owner], 0.0)

    grid = (np.arange(side) + 0.5) / side
    weight = np.maximum(amount.sum((1, 2)), 1e-6)
    cx = (amount.sum(1) * grid).sum(1) / weight
    cy = (amount.sum(2) * grid).sum(1) / weight
    area = weight / side**2
    sizes = {s: np.sqrt(area / AREA[s]) for s in SHAPES}
    overlaps = []
    for s in SHAPES:
        top = cy - CENTROID[s] * sizes[s]
        template = coverage(s, cx[:, None, None], top[:, None, None], sizes[s][:, None, None], side)
        overlaps.append(np.minimum(template, amount).sum((1, 2)) / np.maximum(template, amount).sum((1, 2)))
    best = np.argmax(overlaps, 0)
    items = []
    for k, b in enumerate(best):
        shape, overlap = SHAPES[b], float(overlaps[b][k])
        size = float(sizes[shape][k])
        items.append(
            Found(
                shape=shape if overlap >= MIN_OVERLAP else "",
                colour=_NAMES[colour.flat[roots[k]]],
                x=float(cx[k]),
                y=float(cy[k] - CENTROID[shape] * size),
                size=size,
                overlap=overlap,
            )
        )
    return items


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its 8 neighbours."""
    grown = mask.copy()
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    wide = grown.copy()
    wide[:, :, 1:] |= grown[:, :, :-1]
    wide[:, :, :-1] |= grown[:, :, 1:]
    return wide


def judge(detection: Detection, target: Mapping[str, Any]) -> dict[str, float]:
    """Marks in [0, 1] for each of ``PARTS`` that the target has.

    The required objects are matched with detected ones so as to give the best marks. Colour and shape are the shares
    of right ones, out of the required or the detected number, whichever is larger: painting more objects never helps.
    Position is only marked when the target has a relation and both its objects have the right colour. Every part is
    multiplied by the cleanliness of the picture.
    """
    wanted = target["objects"]
    number = max(len(wanted), detection.count)
    clean = min(1.0, detection.clean / CLEAN)
    best: dict[str, float] = {}
    slots = [*detection.objects, *[None] * len(wanted)]
    for chosen in itertools.permutations(range(len(slots)), len(wanted)):
        match = [slots[i] for i in chosen]
        marks = {
            "colour": sum(f is not None and f.colour == w["colour"] for f, w in zip(match, wanted, strict=True))
            / number,
            "shape": sum(f is not None and f.shape == w["shape"] for f, w in zip(match, wanted, strict=True)) / number,
        }
        if target.get("relation"):
            marks["position"] = float(_placed(match, wanted, target["relation"]))
        if not best or sum(marks.values()) > sum(best.values()):
            best = marks
    best["count"] = 1 - abs(len(wanted) - detection.count) / number
    return {part: best[part] * clean for part in PARTS if part in best}


def _placed(match: Sequence[Found | None], wanted: Sequence[Mapping[str, str]], relation: Any) -> bool:
    i, name, j = relation
    a, b = match[i], match[j]
    if a is None or b is None or a.colour != wanted[i]["colour"] or b.colour != wanted[j]["colour"]:
        return False
    return holds(name, (a.x, a.y), (b.x, b.y))


def score(pictures: Tensor, targets: Sequence[Mapping[str, Any]], strict: bool = False) -> list[float]:
    """How well each picture ``[N, 3, S, S]`` shows its target, in [0, 1].

    Graded: the mean of the marks of :func:`judge`. Strict: 1 if all of them are 1, else 0.
    """
    marks = [judge(d, t) for d, t in zip(detect(pictures), targets, strict=True)]
    if strict:
        return [float(all(v == 1 for v in m.values())) for m in marks]
    return [sum(m.values()) / len(m) for m in marks]
