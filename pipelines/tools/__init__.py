"""Tools that a model may call in the middle of its answer. Names are looked up lazily."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmrl.errors import UserError, nearest
from mmrl.registry import load_object

TOOLS: dict[str, tuple[str, str]] = {
    "crop_zoom": ("pipelines.tools.crop_zoom:CropZoom", "a part of a picture at its full resolution"),
    "draw_box": ("pipelines.tools.drawing:DrawBox", "a picture with the outline of a box on it"),
    "draw_line": ("pipelines.tools.drawing:DrawLine", "a picture with a line on it"),
    "draw_point": ("pipelines.tools.drawing:DrawPoint", "a picture with a dot on it"),
    "rotate": ("pipelines.tools.rotate:Rotate", "a picture turned by an angle"),
}


def build_tools(items: Sequence[Any], path: str = "pipeline.tools") -> list[Any]:
    """Tools from what a config says of them; what already is a tool stays.

    Args:
        items: mappings ``{type: name in TOOLS, "module:attribute" or "file.py:attribute", ...options}``, or tools.
        path: where they stand in the config, for messages.

    Raises:
        UserError: unknown type or option, or two tools of one name.
    """
    built: list[Any] = []
    for number, item in enumerate(items):
        tool = _build(item, f"{path}[{number}]") if isinstance(item, Mapping) else item
        if tool.name in [other.name for other in built]:
            raise UserError(f"'{path}' has two tools called '{tool.name}': give one of them another name (name: ...)")
        built.append(tool)
    return built


def _build(item: Mapping[str, Any], path: str) -> Any:
    from mmrl.options import options_model, validate, values

    name = item.get("type")
    if not isinstance(name, str):
        raise UserError(f"'{path}.type' is missing (choices: {', '.join(TOOLS)})")
    if ":" not in name and name not in TOOLS:
        raise UserError(f"'{path}.type': there is no tool '{name}'{nearest(name, TOOLS)}")
    target = load_object(TOOLS[name][0] if name in TOOLS else name)
    options = {key: value for key, value in item.items() if key != "type"}
    return target(**values(validate(options_model(target), options, where=f"tool '{name}'", path="")))
