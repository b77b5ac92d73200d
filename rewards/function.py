"""Plain Python functions as rewards.

Two kinds are told apart by their signature:

* ``def f(samples)``: one required parameter that is none of :data:`KEYWORDS`. It gets :class:`mmrl.types.Samples`.
* ``def f(completions, prompts, answer, **kwargs)``: at least one parameter is in :data:`KEYWORDS`. This is the
  signature of TRL: everything comes as keywords, one entry a sample, and every column of the data that the function
  names (or all, with ``**kwargs``) comes along.

Texts that come as keywords can be read as text and as the conversations that TRL gives for chat models:
``completions[i][0]["content"]`` is the text of completion i, and so is ``completions[i]``; see :class:`ChatText`.

Both may be ``async def``. Both return N numbers, with None for a sample that the function does not apply to. Further
parameters with a default are options, unless the data has a column of that name. A function may carry ``differentiable
= True`` or ``name = "..."`` as attributes.
"""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from torch import Tensor

from mmrl.errors import UserError
from mmrl.scoring import as_scores, in_daemon_thread, is_differentiable, reward_name
from mmrl.types import Samples

KEYWORDS = (
    "prompts",
    "completions",
    "texts",
    "images",
    "videos",
    "episodes",
    "target",
    "task",
    "ids",
    "truncated",
    "transcripts",
)


class ChatText(str):
    """A text that also reads like a conversation of one message: ``text[0]["content"]`` and ``text[-1]["content"]``.

    Functions written for TRL index so where the model chats, and take the text itself where it does not. In all else
    this is the text, so ``len`` counts letters and a loop goes over letters.
    """

    __slots__ = ()

    def __getitem__(self, index: Any) -> str:
        if type(index) is int and index in (0, -1):
            return _Message(super().__getitem__(slice(index, None) if index else slice(0, 1)), self)
        return super().__getitem__(index)


class _Message(str):
    """The first or last letter of a text, and what a mapping of role and content gives for that text."""

    def __new__(cls, letter: str, text: str) -> _Message:
        made = super().__new__(cls, letter)
        made.fields = {"role": "assistant", "content": str(text)}
        return made

    def __getitem__(self, key: Any) -> Any:
        return self.fields[key] if key in ("role", "content") else super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self.fields.get(key, default)


def _finished(found: Any) -> Any:
    """What an ``async def`` function returns when it is done; other results as they are."""
    if not inspect.isawaitable(found):
        return found

    async def wait(result: Awaitable) -> Any:
        return await result

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(wait(found))
    # A notebook's loop runs in this thread already, and a thread has but one.
    return in_daemon_thread(lambda: asyncio.run(wait(found))).result()


class FunctionReward:
    """A plain function behind the interface of rewards.

    Args:
        function: of one of the two kinds described in this module.
        options: values for those of its parameters that are options.

    Raises:
        UserError: the signature is of neither kind.
    """

    partial = True

    def __init__(self, function: Callable, options: Mapping[str, Any] | None = None):
        self.function = function
        defaults = {name: default for name, (_, default) in option_fields(function).items()}
        # A default must not hide a column of the data: "def f(completions, answer=None)" wants the answer.
        self.options = {name: value for name, value in (options or {}).items() if value != defaults.get(name)}
        self.name = reward_name(function)
        self.differentiable = is_differentiable(function)
        self.takes_samples = takes_samples(function)

    def __call__(self, samples: Samples) -> Tensor:
        """Scores ``[N]``; NaN where the function returned None."""
        if self.takes_samples:
            found = self.function(samples, **self.options)
        else:
            found = self.function(**self._keywords(samples), **self.options)
        found = _finished(found)
        return as_scores(self.name, found, samples, getattr(self.function, "partial", False))

    def _keywords(self, samples: Samples) -> dict[str, Any]:
        columns = _columns(samples)
        wanted = [p for p in _parameters(self.function) if p.name not in self.options]
        for p in wanted:
            if p.name not in columns and p.default is p.empty:
                raise UserError(
                    f"reward '{self.name}' wants '{p.name}', which the data does not have "
                    f"(it has {', '.join(sorted(columns))})"
                )
        if _takes_any_keyword(self.function):
            return {name: column for name, column in columns.items() if name not in self.options}
        return {p.name: columns[p.name] for p in wanted if p.name in columns}


def takes_samples(function: Callable) -> bool:
    """Whether a function gets the Samples (True) or keywords (False); ``UserError`` if its signature fits neither."""
    parameters = _parameters(function)
    if any(p.name in KEYWORDS for p in parameters):
        return False
    required = [p for p in parameters if p.default is p.empty]
    if len(required) == 1 and parameters[0] is required[0] and required[0].kind is not inspect.Parameter.KEYWORD_ONLY:
        return True
    signature = f"{reward_name(function)}{inspect.signature(function)}"
    raise UserError(
        f"a reward function takes the samples as its only required parameter, or keywords such as prompts, completions "
        f"and images; {signature} does neither"
    )


def option_fields(function: Callable) -> dict[str, tuple[Any, Any]]:
    """Name to (type, default) of the parameters that are options: those with a default, outside :data:`KEYWORDS`."""
    hints = typing.get_type_hints(function, include_extras=True)
    takes_samples(function)
    return {
        p.name: (hints.get(p.name, Any), p.default)
        for p in _parameters(function)
        if p.default is not p.empty and p.name not in KEYWORDS
    }


def _parameters(function: Callable) -> list[inspect.Parameter]:
    every = inspect.signature(function).parameters.values()
    return [p for p in every if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def _takes_any_keyword(function: Callable) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())


def _items(output: Any) -> list[Any]:
    return [ChatText(item) if isinstance(item, str) else item for item in output]


def _columns(samples: Samples) -> dict[str, Any]:
    """What a function can ask for by keyword; every value has one entry a sample."""
    prompts = samples.prompts
    names = {name for prompt in prompts for name in prompt.metadata}
    columns = {name: [prompt.metadata.get(name) for prompt in prompts] for name in names}
    outputs = (samples.texts, samples.images, samples.videos, samples.episodes)
    columns |= {
        "prompts": [ChatText(prompt.text) for prompt in prompts],
        "completions": next((_items(output) for output in outputs if output is not None), []),
        # Of a model that writes, the pictures are those that it was shown.
        "images": [list(prompt.images) for prompt in prompts] if samples.images is None else samples.images,
        "target": [prompt.target for prompt in prompts],
        "task": [prompt.task for prompt in prompts],
        "ids": [prompt.id for prompt in prompts],
    }
    more = {"texts": samples.texts, "videos": samples.videos, "episodes": samples.episodes}
    more["transcripts"] = samples.transcripts
    more["truncated"] = None if samples.truncated is None else samples.truncated.tolist()
    return columns | {name: column for name, column in more.items() if column is not None}
