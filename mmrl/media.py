"""Pictures and clips of a run: files, contact sheets, and pictures inside HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


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


def open_picture(source: str | Path | Image | Tensor) -> Image:
    """A picture from a path, a picture or a tensor ``[3, H, W]`` in [0, 1], as RGB.

    Raises:
        OSError: the file is missing or not a picture that can be read (``PIL.UnidentifiedImageError`` is one).
    """
    from PIL import Image

    if isinstance(source, Tensor):
        return to_pil(source)
    if isinstance(source, (str, Path)):
        with Image.open(source) as picture:
            return picture.convert("RGB")
    return source.convert("RGB")


def save_contact_sheet(sources: Sequence, path: Path, frames: int = 4) -> None:
    """Write pictures side by side as one PNG; of a clip (a sequence of frames) a few frames spread over its length."""
    pictures: list[Image] = []
    for source in sources:
        if isinstance(source, (list, tuple)) or (isinstance(source, Tensor) and source.ndim == 4):
            shown = range(0, len(source), max(1, len(source) // frames))
            pictures += [open_picture(source[k]) for k in shown]
        else:
            pictures.append(open_picture(source))
    path.parent.mkdir(parents=True, exist_ok=True)
    (pictures[0] if len(pictures) == 1 else grid(pictures, len(pictures))).save(path, format="PNG")


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
    videos: Tensor, folder: str | Path, names: Sequence[str], frames_per_second: float = 8.0, scale: int = 1
) -> list[Path]:
    """Write ``videos [N, F, 3, H, W]`` in [0, 1] as endlessly looping ``folder/<name>.gif``.

    Raises:
        ValueError: the number of names differs from the number of videos.
    """
    if len(names) != len(videos):
        raise ValueError(f"{len(videos)} videos but {len(names)} names")
    paths = [_path(folder, name, ".gif") for name in names]
    for video, path in zip(videos, paths, strict=True):
        first, *rest = [to_pil(frame, scale) for frame in video]
        # GIF counts time in hundredths of a second.
        duration = max(1, round(100 / frames_per_second)) * 10
        first.save(path, format="GIF", save_all=True, append_images=rest, duration=duration, loop=0)
    return paths


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
    kind = "png"
    if max_bytes is not None and buffer.tell() > max_bytes:
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=82, optimize=True)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _path(folder: str | Path, name: str, suffix: str) -> Path:
    path = Path(folder) / (name if name.endswith(suffix) else name + suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
