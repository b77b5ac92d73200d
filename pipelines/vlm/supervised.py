"""Responses to learn from: their tokens behind their prompts, and which of them count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from pipelines.vlm.inputs import Processed, Reader
from pipelines.vlm.media import Shelf
from pipelines.vlm.prefix import Trace, joined_trace


def fit_length(prompt: Prompt) -> int:
    """About how long a row to learn from is, in characters, for putting like with like; pictures do not count."""
    turns = [turn["content"] for turn in prompt.messages] or [prompt.text]
    parts = [part for turn in turns for part in ([turn] if isinstance(turn, str) else turn)]
    words = [part if isinstance(part, str) else str(part.get("text") or "") for part in parts]
    return sum(map(len, words)) + len(str(prompt.metadata.get("response", prompt.target)))


class Answers:
    """Turns samples with responses into traces.

    Args:
        reader: of prompts.
        eos: ids that end a turn, long ``[E]``.
    """

    def __init__(self, reader: Reader, eos: Tensor):
        self.reader = reader
        self.eos = set(eos.tolist())
        self._end: int | None = None

    def trace(self, samples: Samples) -> tuple[Trace, Tensor]:
        """What follows each prompt, and the tokens ``[N, T]`` of it that are the model's to say.

        Raises:
            UserError: a row has no response.
        """
        prompts = samples.prompts
        plain = [i for i, prompt in enumerate(prompts) if samples.texts is not None or not _is_dialogue(prompt)]
        processed = dict(zip(plain, self.reader.read([prompts[i] for i in plain]), strict=True))
        heads: list[Processed] = []
        rest: list[list[tuple[Processed, bool]]] = []
        for i, prompt in enumerate(prompts):
            if i in processed:
                text = response(prompt) if samples.texts is None else samples.texts[i]
                ended = samples.truncated is None or not bool(samples.truncated[i])
                heads.append(processed[i])
                rest.append([(self._said(text, ended), True)])
            else:
                head, parts = self._dialogue(prompt)
                heads.append(head)
                rest.append(parts)
        return joined_trace(self.reader, heads, rest)

    def _said(self, text: str, ended: bool = True) -> Processed:
        ids = self.reader.answer_ids(text) if text else torch.zeros(0, dtype=torch.long)
        if ended:
            ids = torch.cat([ids, torch.tensor([self.end_id()])])
        return self.reader.plain(ids)

    def end_id(self) -> int:
        """The id that ends the assistant's turn in the chat template, else the first end id of the model."""
        if self._end is None:
            user = {"role": "user", "content": [{"type": "text", "text": "a"}]}
            said = {"role": "assistant", "content": [{"type": "text", "text": "b"}]}
            before = self.reader.render([user], True)
            whole = self.reader.render([user, said], False)
            after = whole[len(before) :] if whole.startswith(before) else whole
            ids = self.reader.answer_ids(after).tolist()
            default = self.reader.tokenizer.eos_token_id
            default = default if default in self.eos else min(self.eos)
            self._end = next((index for index in ids if index in self.eos), default)
        return self._end

    def _dialogue(self, prompt: Prompt) -> tuple[Processed, list[tuple[Processed, bool]]]:
        """A conversation with turns of the assistant: what comes before the first, then turns and what lies between."""
        row = prompt.id or prompt.text[:40]
        shelf = Shelf(self.reader.counters)
        with shelf.in_processor(self.reader.processor):
            messages, pictures, clips = self.reader.conversation(prompt, shelf)
            turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            done, used_pictures, used_clips = "", 0, 0
            head: Processed | None = None
            parts: list[tuple[Processed, bool]] = []
            for turn in turns:
                opening = self.reader.render(messages[:turn], True)
                if not opening.startswith(done):
                    raise UserError(
                        f"row '{row}': the chat template rewrites earlier turns, so that those of the assistant cannot "
                        "be told apart: give the last one as 'response'"
                    )
                pictures_here = _count(messages[:turn], "image")
                clips_here = _count(messages[:turn], "video")
                read = self.reader.process(
                    opening[len(done) :],
                    pictures[used_pictures:pictures_here],
                    clips[used_clips:clips_here],
                    shelf,
                    row,
                    first=head is None,
                )
                used_pictures, used_clips = pictures_here, clips_here
                if head is None:
                    head = read
                else:
                    parts.append((read, False))
                text = "".join(part["text"] for part in messages[turn]["content"] if part["type"] == "text")
                said = self._said(text)
                parts.append((said, True))
                done = self._done(opening, text, self.reader.render(messages[: turn + 1], False), row)
        return head, parts

    def _done(self, opening: str, text: str, closed: str, row: str) -> str:
        """The text up to and including the end token of a turn; what the template writes behind it comes next."""
        end = self.reader.tokenizer.convert_ids_to_tokens(self.end_id())
        for candidate in (opening + text + end, opening + text.strip() + end):
            if closed.startswith(candidate):
                return candidate
        raise UserError(
            f"row '{row}': the chat template rewrites what the assistant said, so that its tokens cannot be told "
            "apart: give it as 'response'"
        )


def response(prompt: Prompt) -> str:
    """What a supervised row wants the model to say.

    Raises:
        UserError: there is nothing.
    """
    text = prompt.metadata.get("response")
    if text is None and isinstance(prompt.target, str):
        text = prompt.target
    if not isinstance(text, str):
        raise UserError(
            f"row '{prompt.id or prompt.text[:40]}': there is no response to learn: it should have a column "
            "'response', a text as 'target', or a turn of the assistant in 'messages'"
        )
    return text


def _is_dialogue(prompt: Prompt) -> bool:
    return "response" not in prompt.metadata and any(message.get("role") == "assistant" for message in prompt.messages)


def _count(messages: Sequence[Mapping[str, Any]], kind: str) -> int:
    return sum(part["type"] == kind for message in messages for part in message["content"])
