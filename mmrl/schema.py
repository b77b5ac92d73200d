"""The config as JSON schema, for completion and checking in editors."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue

from mmrl.components import component_model, term_model
from mmrl.config import DataOptions, EvalOptions, TrainerOptions
from mmrl.registry import Kind, entries, find, load_object


class _Lenient(GenerateJsonSchema):
    """Types that JSON has no word for accept anything."""

    ignored_warning_kinds = frozenset({"skipped-choice", "non-serializable-default"})

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> JsonSchemaValue:
        return {}


def config_schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a config file, with a variant for every pipeline, algorithm and reward."""
    definitions: dict[str, Any] = {}
    sections = {
        "data": _section(DataOptions, definitions),
        "rewards": {"type": "array", "items": {"$ref": "#/$defs/reward"}},
        "algorithm": {"$ref": "#/$defs/algorithm"},
        "trainer": _section(TrainerOptions, definitions),
        "eval": _section(EvalOptions, definitions),
    }
    sections["eval"]["properties"]["rewards"] = {"anyOf": [sections["rewards"], {"type": "null"}], "default": None}
    terms = _section(term_model(), definitions)["properties"]
    for kind in ("pipeline", "algorithm", "reward"):
        definitions[kind] = _variants(kind, terms if kind == "reward" else {}, definitions)
    # A stage's sections lie over the top level's, so none of their keys is required there.
    stage = {"name": {"type": "string"}, **sections}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "mmrl config",
        "type": "object",
        "additionalProperties": False,
        "required": ["pipeline"],
        "properties": {
            "run_dir": {"type": ["string", "null"], "description": "folder of the run; runs/<name of the file>"},
            "seed": {"type": "integer", "minimum": 0, "default": 0, "description": "of everything random"},
            "pipeline": {"$ref": "#/$defs/pipeline"},
            **sections,
            "stages": {
                "type": "array",
                "minItems": 1,
                "items": {"type": "object", "additionalProperties": False, "properties": stage},
            },
        },
        "$defs": definitions,
    }


def _section(model: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    schema = _schema(model, model, definitions)
    schema.pop("required", None)
    return schema


def _variants(kind: Kind, shared: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    variants: list[dict[str, Any]] = []
    for name, entry in entries(kind).items():
        schema = _schema(component_model(kind, name), load_object(find(kind, name).target), definitions)
        schema["title"] = name
        schema["description"] = entry.description
        schema["properties"] = {"type": {"const": name}, **shared, **schema.get("properties", {})}
        # Options may come from the top level when a stage gives only some.
        schema["required"] = ["type"]
        variants.append(schema)
    outside = {
        "type": "object",
        "title": "module:name",
        "properties": {"type": {"type": "string", "pattern": ":"}},
        "required": ["type"],
    }
    partial = {"type": "object", "title": "options of a stage", "not": {"required": ["type"]}}
    short = {"type": "string"}
    return {"anyOf": [*variants, outside, short] + ([partial] if kind == "algorithm" else [])}


def _schema(model: type[BaseModel], documented: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    schema = model.model_json_schema(schema_generator=_Lenient, by_alias=True)
    definitions.update(schema.pop("$defs", {}))
    schema.pop("description", None)
    for name, text in described_options(documented).items():
        if name in schema.get("properties", {}):
            schema["properties"][name]["description"] = text
    return schema


def described_options(target: Any) -> dict[str, str]:
    """What the docstring of a class or function says about each argument or attribute."""
    found: dict[str, str] = {}
    names: list[str] = []
    section = False
    for line in inspect.cleandoc(target.__doc__ or "").split("\n"):
        if re.fullmatch(r"(Args|Attributes):", line):
            section = True
        elif line and not line.startswith(" "):
            section = False
        start = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if section and start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        elif section and line.startswith(" " * 8):
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found
