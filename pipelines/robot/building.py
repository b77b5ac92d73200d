"""From the options of a robot policy to its parts, and what can be said of them before anything is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from mmrl.errors import UserError, nearest
from mmrl.registry import load_object
from mmrl.types import Prompt
from pipelines.robot.envs import Observation
from pipelines.robot.heads import HEADS
from pipelines.robot.loading import load_clone

Item = str | dict[str, Any]
"""A name, or ``{type: name, ...options}``."""

NETWORK, HEAD, HORIZON = "mlp", "flow", 4
BASE_VERBS = frozenset({"rollout", "decisions", "fit", "generate"})


def build(names: Mapping[str, str], item: Item, path: str, given: Any) -> Any:
    """The component that ``item`` names, built as ``Component(given, **options)``; see :func:`options_of`."""
    target, options = options_of(names, item, path)
    return target(given, **options)


def options_of(names: Mapping[str, str], item: Item, path: str) -> tuple[Any, dict[str, Any]]:
    """The class that ``item`` names and its checked options, which its first parameter is not one of.

    Args:
        names: name to ``"module:attribute"``; targets of that form are taken as well.
        path: where the item stands in the config, for messages.

    Raises:
        UserError: unknown name or option, or an option out of range.
    """
    from mmrl.options import options_model, signature_fields, validate, values

    item = {"type": item} if isinstance(item, str) else dict(item)
    name = item.pop("type", None)
    if not isinstance(name, str):
        raise UserError(f"'{path}.type' is missing (choices: {', '.join(names)})")
    if ":" not in name and name not in names:
        raise UserError(f"'{path}' names '{name}', which there is not{nearest(name, names)}")
    target = load_object(names.get(name, name))
    first = next(iter(signature_fields(target)[0]))
    return target, values(validate(options_model(target, [first]), item, where=f"'{path}'", path=""))


def head_item(given: Item | None, num_steps: int | None, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The action head as it is to be built: what a folder has of it under what is given."""
    item = {"type": given} if isinstance(given, str) else dict(given or {})
    name = item.get("type") or (saved or {}).get("type", HEAD)
    if saved and saved["type"] == name:
        item = {**saved, **item}
    return {"type": name, **item, **({} if num_steps is None else {"num_steps": num_steps})}


def _head(options: Mapping[str, Any]) -> tuple[Any, dict[str, Any], int]:
    """Class, options and horizon of the action head that options of a pipeline ask for."""
    saved = load_clone(options["model"]).config if options.get("model") else {}
    item = head_item(options.get("action_head"), options.get("num_steps"), saved.get("action_head"))
    target, checked = options_of(HEADS, item, "pipeline.action_head")
    return target, checked, options.get("horizon") or saved.get("horizon", HORIZON)


def offers(value_head: bool = False, **options: Any) -> frozenset[str]:
    """The verbs of a policy with these options."""
    target, checked, horizon = _head(options)
    return BASE_VERBS | target.offers(horizon, checked) | ({"values"} if value_head else set())


def validate(**options: Any) -> None:
    """Check what needs no environment; raises ``UserError``."""
    target, checked, horizon = _head(options)
    target.offers(horizon, checked)


def forwards_per_sample(**options: Any) -> dict[str, int]:
    """Network rows of one turn for each verb; how many turns an episode has is the environment's affair."""
    target, checked, horizon = _head(options)
    return target.forwards(horizon, checked)


def start_of(prompt: Prompt) -> int:
    """The seed that an episode starts from; raises ``UserError`` if the prompt has none."""
    seed = prompt.inputs.get("seed")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise UserError(
            f"prompt '{prompt.id}' has no start: inputs should be {{seed: whole number}}, not {dict(prompt.inputs)}"
        )
    return seed


def moved(observation: Observation, device: torch.device) -> Observation:
    """The observation with its tensors on a device."""
    tensors = {name: value for name, value in vars(observation).items() if isinstance(value, torch.Tensor)}
    return replace(observation, **{name: tensor.to(device) for name, tensor in tensors.items()})
