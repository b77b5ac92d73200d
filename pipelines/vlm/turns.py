"""How the turns of a dialogue are written: by the model's own chat template, whatever the family."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.errors import UserError
from pipelines.vlm.inputs import Reader

MARK = "REPLY0MARK"
"""Stands for what the model said while the text behind it is found."""

Message = Mapping[str, Any]


class Turns:
    """Writes what stands between two turns of the model, and what tools there are.

    A template that takes ``tools`` and writes turns of the role ``tool`` with pictures, as that of Qwen3-VL does, is
    used as it is. For others the tools are described in the system prompt, and their answers are turns of the user,
    inside ``<tool_response>`` tags.

    Args:
        reader: of prompts; the tools become part of the prompts it reads.
        schemas: of the tools.
        describe: tell the model about the tools; a model that was trained with them may need no telling.

    Attributes:
        native: whether the template does all of this itself.

    Raises:
        UserError: there is no chat template, or it does not show what the assistant says.
    """

    def __init__(self, reader: Reader, schemas: Sequence[Mapping[str, Any]], describe: bool = True):
        self.reader = reader
        self.schemas = [dict(schema) for schema in schemas]
        self.describe = describe and bool(schemas)
        tokenizer, processor = reader.tokenizer, reader.processor
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(getattr(processor, f"{kind}_token", None) or "") for kind in ("image", "video", "audio")}
        self.special = sorted(special - {""}, key=len, reverse=True)
        self.native = self._takes_tools()
        if self.native and self.describe:
            reader.chat_options["tools"] = self.schemas
        reader.prepare = self.prepare
        user = {"role": "user", "content": [_text("a")]}
        if MARK not in reader.render([user, _assistant(MARK)], False):
            raise UserError(
                f"{type(processor).__name__} has no chat template that writes dialogues, so tools cannot be used"
            )

    def prepare(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """A conversation with the tools described, and written-down answers of tools as they come in dialogues."""
        if self.native:
            return messages
        messages = [_wrapped(message["content"]) if message["role"] == "tool" else message for message in messages]
        if not self.describe:
            return messages
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": []}, *messages]
        told = [*messages[0]["content"], _text(("\n\n" if messages[0]["content"] else "") + self._description())]
        return [{**messages[0], "content": told}, *messages[1:]]

    def observation(self, text: str, images: int) -> dict[str, Any]:
        """The turn that answers the model."""
        content = [*([_text(self.harmless(text))] if text else []), *({"type": "image"} for _ in range(images))]
        return {"role": "tool", "content": content} if self.native else _wrapped(content)

    def between(self, messages: Sequence[Message], answer: Message, end: str) -> str:
        """What follows the model's latest turn, up to where it goes on.

        Args:
            messages: before that turn.
            answer: see :meth:`observation`.
            end: the token by which the model ended the turn itself, "" if it did not.
        """
        whole = self.reader.render([*messages, _assistant(MARK), answer], True)
        return whole.partition(MARK)[2].removeprefix(end)

    def harmless(self, text: str) -> str:
        """``text`` without what a tokenizer would take for special tokens, such as the place holder of a picture."""
        # Taking one out may put another together.
        while any(token in text for token in self.special):
            for token in self.special:
                text = text.replace(token, "")
        return text

    def _takes_tools(self) -> bool:
        from jinja2 import TemplateError

        if not self.schemas:
            return False
        name = self.schemas[0]["function"]["name"]
        start = [{"role": "user", "content": [_text("a")]}, _assistant("b")]
        options = dict(self.reader.chat_options)
        self.reader.chat_options["tools"] = self.schemas
        try:
            bare = self.reader.render([*start, {"role": "tool", "content": [_text(MARK)]}], True)
            shown = self.reader.render([*start, {"role": "tool", "content": [_text(MARK), {"type": "image"}]}], True)
        except (TemplateError, TypeError, KeyError, ValueError):
            # Templates refuse what they do not know in their own ways.
            return False
        finally:
            self.reader.chat_options = options
        return name in bare and MARK in bare and len(shown) > len(bare)

    def _description(self) -> str:
        tools = "\n".join(json.dumps(schema["function"]) for schema in self.schemas)
        return (
            "You may call these tools while you think, one at a time. Each is given as JSON with the schema of its "
            f"arguments:\n<tools>\n{tools}\n</tools>\nTo call one, end your turn with\n"
            '<tool_call>{"name": its name, "arguments": {its arguments}}</tool_call>\n'
            "and its answer will follow. A turn without a call is your final answer."
        )


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [_text(text)]}


def _wrapped(content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"role": "user", "content": [_text("<tool_response>"), *content, _text("</tool_response>")]}
