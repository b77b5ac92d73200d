"""A negative preference model as the unconditional half of guidance (Diffusion-NPO, arXiv 2505.11245; Self-NPO)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from mmrl.errors import UserError
from pipelines.adapters import denoisers

NEGATIVE = "negative"


@dataclass(frozen=True)
class NegativeModel:
    """Weights that learnt the opposite preference, and how they enter the unconditional half.

    That half runs at the start's weights ``+ strength * (negative - start) + own * (trained - start)``; the paper finds
    that it should stay related to the trained half.

    Attributes:
        model: a folder with LoRA adapters, such as the ``model`` of a run, or a whole pipeline.
        strength: of the negative weights.
        own: of the adapters that are being trained; 0 where all weights train.
    """

    model: str
    strength: Annotated[float, Field(ge=0)] = 1.0
    own: Annotated[float, Field(ge=0)] = 0.0


class NegativeBranch:
    """The negative weights of a pipeline's denoisers.

    Args:
        pipe: without adapters yet.
        options: where the weights are.

    Raises:
        UserError: the folder is not there or holds neither adapters nor a pipeline.
    """

    def __init__(self, pipe: Any, options: NegativeModel):
        folder = Path(options.model)
        if not folder.is_dir():
            raise UserError(f"pipeline.negative.model: there is no folder '{folder}'")
        self.pipe, self.own = pipe, options.own
        read = _whole_differences if (folder / "model_index.json").is_file() else _adapter_differences
        # Kept on the CPU in the weights' precision; what does not differ is not kept.
        self.weights: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for component, differences in read(pipe, folder).items():
                start = dict(denoisers(pipe)[component].named_parameters())
                self.weights[component] = {
                    name: start[name] + options.strength * difference.to(start[name])
                    for name, difference in differences.items()
                }

    @contextlib.contextmanager
    def active(self, rows: int) -> Iterator[None]:
        """Inside, a call of a denoiser with ``2 rows`` rows runs the first half at the negative weights.

        Raises:
            UserError: at the end, when there was no such call.
        """
        modules = denoisers(self.pipe)
        used: list[str] = []
        for component, module in modules.items():
            module.forward = functools.partial(self._halves, component, module, module.forward, rows, used)
        try:
            yield
        finally:
            for module in modules.values():
                module.forward = module.forward.args[2]
        if not used:
            raise UserError(
                "pipeline.negative needs guidance whose two halves share a network call: "
                f"{type(self.pipe).__name__} makes two, or its guidance is off in this call"
            )

    def _halves(
        self,
        component: str,
        module: nn.Module,
        forward: Callable,
        rows: int,
        used: list[str],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        batch = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim > 1)
        if batch != 2 * rows:
            return forward(*args, **kwargs)
        used.append(component)
        (args_1, args_2), (kwargs_1, kwargs_2) = ([_half(part, batch, k) for k in (0, 1)] for part in (args, kwargs))
        wrapped, module.forward = module.forward, forward
        try:
            negative = functional_call(module, self._swapped(component, module), args_1, kwargs_1)
        finally:
            module.forward = wrapped
        return _joined(negative, forward(*args_2, **kwargs_2))

    def _swapped(self, component: str, module: nn.Module) -> dict[str, Tensor]:
        """What to put in place of which parameter of the module as it is now, with adapters of its own perhaps."""
        found = {}
        for name, parameter in module.named_parameters():
            weight = self.weights[component].get(name.replace(".base_layer.", "."))
            if weight is not None:
                found[name] = weight.to(parameter)
            elif "lora_B" in name:
                found[name] = self.own * parameter
        return found


def _whole_differences(pipe: Any, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Per denoiser of a pipeline on disk, how its weights differ."""
    out = {}
    for component, module in denoisers(pipe).items():
        other = type(module).from_pretrained(folder, subfolder=component).named_parameters()
        start = dict(module.named_parameters())
        differences = {name: parameter.to(start[name]) - start[name] for name, parameter in other}
        out[component] = {name: value for name, value in differences.items() if value.any()}
    return out


def _adapter_differences(pipe: Any, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Per denoiser, what adapters on disk add to its weights."""
    if not list(folder.glob("*.safetensors")):
        raise UserError(f"pipeline.negative.model: '{folder}' holds neither LoRA adapters nor a whole pipeline")
    pipe.load_lora_weights(folder, adapter_name=NEGATIVE)
    out = {}
    for component, module in denoisers(pipe).items():
        layers = {name: layer for name, layer in module.named_modules() if hasattr(layer, "get_delta_weight")}
        out[component] = {f"{name}.weight": layer.get_delta_weight(NEGATIVE) for name, layer in layers.items()}
    pipe.unload_lora_weights()
    return out


def _half(value: Any, batch: int, k: int) -> Any:
    """Half ``k`` of everything that has an entry per row."""
    if isinstance(value, Tensor):
        return value.chunk(2)[k] if value.shape[:1] == (batch,) else value
    if isinstance(value, Mapping):
        return {name: _half(item, batch, k) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_half(item, batch, k) for item in value)
    return value


def _joined(first: Any, second: Any) -> Any:
    if isinstance(first, Tensor):
        return torch.cat([first, second])
    if isinstance(first, tuple):
        return tuple(_joined(a, b) for a, b in zip(first, second, strict=True))
    return type(first)(sample=_joined(first.sample, second.sample))
