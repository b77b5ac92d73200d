"""Pictures and clips in all the forms in which data sets bring them."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from mmrl.errors import UserError
from mmrl.evaluation import Evaluation
from mmrl.media import contact_sheet, film_uri, open_clip, open_picture, save_videos
from mmrl.scoring import Scorer
from mmrl.types import Prompt, Samples

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


def sources(folder):
    picture = Image.fromarray(PIXELS)
    path = folder / "a.png"
    picture.save(path)
    unit = PIXELS.astype(np.float32) / 255
    return {
        "path": path,
        "text": str(path),
        "address": f"file://{path}",
        "picture": picture,
        "with alpha": picture.convert("RGBA"),
        "tensor": torch.from_numpy(unit).permute(2, 0, 1),
        "bytes": {"bytes": path.read_bytes(), "path": None},
        "named": {"bytes": None, "path": str(path)},
        "part": {"type": "image", "image": picture},
        "array": PIXELS,
        "array in [0, 1]": unit,
    }


def test_a_picture_in_every_form(tmp_path):
    for name, source in sources(tmp_path).items():
        assert np.array_equal(np.asarray(open_picture(source)), PIXELS), name


def test_a_picture_lies_as_its_file_says(tmp_path):
    turned = Image.fromarray(PIXELS)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (4, 5)


def test_a_clip_in_every_form(tmp_path):
    frames = torch.zeros(3, 3, 4, 4)
    for k in range(3):
        frames[k, k] = 1
    (film,) = save_videos(frames[None], tmp_path, ["film"])
    folder = tmp_path / "frames"
    folder.mkdir()
    for k, frame in enumerate(frames):
        open_picture(frame).save(folder / f"{k}.png")
    expected = (frames.permute(0, 2, 3, 1) * 255).numpy()
    arrays = expected.astype(np.uint8)
    for source in (frames, list(frames), arrays, film, folder, {"path": str(film)}, {"video": frames}):
        assert np.array_equal(np.stack([np.asarray(frame) for frame in open_clip(source)]), expected)
    other = tmp_path / "film.mp4"
    other.write_bytes(b"\0\0\0\x18ftypmp42")
    assert open_clip(other) == str(other)
    assert contact_sheet([], [other]) is None
    assert contact_sheet([], [film], frames=2).size == (2 * 4 + 3 * 4, 4 + 2 * 4)
    assert contact_sheet([frames[0]]).size == (4, 4)


def test_what_is_no_picture_is_said(tmp_path):
    (tmp_path / "note.txt").write_text("hello")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for source, words in (
        ("nowhere.png", "there is no picture 'nowhere.png'"),
        (tmp_path / "note.txt", "is not a picture"),
        (tmp_path / "cut.png", "picture"),
        ({"caption": "a"}, "a mapping with 'caption' names no media"),
        (3, "a picture is int, but should be a path"),
    ):
        with pytest.raises(UserError, match=words):
            open_picture(source)
    with pytest.raises(UserError, match="a clip has no frames"):
        open_clip([])


def test_a_film_too_large_has_fewer_frames_or_is_a_strip(tmp_path):
    noise = torch.rand(18, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (film,) = save_videos(noise[None], tmp_path, ["film"])
    assert 105_000 < film.stat().st_size < 120_000
    for most, frames in ((120_000, 18), (105_000, 16), (40_000, 0)):
        head, content = film_uri(film, most).split(",")
        content = base64.b64decode(content)
        assert len(content) <= most
        with Image.open(io.BytesIO(content)) as shown:
            if frames:
                assert head == "data:image/gif;base64"
                assert shown.n_frames == frames
                # Hundredths of a second are as fine as this format goes.
                assert frames * shown.info["duration"] == pytest.approx(18 * 120, rel=0.05)
            else:
                assert head == "data:image/jpeg;base64"
                assert shown.size[0] > 3 * shown.size[1]


class Writer:
    """Says "yes" to everything."""

    batch_size = 8

    def generate(self, prompts, seeds, grad_steps=0):
        return Samples(list(prompts), texts=["yes"] * len(prompts))


def test_an_evaluation_shows_what_it_can(tmp_path):
    other = tmp_path / "film.mp4"
    other.write_bytes(b"\0\0\0\x18ftypmp42")
    prompts = [Prompt(name, images=[source]) for name, source in sources(tmp_path).items()]
    prompts += [Prompt("film", videos=[other]), Prompt("nothing")]
    Evaluation(prompts, 1, 0, Scorer([lambda samples: [1.0] * len(samples)]))(Writer(), 0, tmp_path / "eval")
    shown = sorted(path.name for path in (tmp_path / "eval").glob("*.png"))
    assert shown == [f"{k:03d}-0-asked.png" for k in range(len(prompts) - 2)]
