"""Self-supervised puzzles: the answers are right, unique, and what their rewards expect."""

import itertools

import numpy as np
import pytest
from PIL import Image

from mmrl.data import load_prompts
from mmrl.errors import UserError
from mmrl.types import Samples
from mmrl.world.puzzles import _cut, distinct, jigsaw, masked_patch, rotation
from rewards import load_reward


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of clouds, of several sizes."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(80, 60), (60, 90), (70, 70)]):
        small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
        small.resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    (folder / "notes.txt").write_text("no picture")
    return str(folder)


def score(reward, row, answer, **options):
    from mmrl.types import Prompt

    prompt = Prompt(**{key: row[key] for key in ("id", "text", "target", "task")})
    return load_reward(reward, **options)(Samples([prompt], texts=[answer]))[0]


def pixels(picture):
    return np.array(picture)


@pytest.mark.parametrize("layout", ["mosaic", "tiles"])
@pytest.mark.parametrize("source", ["scenes", "photos"])
def test_jigsaw_is_solved_by_its_target(layout, source, photos):
    folder = photos if source == "photos" else None
    for row in jigsaw(folder, count=6, rows=2, columns=3, layout=layout, side=60):
        images = [pixels(image) for image in row["images"]]
        tiles = _cut(images[0], 2, 3) if layout == "mosaic" else images
        assert len(images) == (1 if layout == "mosaic" else 6)
        assert sorted(row["target"]) == [1, 2, 3, 4, 5, 6]
        assert row["target"] != [1, 2, 3, 4, 5, 6]
        assert distinct(tiles)
        solved = [tiles[number - 1] for number in row["target"]]
        # Neighbouring edges fit in the solution better than in any exchange of two tiles.
        best = roughness(solved)
        for a, b in itertools.combinations(range(6), 2):
            other = list(solved)
            other[a], other[b] = other[b], other[a]
            assert best <= roughness(other) + 1e-9
        assert score("permutation", row, f"<answer>{row['target']}</answer>") == 1
        shuffled = [*row["target"][1:], row["target"][0]]
        assert score("permutation", row, str(shuffled)) == 0


def roughness(tiles):
    """Difference across the seams of a 2 by 3 picture."""
    grid = [[tile.astype(float) for tile in tiles[:3]], [tile.astype(float) for tile in tiles[3:]]]
    across = sum(np.abs(a[:, -1] - b[:, 0]).sum() for line in grid for a, b in itertools.pairwise(line))
    return across + sum(np.abs(a[-1] - b[0]).sum() for a, b in zip(*grid, strict=True))


@pytest.mark.parametrize("source", ["scenes", "photos"])
def test_rotation(source, photos):
    folder = photos if source == "photos" else None
    rows = list(rotation(folder, count=12, side=48))
    upright = [np.rot90(pixels(row["images"][0]), row["target"] // 90) for row in rows]
    assert {row["target"] for row in rows} == {0, 90, 180, 270}
    for row, picture in zip(rows, upright, strict=True):
        assert distinct([np.rot90(picture, k) for k in range(4)])
        assert score("number", row, f"{row['target']} degrees") == 1
    if source == "scenes":
        # Turned back, drawings are what was drawn: the same seed without turning gives the same upright picture.
        from mmrl.world.puzzles import _Source

        _, drawn = _Source(None, 0, "rotation").find(
            0, (48, 48), lambda p: distinct([np.rot90(p, k) for k in range(4)])
        )
        np.testing.assert_array_equal(upright[0], drawn)


@pytest.mark.parametrize("source", ["scenes", "photos"])
def test_masked_patch(source, photos):
    folder = photos if source == "photos" else None
    letters = set()
    for row in masked_patch(folder, count=12, choices=3, grid=3, side=48):
        holed, *pieces = (pixels(image) for image in row["images"])
        assert len(pieces) == 3
        assert distinct(pieces)
        hidden = (holed == 127).all(-1)
        rows, columns = np.nonzero(hidden)
        top, left = rows.min(), columns.min()
        places = {piece.tobytes(): letter for piece, letter in zip(pieces, "ABC", strict=True)}
        # The wrong pieces are still to be seen in the picture, the right one is not.
        seen = {cell.tobytes() for cell in _cut(holed, 3, 3)}
        missing = [letter for key, letter in places.items() if key not in seen]
        assert missing == [row["target"]]
        assert hidden[top : top + 16, left : left + 16].all()
        assert score("choice", row, f"({row['target']})") == 1
        letters.add(row["target"])
    assert len(letters) > 1


def test_rows_are_stable_and_become_prompts(photos, tmp_path):
    short, long = list(jigsaw(photos, count=2, side=48)), list(jigsaw(photos, count=4, side=48))
    for a, b in zip(short, long, strict=False):
        assert a["target"] == b["target"]
        np.testing.assert_array_equal(pixels(a["images"][0]), pixels(b["images"][0]))
    assert [row["target"] for row in jigsaw(photos, count=4, side=48, seed=1)] != [row["target"] for row in long]
    options = {"folder": photos, "count": 3, "side": 48, "save_to": str(tmp_path / "out")}
    prompts = load_prompts("mmrl.world.puzzles:masked_patch", options=options)
    assert [prompt.task for prompt in prompts] == ["masked_patch"] * 3
    assert len(prompts[0].images) == 5
    assert all(isinstance(path, str) for path in prompts[0].images)
    np.testing.assert_array_equal(
        pixels(Image.open(prompts[0].images[0])), pixels(next(masked_patch(photos, count=1, side=48))["images"][0])
    )


def test_what_makes_no_puzzle(tmp_path, monkeypatch):
    monkeypatch.setattr("mmrl.world.puzzles.TRIES", 5)
    with pytest.raises(UserError, match="there is no folder"):
        next(jigsaw(str(tmp_path / "none")))
    with pytest.raises(UserError, match="has no pictures"):
        next(rotation(str(tmp_path)))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "plain.png")
    for build in (jigsaw, rotation, masked_patch):
        with pytest.raises(UserError, match="none made a puzzle with a single right answer"):
            next(build(str(tmp_path)))
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(UserError, match=r"broken.png' is not a picture"):
        next(jigsaw(str(tmp_path)))
    with pytest.raises(UserError, match="nothing to order"):
        next(jigsaw(rows=1, columns=1))
