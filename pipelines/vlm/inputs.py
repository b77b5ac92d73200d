"""From rows to what the model reads: chat text, token ids, processed pictures, positions."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.media import CLIP_KEYS, PICTURE_KEYS
from mmrl.types import Prompt
from pipelines.vlm.media import Media, Shelf, processed_sizes

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
TEXT_KEYS = ("input_ids", "attention_mask", *TOKEN_TYPES)


@dataclass(eq=False)
class Processed:
    """A prompt as the model reads it; all rows of a group hold the same object.

    Attributes:
        ids: long ``[P]`` token ids.
        token_types: further inputs ``[P]`` that are aligned with the ids.
        media: its pictures and clips, in order.
        positions: long ``[3, P]`` for models with rotary positions in three dimensions, else ``[1, P]``.
        delta: the position of token t after the prompt is ``P + t + delta``.
        sizes: (height, width) of each picture as the model sees it.
        row: id of the row, for messages.
        text: what was tokenised.
    """

    ids: Tensor
    token_types: dict[str, Tensor]
    media: list[Media]
    positions: Tensor
    delta: int
    sizes: list[tuple[int, int]] = field(default_factory=list)
    row: str = ""
    text: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def types(self) -> Tensor:
        """Long ``[P]``, not 0 at place holders of pictures, for families that are told so."""
        return next(
            (self.token_types[key] for key in TOKEN_TYPES if key in self.token_types), torch.zeros_like(self.ids)
        )


class Reader:
    """Turns prompts into :class:`Processed`.

    Args:
        model, processor: that belong together.
        counters: see :class:`pipelines.vlm.media.Shelf`.
        system_prompt: put in front of conversations that have none of their own.
        max_tokens: longest prompt; longer ones are refused.
        chat_options: further variables of the chat template, e.g. ``{enable_thinking: false}``.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        counters: Counter,
        system_prompt: str | None = None,
        max_tokens: int | None = None,
        chat_options: Mapping[str, Any] | None = None,
    ):
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.counters = counters
        self.system_prompt = system_prompt
        self.max_tokens = max_tokens
        self.chat_options = dict(chat_options or {})
        # How conversations change before they are written, where tools are described in them.
        self.prepare: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None
        self._image_id = getattr(model.config, "image_token_id", None)
        self._video_id = getattr(model.config, "video_token_id", None)
        self._rope_index = getattr(model.base_model, "get_rope_index", None)
        self._rope_inputs = frozenset(inspect.signature(self._rope_index).parameters if self._rope_index else ())
        self._has_template = any(getattr(p, "chat_template", None) for p in (processor, self.tokenizer))

    def read(self, prompts: Sequence[Prompt]) -> list[Processed]:
        """One for each prompt; a prompt that is there twice gives the same object twice.

        Raises:
            UserError: a picture is missing or broken, or a prompt is too long; names the row.
        """
        shelf, seen = Shelf(self.counters), {}
        with shelf.in_processor(self.processor):
            for prompt in prompts:
                if id(prompt) not in seen:
                    messages, pictures, clips = self.conversation(prompt, shelf)
                    text = self.render(messages, True)
                    row = prompt.id or prompt.text[:40]
                    seen[id(prompt)] = self.process(text, pictures, clips, shelf, row, options=prompt.inputs)
        return [seen[id(prompt)] for prompt in prompts]

    def conversation(self, prompt: Prompt, shelf: Shelf) -> tuple[list[dict[str, Any]], list[Any], list[Any]]:
        """Messages with parts, and the opened pictures and clips in the order of their parts."""
        row = prompt.id or prompt.text[:40]
        messages = [
            {**message, "content": _parts(message.get("content"), row)}
            for message in prompt.messages or [{"role": "user", "content": prompt.text}]
        ]
        found = {}
        for kind, keys, given, open_it in (
            ("image", PICTURE_KEYS, prompt.images, shelf.picture),
            ("video", CLIP_KEYS, prompt.videos, shelf.clip),
        ):
            _place(messages, kind, keys, given, row)
            parts = [part for message in messages for part in message["content"] if part["type"] == kind]
            rest = iter(given)
            found[kind] = [open_it(next(rest) if _own(part, keys) is None else _own(part, keys), row) for part in parts]
        if self.system_prompt is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.system_prompt}]})
        messages = [_plain(message) for message in messages]
        return self.prepare(messages) if self.prepare else messages, found["image"], found["video"]

    def render(self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool) -> str:
        """The conversation as text by the chat template; without a template its texts, pictures first."""
        if self._has_template:
            renderer = self.processor if getattr(self.processor, "chat_template", None) else self.tokenizer
            return renderer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=generation_prompt, **self.chat_options
            )
        parts = [part for message in messages for part in message["content"]]
        marks = {kind: getattr(self.processor, f"{kind}_token", None) or "" for kind in ("image", "video")}
        media = "".join(marks[part["type"]] for part in parts if part["type"] in marks)
        return media + "\n".join(part["text"] for part in parts if part["type"] == "text")

    def process(
        self,
        text: str,
        pictures: Sequence[Any],
        clips: Sequence[Any],
        shelf: Shelf,
        row: str,
        first: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> Processed:
        """Tokenise text with pictures.

        Args:
            text: with a mark for each of the opened ``pictures`` and ``clips``.
            first: False for text that goes on a conversation.
            options: further arguments of the processor.
        """
        given: dict[str, Any] = {}
        if pictures:
            given["images"] = [list(pictures)]
        if clips:
            given |= {"videos": [list(clips)]} | _clip_options(self.processor, clips)
        given |= options or {}
        bos = self.tokenizer.bos_token
        if not first or (bos and text.startswith(bos)):
            given["add_special_tokens"] = False
        try:
            data = self.processor(text=[text], return_tensors="pt", **given)
        except (ValueError, IndexError, RuntimeError, OSError, ImportError) as error:
            raise UserError(f"row '{row}': the processor refuses it: {error}") from error
        ids = data["input_ids"][0]
        if first and self.max_tokens is not None and len(ids) > self.max_tokens:
            raise UserError(
                f"row '{row}': its prompt has {len(ids)} tokens, but at most {self.max_tokens} are allowed "
                "(max_prompt_tokens, or the context less max_new_tokens); shrink its pictures or leave it out"
            )
        if pictures and self._image_id is not None and self._image_id not in ids:
            raise UserError(
                f"row '{row}': processor and model disagree: {type(self.processor).__name__} wrote no token "
                f"{self._image_id}, which is where the model puts pictures; load both from one place"
            )
        tensors = {key: value for key, value in data.items() if key not in TEXT_KEYS}
        media = []
        if pictures or clips:
            key = tuple(shelf.key(item) for item in (*pictures, *clips))
            as_pictures = bool(clips) and (self._video_id is None or self._video_id not in ids)
            apart = "pixel_values_videos" in tensors or getattr(tensors.get("pixel_values"), "ndim", 0) > 4
            if as_pictures and pictures and apart:
                # Which features belong to which place holders is then unknown.
                raise UserError(
                    f"row '{row}': {type(self.processor).__name__} takes pictures or clips in a row, not both"
                )
            media = [shelf.media.setdefault(key, Media(tensors, len(pictures), len(clips), as_pictures))]
        types = {key: data[key][0] for key in TOKEN_TYPES if key in data}
        positions, delta = self.positions(ids, types, media)
        sizes = processed_sizes(self.processor, tensors, pictures)
        return Processed(ids, types, media, positions, delta, sizes, row, text)

    def positions(self, ids: Tensor, types: Mapping[str, Tensor], media: Sequence[Media]) -> tuple[Tensor, int]:
        """Positions ``[3 or 1, P]`` of the tokens, and how far the next one is from P."""
        if self._rope_index is None:
            return torch.arange(len(ids))[None], 0
        accepted = self._rope_inputs
        # Pixels are left out before joining, which copies.
        known = join_tensors([{key: value for key, value in m.tensors.items() if key in accepted} for m in media])
        known |= {key: value[None] for key, value in types.items() if key in accepted}
        if "mm_token_type_ids" in accepted and "mm_token_type_ids" not in known:
            known["mm_token_type_ids"] = torch.zeros_like(ids)[None]
        positions, delta = self._rope_index(input_ids=ids[None], **known)
        return positions[:, 0], int(delta.flatten()[0])

    def plain(self, ids: Tensor) -> Processed:
        """Tokens of text alone that go on a conversation."""
        return Processed(ids, {}, [], torch.zeros(1, len(ids), dtype=torch.long), 0)

    def positions_after(self, head: Processed, ids: Tensor, types: Tensor, media: Sequence[Media]) -> Tensor:
        """Positions ``[3 or 1, t]`` of tokens that follow a prompt, with the pictures among them."""
        if not media:
            steps = torch.arange(len(ids)) + len(head) + head.delta
            return steps.expand(len(head.positions), -1)
        before = head.token_types.get("mm_token_type_ids", torch.zeros_like(head.ids))
        whole = {"mm_token_type_ids": torch.cat([before, types.to(before.dtype)])}
        positions, _ = self.positions(torch.cat([head.ids, ids]), whole, [*head.media, *media])
        return positions[:, len(head) :]

    def answer_ids(self, text: str) -> Tensor:
        """Token ids of what the model says, without special tokens around."""
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0].long()


def join_tensors(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Processed media of several prompts in one batch: joined along their first dimension."""
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for part in parts for key in part):
        values = [part[key] for part in parts if key in part]
        if isinstance(values[0], Tensor):
            joined[key] = torch.cat(values)
        elif isinstance(values[0], (list, tuple)):
            joined[key] = [item for value in values for item in value]
    return joined


def _clip_options(processor: Any, clips: Sequence[Any]) -> dict[str, Any]:
    """Frames given as pictures are all read, as if taken at the processor's own rate; files it samples itself."""
    if not all(isinstance(clip, list) for clip in clips):
        return {}
    rate = getattr(processor.video_processor, "fps", None) or 2.0
    metadata = [{"total_num_frames": len(c), "fps": rate, "frames_indices": list(range(len(c)))} for c in clips]
    return {"do_sample_frames": False, "video_metadata": metadata}


def _parts(content: Any, row: str) -> list[dict[str, Any]]:
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts = [{"type": "text", "text": part} if isinstance(part, str) else dict(part) for part in content]
    for part in parts:
        if part.get("type") == "image_url":
            own = part.pop("image_url")
            part |= {"type": "image", "image": own["url"] if isinstance(own, Mapping) else own}
        if part.get("type") not in ("text", "image", "video"):
            raise UserError(f"row '{row}': a message has a part of type {part.get('type')!r}: use text, image or video")
    return parts


def _own(part: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """What a part brings itself, if anything."""
    return next((part[key] for key in keys if part.get(key) is not None), None)


def _place(messages: list[dict], kind: str, keys: Sequence[str], given: Sequence[Any], row: str) -> None:
    """Give every item a part: those the messages have, or new ones in front of the first user turn."""
    waiting = [
        part for message in messages for part in message["content"] if part["type"] == kind and _own(part, keys) is None
    ]
    if len(given) and not waiting:
        users = [message for message in messages if message["role"] == "user"] or messages
        users[0]["content"] = [{"type": kind} for _ in given] + users[0]["content"]
    elif len(waiting) != len(given):
        raise UserError(f"row '{row}': its messages have {len(waiting)} {kind} parts, but it has {len(given)} {kind}s")


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with pictures by type alone: templates write a mark for them, contents travel beside."""
    content = [
        {"type": p["type"], "text": p["text"]} if p["type"] == "text" else {"type": p["type"]}
        for p in message["content"]
    ]
    return {**message, "content": content}
