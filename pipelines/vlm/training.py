"""What of a vision-language model trains: adapters, all weights, or some parts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.policy import Parameters
from pipelines.adapters import LoRA, attach_lora

Part = Literal["vision", "projector", "language"]
PROJECTOR = re.compile(
    r"(^|\.)(merger|deepstack_merger_list|multi_modal_projector|connector|aligner|image_newline|embed_vision|patch_merger)"
    r"(\.|$)"
)
VISION = re.compile(r"(^|\.)(visual|vision_tower|vision_model|vision_encoder|vision|image_tower|vit)(\.|$)")
VALUE_FILE = "value_head.safetensors"


@dataclass(frozen=True)
class VLMLoRA(LoRA):
    """Adapters; by default on every projection of attention and MLP of the language model."""

    targets: list[str] | str = (
        r"(?!.*(visual|vision|image_tower)).*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|gate_up_proj|qkv_proj)"
    )


class ValueHead(nn.Module):
    """Predicted return from a hidden state: linear, float32, zero at the start."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., H]`` to ``[...]``."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float())[..., 0]


def part_of(name: str) -> Part:
    """Which part of the model a parameter is of, by its name."""
    if PROJECTOR.search(name):
        return "projector"
    return "vision" if VISION.search(name) else "language"


def choose_parameters(
    model: nn.Module, lora: LoRA | None, freeze: Sequence[Part], value_head: ValueHead | None
) -> Parameters:
    """Freeze everything, then let train what the options say. Dropout stays off.

    Raises:
        UserError: the options leave nothing to train, or the adapters' targets match nothing.
    """
    model.requires_grad_(False).eval()
    if lora is not None:
        attach_lora(model, lora, "model")
        model.eval()
    named = {}
    for name, parameter in model.named_parameters():
        wanted = "lora_" in name if lora is not None else True
        if wanted and part_of(name) not in freeze:
            parameter.requires_grad_(True)
            named[name] = parameter
            if lora is not None:
                parameter.data = parameter.data.float()
    if not named:
        raise UserError(f"pipeline.freeze {list(freeze)} leaves nothing to train")
    if value_head is not None:
        named |= {f"value_head.{name}": parameter for name, parameter in value_head.named_parameters()}
    return Parameters(named)


def features_train(parameters: Parameters) -> bool:
    """Whether an update changes what the model sees in a picture."""
    return any(part_of(name) != "language" for name in parameters.named if not name.startswith("value_head."))


def enable_checkpointing(model: Any) -> None:
    """Let layers recompute their activations; see :func:`checkpointing`.

    Raises:
        UserError: the model's class does not offer it.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(f"gradient_checkpointing: {type(model).__name__} does not support it; set it to false")
    newer = getattr(model, "activation_checkpointing_enable", None)
    if newer is not None:
        newer(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextlib.contextmanager
def checkpointing(model: nn.Module) -> Iterator[None]:
    """Inside, layers recompute. transformers ties that to training mode, which is switched on for the layer alone, not
    for the dropout in it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def save_value_head(head: ValueHead, folder: Path) -> None:
    """Write the value head beside the model."""
    from safetensors.torch import save_file

    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}, folder / VALUE_FILE
    )
