"""What a judge gets to see of a sample: pictures without copies, frames of clips, and the question around them."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from mmrl.errors import UserError, located, nearest
from mmrl.media import clip_frames, evenly, open_picture
from mmrl.scoring import describe_sample
from mmrl.types import Prompt, Samples
from rewards.robot import pictures_of

if TYPE_CHECKING:
    from PIL.Image import Image

Modality = Literal["image", "video", "text"]


@dataclass(frozen=True)
class Picture:
    """A picture known by its content: two of the same pixels are equal, so that they are processed once."""

    key: bytes
    image: Image = field(compare=False, repr=False)


Part = str | Picture
Case = tuple[Part, ...]
"""A question with pictures in it, as the content of one user turn."""


@dataclass(frozen=True)
class Subject:
    """One sample as a judge sees it.

    Attributes:
        prompt: what was asked for, in words.
        completion: the text that was written; empty for pictures and clips.
        pictures: the picture or frames that were made; for a text, those it was written about.
    """

    prompt: str
    completion: str
    pictures: tuple[Picture, ...]


def modality(samples: Samples, name: str) -> Modality:
    """What kind of output the samples are, episodes as videos; ``UserError`` if a judge cannot look at it."""
    kinds = (("image", samples.images), ("video", samples.videos), ("video", samples.episodes), ("text", samples.texts))
    for kind, output in kinds:
        if output is not None:
            return kind
    raise UserError(f"reward '{name}' judges images, videos, episodes or texts, but the samples have none")


def subjects(samples: Samples, frames: int, name: str) -> list[Subject]:
    """One per sample.

    Args:
        frames: how many frames of a clip or episode are looked at, evenly spread from the first to the last.
        name: of the reward, for messages.

    Raises:
        UserError: nothing to look at, or a picture of a prompt that cannot be opened; names the sample.
    """
    kind = modality(samples, name)
    if kind == "image":
        shown = [(as_picture(image),) for image in samples.images]
    elif kind == "video":
        clips = samples.videos if samples.videos is not None else pictures_of(samples, name)
        shown = [tuple(as_picture(_unit(clip[i])) for i in evenly(len(clip), frames)) for clip in clips]
    else:
        shown = _shown_to_the_writer(samples, frames, name)
    texts = samples.texts if kind == "text" else [""] * len(samples)
    return [
        Subject(words_of(prompt), text, pictures)
        for prompt, text, pictures in zip(samples.prompts, texts, shown, strict=True)
    ]


def _shown_to_the_writer(samples: Samples, frames: int, name: str) -> list[tuple[Picture, ...]]:
    # The members of a group share one prompt, whose files are opened once.
    known: dict[int, tuple[Picture, ...]] = {}
    for row, prompt in enumerate(samples.prompts):
        if id(prompt) not in known:
            where = f"reward '{name}': {describe_sample(samples, row)}"
            known[id(prompt)] = prompt_pictures(prompt, frames, where)
    return [known[id(prompt)] for prompt in samples.prompts]


def words_of(prompt: Prompt) -> str:
    """The prompt's text, or all that is written in the turns of its conversation before an assistant's."""
    if prompt.text or not prompt.messages:
        return prompt.text
    turns = [message for message in prompt.messages if message.get("role") == "user"]
    return "\n".join(part["text"] for turn in turns for part in _parts(turn) if part.get("type") == "text")


def prompt_pictures(prompt: Prompt, frames: int, where: str) -> tuple[Picture, ...]:
    """The pictures and sampled frames that a prompt shows, in the order in which it does.

    Args:
        where: begins the message of an error.
    """
    images, videos = iter(prompt.images), iter(prompt.videos)
    shown: list[tuple[str, Any]] = []
    for message in prompt.messages:
        for part in _parts(message):
            kind = part.get("type")
            if kind in ("image", "video"):
                own = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
                shown.append((kind, own if own is not None else next(images if kind == "image" else videos, None)))
    shown += [("image", image) for image in images] + [("video", video) for video in videos]
    found: list[Picture] = []
    for kind, medium in shown:
        if medium is None:
            raise UserError(f"{where}: its messages show more {kind}s than the row has")
        pictures = [medium] if kind == "image" else frames_of(medium, frames, where)
        found += [as_picture(picture, where) for picture in pictures]
    return tuple(found)


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message.get("content") or ()
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_picture(picture: Any, where: str = "") -> Picture:
    """A picture in any form that :func:`mmrl.media.open_picture` takes.

    Raises:
        UserError: it cannot be opened; ``where``, if given, begins the message.
    """
    with located(where) if where else contextlib.nullcontext():
        image = open_picture(picture)
    digest = hashlib.blake2b(repr(image.size).encode() + image.tobytes(), digest_size=16)
    return Picture(digest.digest(), image)


def frames_of(video: Any, count: int, where: str) -> list[Any]:
    """``count`` frames, evenly spread, of a clip in any form that :func:`mmrl.media.open_clip` takes.

    Raises:
        UserError: it cannot be opened, or takes PyAV to be read, which is missing.
    """
    with located(where):
        found = clip_frames(video, count)
    if found is None:
        raise UserError(f"{where}: clip '{video}' takes PyAV to be read: pip install \"mmrl[video]\"")
    return found


def _unit(frame: Tensor) -> Tensor:
    """A frame in [0, 1]; those of episodes are bytes."""
    return frame / 255 if frame.dtype == torch.uint8 else frame


class Question:
    """A text with fields such as ``{prompt}``, which become words or pictures.

    Args:
        template: braces around anything that is no field are left alone.
        words: fields that may stand in the template.
        pictures: fields for pictures; those that the template does not name are put in front of it, in this order.
        where: begins the message of an error.

    Raises:
        UserError: the template names a field that there is not.
    """

    def __init__(self, template: str, words: Sequence[str], pictures: Sequence[str] = ("media",), where: str = ""):
        named = re.findall(r"\{(\w+)\}", template)
        for name in named:
            if name not in (*words, *pictures):
                raise UserError(f"{where}: the question has {{{name}}} in it{nearest(name, [*words, *pictures])}")
        self.template = "".join(f"{{{name}}}" for name in pictures if name not in named) + template

    def case(self, **fields: str | Sequence[Picture]) -> Case:
        """The question about one sample; what is put into a field is not searched for fields again."""
        parts: list[Part] = []
        # Split by a group: text, field, text, field, ..., text.
        for i, piece in enumerate(re.split(r"\{(\w+)\}", self.template)):
            value = fields[piece] if i % 2 else piece
            for part in [value] if isinstance(value, str) else value:
                if isinstance(part, str) and parts and isinstance(parts[-1], str):
                    parts[-1] += part
                elif part != "":
                    parts.append(part)
        return tuple(parts)


def questions(texts: Mapping[Modality, str], name: str) -> dict[Modality, Question]:
    """The question about one output of each modality, which may say ``{prompt}`` and ``{completion}``."""
    return {kind: Question(text, ("prompt", "completion"), where=f"reward '{name}'") for kind, text in texts.items()}


def cases_of(asked: Mapping[Modality, Question], samples: Samples, frames: int, name: str) -> list[Case]:
    """The question of the samples' modality about each of them; ``name`` is the reward's, for messages."""
    question = asked[modality(samples, name)]
    return [
        question.case(prompt=subject.prompt, completion=subject.completion, media=subject.pictures)
        for subject in subjects(samples, frames, name)
    ]
