"""Pictures, clips and sounds: files, contact sheets, and what of them goes inside HTML."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mmrl import mp4
from mmrl.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

    from mmrl.types import Samples

PICTURE_KEYS = ("image", "path", "url")
CLIP_KEYS = ("video", "path", "url")


def to_pil(image: Tensor, scale: int = 1) -> Image:
    """A tensor ``[3, H, W]`` (or ``[1, H, W]``) in [0, 1] as an RGB picture, each pixel drawn ``scale`` x ``scale``.

    Values outside [0, 1] are clipped; non-finite ones become black.
    """
    from PIL import Image

    pixels = torch.nan_to_num(image.detach().float().cpu(), nan=0.0, posinf=0.0, neginf=0.0)
    pixels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    pixels = pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous()
    picture = Image.fromarray(pixels.numpy())
    return enlarge(picture, scale)


def enlarge(picture: Image, scale: int) -> Image:
    """Nearest-neighbour enlargement, which keeps tiny pictures sharp."""
    from PIL import Image

    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def open_picture(source: Any) -> Image:
    """A picture as RGB, upright as its file says.

    Args:
        source: a path (also ``file://...``), a picture, a tensor ``[3, H, W]`` or ``[1, H, W]`` in [0, 1], an array
            ``[H, W, 3]`` (uint8, or real in [0, 1]), or a mapping as in data sets and chats: ``{"bytes": ...}``,
            ``{"image": ...}``, ``{"path": ...}`` or ``{"url": ...}``.

    Raises:
        UserError: it is missing, broken or no picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    value = source
    if isinstance(value, Mapping):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else _named(value, PICTURE_KEYS)
    if isinstance(value, Tensor):
        return to_pil(value)
    if not isinstance(value, (str, Path)) and not any(
        hasattr(value, name) for name in ("read", "__array__", "convert")
    ):
        raise UserError(f"a picture is {type(value).__name__}, but should be a path, picture, array or tensor")
    try:
        if hasattr(value, "__array__") and not isinstance(value, Image.Image):
            return Image.fromarray(_bytes(np.asarray(value))).convert("RGB")
        if isinstance(value, Image.Image):
            return _rgb(value)
        if isinstance(value, (str, Path)):
            value = _file(value)
            if not value.is_file():
                raise UserError(f"there is no picture '{source}'")
        with Image.open(value) as picture:
            # This is a copy already, unlike the picture of a file that is closed.
            upright = ImageOps.exif_transpose(picture)
            return upright if upright.mode == "RGB" else upright.convert("RGB")
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"'{_short(source)}' is not a picture") from error
    except (OSError, SyntaxError, ValueError, TypeError, AttributeError, Image.DecompressionBombError) as error:
        # What the format readers raise for a file that begins like a picture and goes on otherwise.
        raise UserError(f"'{_short(source)}' is a broken picture: {error}") from error


def open_clip(source: Any) -> list[Image] | str:
    """A clip as a list of RGB frames; the path of a file that only a model's own processor can decode.

    Args:
        source: a sequence of pictures, a tensor ``[F, 3, H, W]``, a folder of pictures, an animated picture or other
            file, or a mapping that names one of them: ``{"video": ...}``, ``{"path": ...}`` or ``{"url": ...}``.

    Raises:
        UserError: it is missing, broken or empty.
    """
    from PIL import Image, ImageSequence, UnidentifiedImageError

    value = _named(source, CLIP_KEYS) if isinstance(source, Mapping) else source
    if isinstance(value, (str, Path)):
        path = _file(value)
        if path.is_dir():
            frames = [open_picture(file) for file in sorted(path.iterdir()) if file.is_file()]
        elif not path.is_file():
            raise UserError(f"there is no clip '{value}'")
        else:
            try:
                with Image.open(path) as animation:
                    frames = [_rgb(frame) for frame in ImageSequence.Iterator(animation)]
            except UnidentifiedImageError:
                return str(path)
            except (OSError, SyntaxError, ValueError) as error:
                raise UserError(f"'{value}' is a broken clip: {error}") from error
    else:
        frames = [open_picture(frame) for frame in value]
    if not frames:
        raise UserError("a clip has no frames")
    return frames


def clip_frames(source: Any, frames: int | None = None) -> list[Image] | None:
    """The frames of a clip in any form of :func:`open_clip`; None for a video file if PyAV, which reads it, is missing.

    Args:
        frames: so many, evenly spread, of a longer clip; all by default.

    Raises:
        UserError: it is missing, broken or empty.
    """
    opened = open_clip(source)
    if isinstance(opened, str):
        return _decoded(opened, frames)[0]
    return [opened[k] for k in evenly(len(opened), frames or len(opened))]


def _decoded(path: str | Path, frames: int | None = None) -> tuple[list[Image] | None, float]:
    """Frames of a video file, None without PyAV, and the seconds that all of it lasts."""
    try:
        return mp4.read(path, lambda count: evenly(count, frames or count))
    except ImportError:
        return None, 0.0
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' is no clip that can be read: {error}") from error


def evenly(length: int, count: int) -> list[int]:
    """``count`` positions among ``length``, the first and the last among them; all of them where there are fewer."""
    if count >= length:
        return list(range(length))
    return [length // 2] if count == 1 else [round(i * (length - 1) / (count - 1)) for i in range(count)]


def contact_sheet(pictures: Sequence[Any], clips: Sequence[Any] = (), frames: int = 4) -> Image | None:
    """Pictures side by side, of each clip a few frames; None if there are only clips that cannot be decoded here."""
    shown = [open_picture(picture) for picture in pictures]
    for clip in clips:
        shown += clip_frames(clip, frames) or []
    return grid(shown, len(shown)) if len(shown) > 1 else next(iter(shown), None)


def save_images(images: Tensor, folder: str | Path, names: Sequence[str], scale: int = 1) -> list[Path]:
    """Write ``images [N, 3, H, W]`` in [0, 1] as ``folder/<name>.png``; the folder is made if missing.

    Raises:
        ValueError: the number of names differs from the number of images.
    """
    if len(names) != len(images):
        raise ValueError(f"{len(images)} images but {len(names)} names")
    paths = [_path(folder, name, ".png") for name in names]
    for image, path in zip(images, paths, strict=True):
        to_pil(image, scale).save(path, format="PNG")
    return paths


def save_videos(
    videos: Tensor | Sequence[Tensor], folder: str | Path, names: Sequence[str], frames_per_second: float = 8.0
) -> list[Path]:
    """Write N ``videos [F, 3, H, W]`` in [0, 1] as ``folder/<name>.mp4``.

    Without PyAV (``pip install "mmrl[video]"``) they become endlessly looping ``.gif`` files of 256 colours instead.

    Raises:
        ValueError: the number of names differs from the number of videos.
    """
    if len(names) != len(videos):
        raise ValueError(f"{len(videos)} videos but {len(names)} names")
    kind = "mp4" if mp4.can_write() else "gif"
    paths = [_path(folder, name, f".{kind}") for name in names]
    for video, path in zip(videos, paths, strict=True):
        _write_film([to_pil(frame) for frame in video], 1 / frames_per_second, path, kind)
    return paths


def save_audios(audios: Tensor, rates: Tensor | None, folder: str | Path, names: Sequence[str]) -> list[Path]:
    """Write N waveforms ``audios [N, channels, samples]`` in [-1, 1] as ``folder/<name>.wav`` of 16 bits.

    Args:
        rates: ``[N]``, samples a second; 44,100 where they are not known.
    """
    paths = [_path(folder, name, ".wav") for name in names]
    each = [44_100] * len(audios) if rates is None else rates.tolist()
    for audio, rate, path in zip(audios, each, paths, strict=True):
        levels = torch.nan_to_num(audio.detach().float().cpu()).clamp(-1, 1) * 32767
        _write_wav(levels.round().T.numpy(), rate, path)
    return paths


def save_samples(samples: Samples, folder: str | Path, names: Sequence[str]) -> list[Path]:
    """Write pictures, clips or sounds, a file each; an empty list for samples of another kind."""
    if samples.images is not None:
        return save_images(samples.images, folder, names)
    if samples.videos is not None:
        return save_videos(samples.videos, folder, names)
    if samples.audios is not None:
        return save_audios(samples.audios, samples.sample_rate, folder, names)
    return []


def grid(
    images: Tensor | Sequence[Image], columns: int = 4, scale: int = 1, gap: int = 4, background: str = "white"
) -> Image:
    """A contact sheet, row by row, of ``[N, 3, H, W]`` in [0, 1] or of pictures; cells are as large as the largest."""
    from PIL import Image

    if columns < 1 or len(images) == 0:
        raise ValueError(f"a grid needs at least one picture and one column, not {len(images)} and {columns}")
    pictures = [to_pil(image, scale) if isinstance(image, Tensor) else enlarge(image, scale) for image in images]
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width = max(picture.width for picture in pictures)
    height = max(picture.height for picture in pictures)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), background)
    for index, picture in enumerate(pictures):
        row, column = divmod(index, columns)
        sheet.paste(picture.convert("RGB"), (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet


def data_uri(picture: Image, max_side: int | None = None, max_bytes: int | None = None) -> str:
    """The picture as ``data:image/png;base64,...`` for the ``src`` of an ``<img>``.

    Args:
        max_side: shrink (never enlarge) so that the longer side has at most this many pixels.
        max_bytes: a PNG of more bytes is replaced by a JPEG of good quality, to keep pages with photographs small.
    """
    from PIL import Image

    picture = picture.convert("RGB")
    if max_side is not None and max(picture.size) > max_side:
        picture = picture.copy()
        picture.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    kind = "image/png"
    if max_bytes is not None and buffer.tell() > max_bytes:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=82, optimize=True)
        kind = "image/jpeg"
    return _uri(kind, buffer.getvalue())


def film_uri(path: Path, max_bytes: int) -> str:
    """A GIF or MP4 file as a data URI that moves.

    One of more bytes is made of fewer and smaller frames, or else a strip of frames; but an MP4 file stays as it is
    where PyAV is missing.

    Raises:
        UserError: it is no clip that can be read.
    """
    kind, mime = ("mp4", "video/mp4") if path.suffix == ".mp4" else ("gif", "image/gif")
    if path.stat().st_size <= max_bytes:
        return _uri(mime, path.read_bytes())
    frames, seconds = _decoded(path) if kind == "mp4" else _animation(path)
    if frames is None:
        return _uri(mime, path.read_bytes())
    for most, side in ((48, 192), (24, 128), (16, 96)):
        kept = [frames[k] for k in evenly(len(frames), most)]
        for frame in kept:
            frame.thumbnail((side, side))
        buffer = io.BytesIO()
        _write_film(kept, seconds / len(kept), buffer, kind, quality=30)
        if buffer.tell() <= max_bytes:
            return _uri(mime, buffer.getvalue())
    return data_uri(grid([frames[k] for k in evenly(len(frames), 4)], 4), max_bytes=max_bytes)


def _animation(path: Path) -> tuple[list[Image], float]:
    """Frames of an animated picture, and the seconds that they last."""
    from PIL import Image

    with Image.open(path) as film:
        seconds = film.n_frames * film.info.get("duration", 100) / 1000
    return open_clip(path), seconds


def sound_uri(path: Path, max_bytes: int) -> str:
    """A WAV file as a data URI; one of more bytes as a single channel of fewer samples a second, then cut short.

    Raises:
        UserError: it is no WAV file of 16 bits.
    """
    try:
        with wave.open(str(path)) as file:
            levels = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
            rate = file.getframerate()
    except (wave.Error, EOFError, ValueError) as error:
        raise UserError(f"'{path}' is no sound that can be read: {error}") from error
    if path.stat().st_size > max_bytes:
        # Speech and most of music are below 4 kHz.
        step = max(min(rate // 8000, -(-2 * len(levels) // max_bytes)), 1)
        whole = len(levels) // step * step
        levels = levels[:whole].mean(1).reshape(-1, step).mean(1)[: max_bytes // 2 - 22, None].round()
        rate //= step
    buffer = io.BytesIO()
    _write_wav(levels, rate, buffer)
    return _uri("audio/wav", buffer.getvalue())


def _write_film(
    frames: Sequence[Image], seconds: float, place: Path | io.BytesIO, kind: str, quality: int = 18
) -> None:
    """Each frame shown for so many seconds; a GIF loops endlessly."""
    if kind == "mp4":
        mp4.write(map(np.asarray, frames), 1 / seconds, place, quality)
        return
    # GIF counts time in hundredths of a second.
    duration = max(1, round(100 * seconds)) * 10
    frames[0].save(place, format="GIF", save_all=True, append_images=frames[1:], duration=duration, loop=0)


def _write_wav(levels: np.ndarray, rate: int, place: Path | io.BytesIO) -> None:
    """Levels ``[samples, channels]`` of 16 bits."""
    with wave.open(str(place) if isinstance(place, Path) else place, "wb") as file:
        file.setnchannels(levels.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(levels.astype("<i2").tobytes())


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _named(value: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What a part of a chat or a cell of a data set points to."""
    found = next((value[key] for key in keys if value.get(key) is not None), None)
    if found is None:
        raise UserError(
            f"a mapping with {', '.join(map(repr, value))} names no media: it needs one of {', '.join(keys)}"
        )
    return found


def _file(value: str | Path) -> Path:
    return Path(str(value).removeprefix("file://")).expanduser()


def _bytes(pixels: np.ndarray) -> np.ndarray:
    return (pixels.clip(0, 1) * 255).round().astype(np.uint8) if pixels.dtype.kind == "f" else pixels


def _rgb(picture: Image) -> Image:
    return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()


def _short(value: Any) -> str:
    return str(value) if isinstance(value, (str, Path)) else type(value).__name__


def _path(folder: str | Path, name: str, suffix: str) -> Path:
    path = Path(folder) / (name if name.endswith(suffix) else name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
