"""Samples as JSON and back, with pictures as PNG in base64."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.media import to_pil
from mmrl.scoring import describe_sample
from mmrl.types import Prompt, Samples
from rewards.judges.subjects import as_picture, frames_of

_PICTURE = "png;base64"
_ALL_FRAMES = 1 << 30


def encode_samples(samples: Samples) -> dict[str, Any]:
    """What :func:`decode_samples` reads: everything but ``Prompt.inputs``, which is for the model that was asked.

    Raises:
        UserError: episodes, or a row with something that JSON has no word for; names the row.
    """
    if samples.episodes is not None:
        raise UserError("reward 'remote': episodes cannot be sent")
    # The members of a group share a prompt, whose pictures travel once.
    places: dict[int, int] = {}
    out: dict[str, Any] = {"prompts": [], "prompt_of": []}
    for row, prompt in enumerate(samples.prompts):
        if id(prompt) not in places:
            places[id(prompt)] = len(places)
            where = f"reward 'remote': {describe_sample(samples, row)}"
            out["prompts"].append(_encode_prompt(prompt, where))
        out["prompt_of"].append(places[id(prompt)])
    if samples.texts is not None:
        out["texts"] = list(samples.texts)
    if samples.images is not None:
        out["images"] = [_png(to_pil(image)) for image in samples.images]
    if samples.videos is not None:
        out["videos"] = [[_png(to_pil(frame)) for frame in clip] for clip in samples.videos]
    for key in ("truncated", "lengths", "group"):
        value = getattr(samples, key)
        if value is not None:
            out[key] = value.tolist()
    if samples.sizes is not None:
        out["sizes"] = [[list(size) for size in row] for row in samples.sizes]
    return out


def _encode_prompt(prompt: Prompt, where: str) -> dict[str, Any]:
    plain = {"text": prompt.text, "id": prompt.id, "task": prompt.task}
    plain["images"] = [_png(as_picture(image, where).image) for image in prompt.images]
    plain["videos"] = [
        [_png(as_picture(frame, where).image) for frame in frames_of(video, _ALL_FRAMES, where)]
        for video in prompt.videos
    ]
    for key in ("messages", "target", "metadata"):
        plain[key] = _encode(getattr(prompt, key), f"{where}: {key}")
    return plain


def _encode(value: Any, where: str) -> Any:
    from PIL.Image import Image

    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _encode(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{where}[{number}]") for number, item in enumerate(value)]
    if isinstance(value, Image):
        return {_PICTURE: _png(value)}
    raise UserError(f"{where} is {type(value).__name__}, which cannot be sent as JSON")


def decode_samples(data: Any) -> Samples:
    """Samples from what :func:`encode_samples` made; pictures ``[N, 3, H, W]`` float32 on the CPU.

    Raises:
        UserError: anything else.
    """
    try:
        prompts = [_decode_prompt(item) for item in data["prompts"]]
        samples = Samples(
            prompts=[prompts[place] for place in data["prompt_of"]],
            texts=data.get("texts"),
            images=_stack([_tensor(text) for text in data["images"]]) if "images" in data else None,
            videos=_stack([_stack([_tensor(f) for f in clip]) for clip in data["videos"]])
            if "videos" in data
            else None,
            truncated=torch.tensor(data["truncated"], dtype=torch.bool) if "truncated" in data else None,
            lengths=torch.tensor(data["lengths"], dtype=torch.long) if "lengths" in data else None,
            sizes=[[(int(h), int(w)) for h, w in row] for row in data["sizes"]] if "sizes" in data else None,
            group=torch.tensor(data["group"], dtype=torch.long) if "group" in data else None,
        )
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OSError) as error:
        raise UserError(f"the request does not hold samples: {type(error).__name__}: {error}") from error
    for key in ("texts", "images", "videos", "truncated", "lengths", "sizes", "group"):
        value = getattr(samples, key)
        if value is not None and len(value) != len(samples):
            raise UserError(f"the request has {len(samples)} prompts but {len(value)} {key}")
    if samples.texts is not None and not all(isinstance(text, str) for text in samples.texts):
        raise UserError("the request has texts that are no texts")
    return samples


def _decode_prompt(item: Mapping[str, Any]) -> Prompt:
    known = {key: item[key] for key in ("text", "id", "task") if key in item}
    if not all(isinstance(value, str) for value in known.values()):
        raise ValueError("a prompt's text, id and task are texts")
    return Prompt(
        **known,
        images=[_picture(text) for text in item.get("images", ())],
        videos=[[_picture(text) for text in clip] for clip in item.get("videos", ())],
        **{key: _decode(item[key]) for key in ("messages", "target", "metadata") if key in item},
    )


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_PICTURE}:
            return _picture(value[_PICTURE])
        return {key: _decode(item) for key, item in value.items()}
    return [_decode(item) for item in value] if isinstance(value, list) else value


def _png(picture: Any) -> str:
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _picture(text: str) -> Any:
    from PIL import Image

    try:
        data = base64.b64decode(text, validate=True)
        # No other format is tried: each reader of Pillow's is one more thing that strange bytes could reach.
        with Image.open(io.BytesIO(data), formats=("PNG",)) as opened:
            return opened.convert("RGB")
    except (binascii.Error, Image.DecompressionBombError) as error:
        raise ValueError(f"a picture is no PNG in base64: {error}") from error


def _tensor(text: str) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(_picture(text)).float() / 255


def _stack(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts) if parts else torch.zeros(0, 3, 0, 0)
