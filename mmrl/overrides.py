"""Config files as plain mappings: YAML in, dotted overrides, merging, YAML out."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from mmrl.errors import UserError, nearest


class _Loader(yaml.SafeLoader):
    """The safe loader with YAML 1.2's booleans and floats, refusing a key given twice.

    YAML 1.1, PyYAML's own dialect, reads ``no`` as false (``mixed_precision: no``) and ``1e-4`` as a string.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_BOOLEAN, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in pairs if tag not in (_BOOLEAN, _FLOAT)]
    for letter, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOLEAN, re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"^(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML; ``where`` (a file or an override) begins the error message.

    Raises:
        UserError: not YAML, or a key given twice, with the line.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark is not None else ""
        raise UserError(f"{where}{line}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not YAML: {error}") from error


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    if not path.is_file():
        what = "is a folder, not a config file" if path.is_dir() else "does not exist"
        near = nearest(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"config file '{path}' {what}{'' if path.is_dir() else near}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"config file '{path}' is not UTF-8 text (byte {error.start})") from error
    data = parse_yaml(text, str(path))
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise UserError(f"config file '{path}' should hold 'key: value' pairs, but holds {describe(data)}")
    return data


def write_yaml(data: Mapping[str, Any], path: Path) -> None:
    """Write plain values as YAML in the given order."""
    path.write_text(to_yaml(data), encoding="utf-8")


def to_yaml(data: Mapping[str, Any]) -> str:
    """Plain values as YAML text in the given order, readable by :func:`parse_yaml`."""
    return yaml.safe_dump(deepcopy(dict(data)), sort_keys=False, allow_unicode=True, width=110)


def parse_override(text: str) -> tuple[list[str], Any]:
    """``"rewards.0.weight=2"`` as ``(["rewards", "0", "weight"], 2)``; the value is YAML."""
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise UserError(f"override '{text}' should have the form key=value, e.g. trainer.lr=1e-4")
    return path, parse_yaml(value, f"override '{text}'")


def apply_override(data: dict[str, Any], path: Sequence[str], value: Any) -> None:
    """Set ``value`` in place at a dotted path; missing mappings are created, list items are addressed by index.

    Raises:
        UserError: the path goes through a value that is neither mapping nor list, or past the end of a list.
    """
    node: Any = data
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        so_far = ".".join(path[:depth])
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise UserError(
                    f"override '{'.'.join(path)}': '{key}' is not an index into '{so_far}', which has {len(node)} items"
                )
            index: Any = int(key)
        elif isinstance(node, dict):
            index = key
        else:
            raise UserError(f"override '{'.'.join(path)}': '{so_far}' is {describe(node)}, which has no keys")
        if last:
            node[index] = value
            return
        following = node[index] if isinstance(node, list) else node.get(index)
        if following is None:
            following = node[index] = {}
        node = following


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``base``: mappings merge key by key, everything else is replaced.

    A mapping whose ``type`` differs from the base's replaces it whole, since the options of one component mean nothing
    to another.
    """
    result = deepcopy(dict(base))
    for key, value in over.items():
        below = result.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping) and not _other_type(below, value):
            result[key] = merge(below, value)
        else:
            result[key] = deepcopy(value)
    return result


def _other_type(base: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    return "type" in over and over["type"] != base.get("type")


def get_path(data: Any, path: Sequence[str | int]) -> tuple[bool, Any]:
    """Whether plain values have something at ``path``, and what."""
    for key in path:
        if isinstance(data, Mapping) and key in data:
            data = data[key]
        elif isinstance(data, list) and str(key).isdigit() and int(key) < len(data):
            data = data[int(key)]
        else:
            return False, None
    return True, data


def describe(value: Any) -> str:
    """A value for an error message, shortened: ``'fast'``, ``a list``, ``a mapping``, ``nothing``."""
    if value is None:
        return "nothing"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
