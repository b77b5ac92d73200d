"""Clips as MP4 files that every browser plays: H.264 in yuv420p, by PyAV."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

ENCODER = "libx264"
# Colours have half the resolution of brightness, so that pixels of tiny clips have to be drawn several times.
LEAST_SIDE = 96


def can_write() -> bool:
    """Whether PyAV is installed and has an encoder of H.264, as its wheels do."""
    try:
        import av
    except ImportError:
        return False
    return ENCODER in av.codecs_available


def write(frames: Iterable[np.ndarray], frames_per_second: float, place: Path | BinaryIO, quality: int = 18) -> None:
    """Write frames ``[H, W, 3]`` (uint8); the same frames give the same bytes.

    Clips with a longer side below 96 pixels are enlarged by an even factor without blur; an odd side of a larger one
    gains a pixel by repeating the last.

    Args:
        quality: x264's constant rate factor, from 0 (lossless) to 51; 18 looks like the original.
    """
    import av
    from av.video.reformatter import ColorRange, Colorspace

    rate = Fraction(frames_per_second).limit_denominator(1000)
    # One thread: the number of threads changes the bits.
    with av.open(str(place) if isinstance(place, Path) else place, "w", format="mp4") as file:
        stream = file.add_stream(ENCODER, rate=rate, options={"crf": str(quality), "threads": "1"})
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        for frame in frames:
            pixels = _playable(frame)
            if not context.is_open:
                stream.height, stream.width = pixels.shape[:2]
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
            )
            file.mux(stream.encode(picture))
        file.mux(stream.encode())


def read(path: Path | str, choose: Callable[[int], Iterable[int]] = range) -> tuple[list[Image], float]:
    """Frames of any video file that FFmpeg reads, and the seconds that the whole clip lasts.

    Args:
        choose: positions of the frames to return, given how many there are; all by default.

    Raises:
        ImportError: PyAV is not installed.
        OSError, ValueError: the file is broken or has no pictures.
    """
    import av

    with av.open(str(path)) as file:
        if not file.streams.video:
            raise ValueError("it has no pictures")
        stream = file.streams.video[0]
        count, rate = stream.frames, stream.average_rate or 1
        if not count:  # Some formats do not say.
            count = sum(1 for _ in file.decode(stream))
            file.seek(0)
        chosen = set(choose(count))
        return [frame.to_image() for k, frame in enumerate(file.decode(stream)) if k in chosen], float(count / rate)


def _playable(frame: np.ndarray) -> np.ndarray:
    """The frame with even sides that are not too small."""
    height, width = frame.shape[:2]
    side = max(height, width)
    if side < LEAST_SIDE:
        scale = 2 * -(-LEAST_SIDE // (2 * side))
        return frame.repeat(scale, 0).repeat(scale, 1)
    return np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
