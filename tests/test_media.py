"""Pictures and clips in all the forms in which data sets bring them."""

import base64
import io
import sys
import wave

import numpy as np
import pytest
import torch
from PIL import Image

from mmrl.errors import UserError
from mmrl.evaluation import Evaluation
from mmrl.media import (
    clip_frames,
    contact_sheet,
    film_uri,
    open_clip,
    open_picture,
    save_audios,
    save_videos,
    sound_uri,
)
from mmrl.scoring import Scorer
from mmrl.types import Prompt, Samples
from pipelines.latents import target

PIXELS = np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3)


@pytest.fixture
def without_av(monkeypatch):
    """As if PyAV were not installed."""
    monkeypatch.setitem(sys.modules, "av", None)


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


def test_a_clip_in_every_form(tmp_path, without_av):
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
    assert clip_frames(other) is None
    assert contact_sheet([], [other]) is None
    assert contact_sheet([], [film], frames=2).size == (2 * 4 + 3 * 4, 4 + 2 * 4)
    assert contact_sheet([frames[0]]).size == (4, 4)


def test_a_clip_is_a_looping_gif_without_a_library(tmp_path, without_av):
    video = torch.zeros(1, 3, 3, 8, 8)
    video[0, 1] = 1.0
    (path,) = save_videos(video, tmp_path, ["clip"], frames_per_second=8)
    with Image.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"], gif.info["duration"]) == (3, 0, 120)
        means = []
        for frame in range(3):
            gif.seek(frame)
            means.append(np.asarray(gif.convert("RGB")).mean())
    assert means == [0, 255, 0]


def moving_shapes(frames, height, width):
    """A red square that moves right over a blue ground, ``[F, 3, H, W]``."""
    clip = torch.zeros(frames, 3, height, width)
    clip[:, 2] = 0.5
    for k in range(frames):
        clip[k, :, 4:8, k : k + 4] = torch.tensor([1.0, 0.1, 0.2])[:, None, None]
    return clip


@pytest.mark.parametrize(("height", "width", "scale"), [(16, 16, 6), (15, 20, 6), (48, 64, 2), (97, 131, 1)])
def test_a_clip_is_an_mp4_with_its_colours(tmp_path, height, width, scale):
    av = pytest.importorskip("av")
    clip = moving_shapes(9, height, width)
    paths = save_videos(torch.stack([clip, clip]), tmp_path, ["a", "b"], frames_per_second=12.5)
    assert [path.name for path in paths] == ["a.mp4", "b.mp4"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    with av.open(str(paths[0])) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 12.5)
        assert file.duration / av.time_base == pytest.approx(9 / 12.5)
    frames = np.stack([np.asarray(frame) for frame in clip_frames(paths[0])])
    if scale > 1:
        expected = np.kron((clip * 255).round().permute(0, 2, 3, 1).numpy(), np.ones((1, scale, scale, 1)))
        assert frames.shape == expected.shape
        assert abs(frames - expected).mean() < 3
    else:
        assert frames.shape == (9, height + height % 2, width + width % 2, 3)
    assert len(clip_frames(paths[0], 4)) == 4
    assert np.array_equal(np.asarray(clip_frames(paths[0], 2)[1]), frames[-1])
    assert np.array_equal((target(Prompt(target=str(paths[0]))) * 255).permute(0, 2, 3, 1).numpy(), frames)


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


def test_a_film_too_large_has_fewer_frames_or_is_a_strip(tmp_path, without_av):
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


def test_a_large_mp4_is_made_smaller(tmp_path, monkeypatch):
    av = pytest.importorskip("av")
    noise = torch.rand(18, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    (film,) = save_videos(noise[None], tmp_path, ["film"])
    whole = film_uri(film, film.stat().st_size)
    assert base64.b64decode(whole.split(",")[1]) == film.read_bytes()
    head, content = film_uri(film, film.stat().st_size // 2).split(",")
    assert head == "data:video/mp4;base64"
    with av.open(io.BytesIO(base64.b64decode(content))) as file:
        assert file.streams.video[0].frames == 18
        assert file.duration / av.time_base == pytest.approx(18 / 8)
    assert film_uri(film, 5_000).startswith("data:image/jpeg")
    monkeypatch.setitem(sys.modules, "av", None)
    assert film_uri(film, 5_000) == whole


def test_sounds_are_wav_files(tmp_path):
    rate, seconds = 48_000, 4
    time = torch.arange(rate * seconds) / rate
    tone = 0.5 * torch.sin(2 * torch.pi * 440 * time)
    paths = save_audios(torch.stack([tone, 4 * tone])[None], torch.tensor([rate]), tmp_path, ["tone"])
    with wave.open(str(paths[0])) as file:
        assert file.getparams()[:4] == (2, 2, rate, rate * seconds)
        levels = np.frombuffer(file.readframes(rate * seconds), "<i2").reshape(-1, 2) / 32767
    assert abs(levels[:, 0] - tone.numpy()).max() < 1e-4
    assert levels[:, 1].max() == 1
    assert base64.b64decode(sound_uri(paths[0], 10**6).split(",")[1]) == paths[0].read_bytes()
    for most, lasts in ((100_000, 4), (32_000, 2)):
        head, content = sound_uri(paths[0], most).split(",")
        assert head == "data:audio/wav;base64"
        content = base64.b64decode(content)
        assert len(content) <= most
        with wave.open(io.BytesIO(content)) as file:
            heard = np.frombuffer(file.readframes(10**6), "<i2") / 32767
            assert len(heard) / file.getframerate() == pytest.approx(lasts, abs=0.01)
            strength = abs(np.fft.rfft(heard))
            assert strength.argmax() * file.getframerate() / len(heard) == pytest.approx(440, abs=1)
    (tmp_path / "no.wav").write_bytes(b"RIFF")
    with pytest.raises(UserError, match="is no sound that can be read"):
        sound_uri(tmp_path / "no.wav", 10)


class Writer:
    """Says "yes" to everything."""

    batch_size = 8

    def generate(self, prompts, seeds, grad_steps=0):
        return Samples(list(prompts), texts=["yes"] * len(prompts))


def test_an_evaluation_shows_what_it_can(tmp_path, without_av):
    other = tmp_path / "film.mp4"
    other.write_bytes(b"\0\0\0\x18ftypmp42")
    prompts = [Prompt(name, images=[source]) for name, source in sources(tmp_path).items()]
    prompts += [Prompt("film", videos=[other]), Prompt("nothing")]
    Evaluation(prompts, 1, 0, Scorer([lambda samples: [1.0] * len(samples)]))(Writer(), 0, tmp_path / "eval")
    shown = sorted(path.name for path in (tmp_path / "eval").glob("*.png"))
    assert shown == [f"{k:03d}-0-asked.png" for k in range(len(prompts) - 2)]
