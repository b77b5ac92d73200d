"""Self-supervised tasks with exact answers, from any folder of pictures or from drawn scenes.

    data: {prompts: "mmrl.world.puzzles:jigsaw", options: {folder: photos, count: 2000, rows: 3, columns: 3}}

* :func:`jigsaw`: put shuffled tiles in order (Visual Jigsaw, arXiv 2509.25190); for the reward ``permutation``;
* :func:`rotation`: by how much a picture was turned (SSL4RL, arXiv 2510.16416); for the reward ``number``;
* :func:`masked_patch`: which piece was cut out; for the reward ``choice``.

The ``task`` of a row is the function's name, so that one run can mix them. Only puzzles with a single right answer are
made: pictures whose tiles, turns or pieces look alike are passed over. Row k depends on the seed and k alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrl.errors import UserError
from mmrl.world.drawing import draw
from mmrl.world.scenes import COLOURS, SHAPES, Object, Scene

if TYPE_CHECKING:
    from PIL.Image import Image

Count = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=16)]

APART = 0.02
"""Mean difference of the pixels, in [0, 1], from which on two pieces are told apart."""

TRIES = 200
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
HIDDEN = (127, 127, 127)


def jigsaw(
    folder: str | None = None,
    count: Count = 256,
    rows: Annotated[int, Field(ge=1)] = 3,
    columns: Annotated[int, Field(ge=1)] = 3,
    layout: Literal["mosaic", "tiles"] = "mosaic",
    side: Side = 192,
    seed: Seed = 0,
    save_to: str | None = None,
) -> Iterator[dict[str, Any]]:
    """Shuffled tiles. The target lists, for the places of the true picture in reading order, which tile belongs there.

    Tiles are numbered from 1, in the order in which they are shown.

    Args:
        folder: of pictures; None draws scenes of shapes.
        count: rows. Pictures come again with other crops when there are fewer.
        rows, columns: of the grid, together at least two tiles.
        layout: "mosaic" shows the tiles in one picture, in the grid; "tiles" one picture each.
        side: of the square picture, in pixels, at most; a multiple of the grid is taken.
        seed: of everything.
        save_to: folder for the pictures, so that rows hold paths; None keeps the pictures in memory.

    Raises:
        UserError: no or broken pictures, or none of which all tiles differ.
    """
    tiles = rows * columns
    if tiles < 2:
        raise UserError(
            f"a jigsaw of {rows} by {columns} has nothing to order: rows and columns should give two or more"
        )
    height, width = side // rows * rows, side // columns * columns
    ask = (
        "The picture shows the tiles of another picture in the wrong order"
        if layout == "mosaic"
        else "The pictures are the tiles of one picture in the wrong order"
    )
    text = (
        f"{ask}; it had {rows} rows and {columns} columns. The tiles are numbered from 1 to {tiles}"
        + (", from left to right and from top to bottom" if layout == "mosaic" else " in the order shown")
        + ". Which tile belongs in each place of the true picture, from left to right and from top to bottom? "
        f"Answer with {tiles} numbers separated by commas."
    )
    source = _Source(folder, seed, "jigsaw")
    for number in range(count):
        rng, picture = source.find(number, (height, width), lambda p: distinct(_cut(p, rows, columns)))
        order = rng.permutation(tiles)
        while np.array_equal(order, np.arange(tiles)):
            order = rng.permutation(tiles)
        pieces = _cut(picture, rows, columns)
        shown = [pieces[place] for place in order]
        images = [_joined(shown, rows, columns)] if layout == "mosaic" else shown
        yield _row("jigsaw", number, seed, text, images, (np.argsort(order) + 1).tolist(), save_to)


def rotation(
    folder: str | None = None, count: Count = 256, side: Side = 192, seed: Seed = 0, save_to: str | None = None
) -> Iterator[dict[str, Any]]:
    """Pictures turned clockwise by 0, 90, 180 or 270 degrees, which is the target.

    Args: as for :func:`jigsaw`. Drawn scenes have upright triangles, without which no side would be up.

    Raises:
        UserError: no or broken pictures, or none that looks different when turned.
    """
    text = "By how many degrees was the picture turned clockwise? Answer with 0, 90, 180 or 270."
    source = _Source(folder, seed, "rotation")
    for number in range(count):
        rng, picture = source.find(number, (side, side), lambda p: distinct([np.rot90(p, k) for k in range(4)]))
        quarter = int(rng.integers(4))
        turned = np.ascontiguousarray(np.rot90(picture, -quarter))
        yield _row("rotation", number, seed, text, [turned], 90 * quarter, save_to)


def masked_patch(
    folder: str | None = None,
    count: Count = 256,
    choices: Annotated[int, Field(ge=2, le=8)] = 4,
    grid: Annotated[int, Field(ge=2)] = 4,
    side: Side = 192,
    seed: Seed = 0,
    save_to: str | None = None,
) -> Iterator[dict[str, Any]]:
    """A picture with a grey square, then pieces A, B, C...: the target is the letter of the piece that was there.

    Args:
        choices: pieces to choose from; the wrong ones are from other places of the picture.
        grid: the square is one of ``grid`` by ``grid``.
        folder, count, side, seed, save_to: as for :func:`jigsaw`.

    Raises:
        UserError: no or broken pictures, or none with so many pieces that differ.
    """
    letters = [chr(ord("A") + k) for k in range(choices)]
    text = (
        f"A square was cut out of the first picture. The others are the pieces {', '.join(letters)}, in this order. "
        "Which piece belongs there? Answer with its letter."
    )
    side = side // grid * grid
    source = _Source(folder, seed, "masked_patch")
    for number in range(count):
        chosen: list[int] = []

        def choose(picture: np.ndarray, chosen: list[int] = chosen, number: int = number) -> bool:
            chosen[:] = _apart(_cut(picture, grid, grid), choices, np.random.default_rng([seed, number, 7]))
            return len(chosen) == choices

        rng, picture = source.find(number, (side, side), choose)
        pieces = _cut(picture, grid, grid)
        right = int(rng.integers(choices))
        wrong = iter(chosen[1:])
        places = [chosen[0] if k == right else next(wrong) for k in range(choices)]
        holed = picture.copy()
        top, left = (part * (side // grid) for part in divmod(chosen[0], grid))
        holed[top : top + side // grid, left : left + side // grid] = HIDDEN
        images = [holed, *(pieces[place] for place in places)]
        yield _row("masked_patch", number, seed, text, images, letters[right], save_to)


def distinct(pieces: Sequence[np.ndarray]) -> bool:
    """Whether every two pieces ``[H, W, 3]`` (uint8) of equal size are :data:`APART`."""
    return all(_difference(a, b) > APART for a, b in itertools.combinations(pieces, 2))


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(np.int16) - b.astype(np.int16)).mean() / 255)


def _apart(pieces: Sequence[np.ndarray], wanted: int, rng: np.random.Generator) -> list[int]:
    """Up to ``wanted`` pieces that all differ, in random order; the first is not plain, so that it can be placed."""
    found: list[int] = []
    for place in rng.permutation(len(pieces)).tolist():
        if not found and pieces[place].std() / 255 < APART:
            continue
        if all(_difference(pieces[place], pieces[other]) > APART for other in found):
            found.append(place)
        if len(found) == wanted:
            break
    return found


def _cut(picture: np.ndarray, rows: int, columns: int) -> list[np.ndarray]:
    """Tiles in reading order."""
    return [tile for band in np.split(picture, rows, axis=0) for tile in np.split(band, columns, axis=1)]


def _joined(tiles: Sequence[np.ndarray], rows: int, columns: int) -> np.ndarray:
    bands = [np.concatenate(tiles[row * columns : (row + 1) * columns], axis=1) for row in range(rows)]
    return np.concatenate(bands, axis=0)


def _row(
    task: str, number: int, seed: int, text: str, images: Sequence[np.ndarray], target: Any, save_to: str | None
) -> dict[str, Any]:
    from PIL import Image

    name = f"{task}-{seed}-{number}"
    pictures: list[Any] = [Image.fromarray(np.ascontiguousarray(image)) for image in images]
    if save_to is not None:
        folder = Path(save_to)
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}-{k}.png" for k in range(len(pictures))]
        for picture, path in zip(pictures, paths, strict=True):
            picture.save(path)
        pictures = [str(path.resolve()) for path in paths]
    return {"id": name, "task": task, "text": text, "images": pictures, "target": target}


class _Source:
    """Pictures ``[H, W, 3]`` (uint8): square crops from a folder, or drawn scenes."""

    def __init__(self, folder: str | None, seed: int, task: str):
        self.seed, self.task = seed, task
        self.paths: list[Path] = []
        if folder is None:
            return
        if not Path(folder).is_dir():
            raise UserError(f"{task}: there is no folder '{folder}'")
        self.paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise UserError(f"{task}: folder '{folder}' has no pictures ({', '.join(SUFFIXES)})")

    def find(
        self, number: int, size: tuple[int, int], good: Callable[[np.ndarray], bool]
    ) -> tuple[np.random.Generator, np.ndarray]:
        """The first picture for row ``number`` that is ``good``, and a generator for what else the row draws."""
        rng = np.random.default_rng([self.seed, number])
        for attempt in range(TRIES):
            picture = self._crop(number + attempt, size, rng) if self.paths else self._scene(size, rng)
            if good(picture):
                return rng, picture
        raise UserError(
            f"{self.task}: of {TRIES} pictures none made a puzzle with a single right answer; "
            "choose pictures with more in them, or fewer pieces"
        )

    def _crop(self, number: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        from PIL import Image, ImageOps, UnidentifiedImageError

        path = self.paths[number % len(self.paths)]
        try:
            with Image.open(path) as opened:
                picture: Image.Image = ImageOps.exif_transpose(opened).convert("RGB")
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{self.task}: '{path}' is not a picture that can be read: {error}") from error
        edge = max(1, int(min(picture.size) * rng.uniform(0.7, 1.0)))
        left, top = (int(rng.integers(length - edge + 1)) for length in picture.size)
        return np.array(picture.crop((left, top, left + edge, top + edge)).resize(size[::-1], Image.Resampling.BICUBIC))

    def _scene(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """Large shapes that overlap and cross the seams; the triangles show what is up."""
        shapes = ["triangle", *(SHAPES[rng.integers(len(SHAPES))] for _ in range(rng.integers(3, 7)))]
        colours = list(COLOURS)
        objects = [
            Object(shape, colours[rng.integers(len(colours))], *rng.uniform(0.05, 0.95, 2), rng.uniform(0.12, 0.32))
            for shape in rng.permutation(shapes)
        ]
        side = max(size)
        picture = draw([Scene(tuple(objects), tuple(rng.uniform(0.75, 1.0, 3)))], side)[0]
        pixels = (picture.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        return pixels[: size[0], : size[1]]
