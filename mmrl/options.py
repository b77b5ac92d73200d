"""Options of a component, read from the typed signature of its constructor and checked by pydantic."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from mmrl.errors import UserError, nearest
from mmrl.overrides import describe, get_path


class Strict(BaseModel):
    """A section of the config: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, validate_default=True)


def signature_fields(target: Callable, skip: Iterable[str] = ()) -> tuple[dict[str, tuple[Any, Any]], bool]:
    """Name to (type, default) for the parameters of ``target`` that a config can set, and whether it takes any keyword.

    The first parameter of a bound or plain ``__init__`` (``self``) is not one of them, nor are the names in ``skip``.
    A parameter without annotation accepts anything; one without default is required.
    """
    function = target.__init__ if inspect.isclass(target) else target
    parameters = list(inspect.signature(target).parameters.values())
    hints = typing.get_type_hints(function, include_extras=True)
    found: dict[str, tuple[Any, Any]] = {}
    open_ended = False
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        if parameter.name in skip or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
            parameter.POSITIONAL_ONLY,
        ):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        found[parameter.name] = (hints.get(parameter.name, Any), default)
    return found, open_ended


def options_model(target: Callable, skip: Iterable[str] = (), *, name: str | None = None) -> type[Strict]:
    """The options of ``target`` (a class or function) as a pydantic model; see :func:`signature_fields`."""
    found, open_ended = signature_fields(target, skip)
    return model_from_fields(name or target.__name__, found, open_ended)


def model_from_fields(name: str, found: Mapping[str, tuple[Any, Any]], open_ended: bool = False) -> type[Strict]:
    """A model with the given fields; with ``open_ended`` further keys are kept as they are."""
    config = ConfigDict(
        extra="allow" if open_ended else "forbid",
        arbitrary_types_allowed=True,
        protected_namespaces=(),
    )
    # Field names that a pydantic model has for itself ("copy", "json", "schema"...) travel under an alias.
    fields: dict[str, Any] = {}
    for key, (kind, default) in found.items():
        own = f"{key}_" if hasattr(BaseModel, key) or key.startswith("_") else key
        fields[own.lstrip("_")] = (kind, Field(default=default, alias=key) if own != key else default)
    return create_model(name, __config__=config, **fields)


def values(model: BaseModel) -> dict[str, Any]:
    """The validated values by option name, nested dataclasses as objects: keywords for the target."""
    named = {field.alias or key: getattr(model, key) for key, field in type(model).model_fields.items()}
    return {**named, **(model.model_extra or {})}


def plain(model: BaseModel) -> dict[str, Any]:
    """The validated values as what YAML can hold."""
    return model.model_dump(mode="json", by_alias=True)


def validate(model: type[BaseModel], data: Any, *, where: str, path: str) -> BaseModel:
    """Check ``data`` against ``model``.

    Args:
        where: begins the message, e.g. the config file.
        path: dotted key of ``data`` in that file.

    Raises:
        UserError: for the first fault, unknown keys before all others; one sentence with dotted key, value, what is
            expected, or the nearest spelling.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: '{path}' should hold 'key: value' pairs, but is {describe(data)}")
    try:
        checked = model.model_validate(data)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        unknown = [fault for fault in faults if fault["type"] in _UNKNOWN]
        raise UserError(f"{where}: {_sentence(model, data, path, unknown or faults)}") from error
    # To Python true is the number 1; to a reader of the config it is a mistake.
    for keys, value in _booleans(data):
        found, became = get_path(values(checked), keys)
        if found and type(became) in (int, float):
            dotted = ".".join([path, *keys] if path else keys)
            raise UserError(f"{where}: '{dotted}' is {str(value).lower()}, but should be a number")
    return checked


def _booleans(data: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], bool]]:
    if isinstance(data, bool):
        yield keys, data
    parts = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, (list, tuple)) else ()
    for key, value in parts:
        yield from _booleans(value, (*keys, str(key)))


_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")


def _sentence(model: type[BaseModel], data: Mapping, path: str, faults: list[dict]) -> str:
    first = faults[0]
    keys = _real_keys(first, data)
    # The branch of a union that got furthest into the value is the one that was meant.
    inside = [f for f in faults if len(_real_keys(f, data)) > len(keys) and _real_keys(f, data)[: len(keys)] == keys]
    if inside:
        return _sentence(model, data, path, inside)
    dotted = ".".join([path, *map(str, keys)] if path else map(str, keys))
    if first["type"] in _UNKNOWN:
        return f"unknown key '{dotted}'{nearest(str(keys[-1]), _choices(model, keys[:-1]))}"
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"'{dotted}' is missing"
    # The branches of a union fail side by side: "a number or 'all'".
    same = [fault for fault in faults if _real_keys(fault, data) == keys]
    expected = " or ".join(dict.fromkeys(_expectation(fault) for fault in same))
    if first["type"] in ("value_error", "assertion_error"):
        return f"'{dotted}' {_expectation(first)}"
    value = get_path(data, keys)[1]
    if first["type"] == "too_long" and first["ctx"]["field_type"] == "Tuple":
        length = first["ctx"]["max_length"]
        things = "numbers" if all(isinstance(item, (int, float)) for item in value) else "entries"
        return f"'{dotted}' is {value}, but should be a list of {_COUNTS.get(length, length)} {things}"
    hint = ""
    literals = [fault for fault in same if fault["type"] == "literal_error"]
    if literals and isinstance(value, str):
        choices = [part.strip(" '") for part in literals[0]["ctx"]["expected"].replace(" or ", ", ").split(",")]
        hint = nearest(value, choices) if "did you mean" in nearest(value, choices) else ""
    return f"'{dotted}' is {describe(value)}, but should be {expected}{hint}"


def _real_keys(fault: Mapping, data: Any) -> list[str | int]:
    """The fault's location without the names of union branches that pydantic puts in between."""
    location = fault["loc"]
    keys: list[str | int] = []
    for position, part in enumerate(location):
        absent = position == len(location) - 1 and fault["type"].startswith("missing")
        if absent or get_path(data, [*keys, part])[0]:
            keys.append(part)
    return keys


_COUNTS = {2: "two", 3: "three", 4: "four"}

_WORDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
    "path_type": "a path",
}


def _expectation(fault: Mapping) -> str:
    kind, context = fault["type"], fault.get("ctx", {})
    if kind in ("value_error", "assertion_error"):
        return fault["msg"].partition(", ")[2] or fault["msg"]
    if kind == "literal_error":
        return context["expected"]
    message = fault["msg"].removeprefix("Input should be ")
    return _WORDS.get(kind, message[:1].lower() + message[1:])


def _choices(model: Any, keys: Iterable[str | int]) -> list[str]:
    """The keys that are allowed at a place inside a model."""
    kinds = [model]
    for key in keys:
        following: list[Any] = []
        for kind in kinds:
            nested = _keys(kind)
            if key in nested:
                following += _structures(nested[key])
        kinds = following or kinds
    return [name for kind in kinds for name in _keys(kind)]


def _keys(kind: Any) -> dict[str | int, Any]:
    if inspect.isclass(kind) and issubclass(kind, BaseModel):
        return {field.alias or key: field.annotation for key, field in kind.model_fields.items()}
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return {field.name: hints[field.name] for field in dataclasses.fields(kind)}
    return {}


def _structures(annotation: Any) -> list[Any]:
    """The models and dataclasses inside an annotation, through unions, lists and Annotated."""
    if inspect.isclass(annotation) and (dataclasses.is_dataclass(annotation) or issubclass(annotation, BaseModel)):
        return [annotation]
    return [found for part in typing.get_args(annotation) for found in _structures(part)]


def find_paths(options: Mapping[str, Any], folders: Iterable[Path]) -> dict[str, Any]:
    """Relative paths among the top-level text options made absolute against the first folder that has them.

    Only text with a slash or a leading dot is looked at, so that ``color: red`` is no path. Text that no folder has,
    such as a hub id, stays as it is.
    """
    folders = list(folders)
    return {
        key: absolute_if_found(value, folders) if isinstance(value, str) and re.search(r"^\.|/", value) else value
        for key, value in options.items()
    }


def absolute_if_found(value: str, folders: Iterable[Path]) -> str:
    """A path made absolute against the first folder that has it; else as it is."""
    for folder in folders:
        candidate = folder / Path(value).expanduser()
        if candidate.exists():
            return str(candidate.resolve())
    return value
