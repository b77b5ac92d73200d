"""What of a pipeline trains: LoRA adapters on its denoisers, or all of their weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmrl.errors import UserError, nearest
from mmrl.policy import Parameters
from mmrl.seeding import derive_seed

DENOISERS = ("transformer", "transformer_2", "unet")
ADAPTER = "default"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (arXiv:2106.09685) on the denoiser.

    Attributes:
        rank: of the update of each matrix.
        alpha: the update is scaled by ``alpha / rank``; None means ``alpha = rank``.
        targets: names of the modules that get one (a module matches when its path ends so), or a regular expression
            for whole paths. The default is every projection of every attention.
        init: ``gaussian`` draws the down-projection from N(0, 1/rank), ``kaiming`` uniformly; up-projections are zero.
        seed: of that draw.
    """

    rank: int = 32
    alpha: float | None = None
    targets: list[str] | str = r".*att(n|ention).*\.(to_q|to_k|to_v|to_out\.0|add_[qkv]_proj|to_add_out)"
    init: Literal["gaussian", "kaiming"] = "gaussian"
    seed: int = 0


def denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that denoise, by component name."""
    found = {name: getattr(pipe, name, None) for name in DENOISERS}
    return {name: module for name, module in found.items() if module is not None}


def freeze(pipe: Any) -> None:
    """No component trains or drops out."""
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()


def add_lora(pipe: Any, lora: LoRA) -> Parameters:
    """Put adapters on every denoiser; the base weights stay frozen. Adapters are float32 whatever the base is.

    Raises:
        UserError: the targets match nothing.
    """
    named = {}
    for component, module in denoisers(pipe).items():
        if not hasattr(module, "add_adapter"):
            raise UserError(f"{type(module).__name__} takes no LoRA adapters: set lora to null to train all of it")
        attach_lora(module, lora, component)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
                named[f"{component}.{name}"] = parameter
    return Parameters(named)


def attach_lora(module: Any, lora: LoRA, name: str) -> None:
    """Put adapters into a network of diffusers or transformers; ``name`` is what messages call it.

    Raises:
        UserError: the targets match nothing.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank if lora.alpha is None else lora.alpha,
        target_modules=lora.targets if isinstance(lora.targets, str) else list(lora.targets),
        init_lora_weights="gaussian" if lora.init == "gaussian" else True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(lora.seed, "lora", name))
        try:
            module.add_adapter(config, adapter_name=ADAPTER)
        except ValueError as error:
            linear = [path for path, child in module.named_modules() if isinstance(child, nn.Linear)]
            raise UserError(
                f"lora.targets {lora.targets!r} cannot be applied to {name} ({error}); "
                f"linear layers there are for example {', '.join(linear[-8:])}"
            ) from error


def train_all(pipe: Any, components: Sequence[str] | None = None) -> Parameters:
    """Every weight of some components trains, of every denoiser when they are not given.

    Raises:
        UserError: the pipeline has no such network.
    """
    networks = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    named = {}
    for component in denoisers(pipe) if components is None else components:
        if component not in networks:
            raise UserError(f"pipeline.train: {type(pipe).__name__} has no '{component}'{nearest(component, networks)}")
        module = networks[component].requires_grad_(True)
        named |= {f"{component}.{name}": parameter for name, parameter in module.named_parameters()}
    return Parameters(named)


def enable_gradient_checkpointing(pipe: Any, whole_steps: bool = False) -> None:
    """Recompute activations of the denoisers' blocks and of the VAE in the backward pass.

    With ``whole_steps`` a network call keeps its inputs alone, and its blocks theirs while it is recomputed.

    The blocks are wrapped here because the switch of diffusers leads through other code: in 0.42 Chroma forgets its
    text mask there, so that the ratio of a replay is not 1, and HunyuanImage fails.

    Raises:
        UserError: a denoiser has no lists of blocks.
    """
    for module in denoisers(pipe).values():
        blocks = [block for part in module.children() if isinstance(part, nn.ModuleList) for block in part]
        if not blocks:
            raise UserError(f"gradient_checkpointing: {type(module).__name__} does not support it; set it to false")
        for part in [*blocks, module] if whole_steps else blocks:
            part.forward = functools.partial(_checkpointed, part.forward)
    if getattr(getattr(pipe, "vae", None), "_supports_gradient_checkpointing", False):
        pipe.vae.enable_gradient_checkpointing()


def _checkpointed(forward: Callable, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@contextlib.contextmanager
def lora_off(modules: Collection[Any]) -> Iterator[None]:
    """Inside, the networks run without their adapters."""
    for module in modules:
        module.disable_adapters()
    try:
        yield
    finally:
        for module in modules:
            module.enable_adapters()


def export_lora(pipe: Any, folder: Path) -> None:
    """Write adapters so that ``pipe.load_lora_weights(folder)`` of plain diffusers loads them.

    A second denoiser (Wan 2.2) goes to the subfolder of its name, for
    ``pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)``. A pipeline class without LoRA
    loading gets files for ``pipe.transformer.load_lora_adapter(folder, prefix=None, use_safetensors=True)``.
    """
    from peft import get_peft_model_state_dict

    for component, module in denoisers(pipe).items():
        target = folder / component if component == "transformer_2" else folder
        target.mkdir(parents=True, exist_ok=True)
        if not hasattr(pipe, "save_lora_weights"):
            module.save_lora_adapter(target)
            continue
        prefix = "unet" if component == "unet" else "transformer"
        metadata = module.peft_config[ADAPTER].to_dict()
        pipe.save_lora_weights(
            target,
            **{
                f"{prefix}_lora_layers": get_peft_model_state_dict(module, adapter_name=ADAPTER),
                f"{prefix}_lora_adapter_metadata": metadata,
            },
        )
