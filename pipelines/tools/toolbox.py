"""Calls of tools inside what a model wrote: found, checked, carried out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mmrl.dialogue import CallError, Observation, Situation, Tool
from mmrl.errors import UserError, nearest
from mmrl.options import Strict, options_model, validate, values

OPEN, CLOSE = "<tool_call>", "</tool_call>"
CALL = re.compile(rf"{OPEN}(.*?)(?:{CLOSE}|(?={OPEN})|\Z)", re.DOTALL)
BadCalls = Literal["tell", "end"]


class Toolbox:
    """The environment of a model that calls tools.

    A call is ``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, as Qwen and Hermes models write it. A turn
    without one is the model's answer and ends the dialogue.

    Args:
        tools: that may be called.
        bad_calls: a call that makes no sense is answered with ``error: ...`` (``tell``) or ends the dialogue (``end``).
        calls_per_turn: further calls of a turn are not carried out.
    """

    def __init__(self, tools: Sequence[Tool], bad_calls: BadCalls = "tell", calls_per_turn: int = 1):
        self.tools = {tool.name: tool for tool in tools}
        self.models: dict[str, type[Strict]] = {
            tool.name: options_model(tool.__call__, skip=("situation",), name=tool.name) for tool in tools
        }
        self.bad_calls = bad_calls
        self.calls_per_turn = calls_per_turn

    def schemas(self) -> list[dict[str, Any]]:
        """The tools as chat templates take them."""
        return [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": tool.description,
                    "parameters": _untitled(self.models[name].model_json_schema()),
                },
            }
            for name, tool in self.tools.items()
        ]

    def step(self, text: str, situation: Situation) -> Observation | None:
        """Carry out the calls in ``text``; None where there are none.

        Raises:
            UserError: a tool failed on arguments that it declared good; names tool and row.
        """
        found = CALL.findall(text)
        if not found:
            return None
        parts = [self._answer(call, situation) for call in found[: self.calls_per_turn]]
        left_out = len(found) - len(parts)
        if left_out:
            parts.append(_error(f"only {self.calls_per_turn} calls a turn are carried out, {left_out} were left out"))
        errors = sum(part.errors for part in parts)
        if errors and self.bad_calls == "end":
            return None
        return Observation(
            "\n".join(part.text for part in parts if part.text),
            [image for part in parts for image in part.images],
            [name for part in parts for name in part.calls],
            errors,
        )

    def _answer(self, call: str, situation: Situation) -> Observation:
        try:
            name, arguments = self._read(call)
        except CallError as error:
            return _error(str(error))
        tool = self.tools[name]
        try:
            return tool(situation, **arguments)
        except CallError as error:
            return _error(str(error))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"tool '{name}' failed on row '{situation.row}' for the call {' '.join(call.split())[:200]}: {reason}"
            ) from error

    def _read(self, call: str) -> tuple[str, dict[str, Any]]:
        """Name and checked arguments of a call; ``CallError`` if it makes no sense."""
        try:
            data = json.loads(call)
        except (ValueError, RecursionError) as error:
            raise CallError("a tool call should be JSON with 'name' and 'arguments'") from error
        if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
            raise CallError("a tool call should be a JSON object with 'name' and 'arguments'")
        name, arguments = data["name"], data.get("arguments", {})
        if name not in self.tools:
            raise CallError(f"there is no tool '{name[:40]}'{nearest(name[:40], self.tools)}")
        if not isinstance(arguments, Mapping):
            raise CallError("the arguments of a tool call should be a JSON object")
        try:
            return name, values(validate(self.models[name], arguments, where=name, path=""))
        except UserError as error:
            raise CallError(str(error)[:200]) from error


def _error(sentence: str) -> Observation:
    return Observation(f"error: {sentence}", errors=1)


def _untitled(schema: Any) -> Any:
    """A JSON schema without the titles that pydantic gives to everything."""
    if isinstance(schema, Mapping):
        # A property of that name is a mapping.
        return {key: _untitled(value) for key, value in schema.items() if key != "title" or isinstance(value, Mapping)}
    return [_untitled(item) for item in schema] if isinstance(schema, list) else schema
