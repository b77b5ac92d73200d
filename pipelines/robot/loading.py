"""Policies in folders: ``config.json`` says what they are built of, ``model.safetensors`` has their weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmrl.errors import UserError
from pipelines.loading import resolve

OPTIONAL = ("value.", "head.noise.", "head.frozen.")
"""Parts that a policy may have beyond those of the folder it starts from."""


@dataclass
class Clone:
    """A policy as a folder has it.

    Attributes:
        config: ``network``, ``action_head`` and ``horizon``, as :class:`pipelines.RobotPolicy` takes them.
        tensors: weights, and statistics of observations under ``statistics.``.
    """

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def put_into(self, modules: nn.Module, statistics: Mapping[str, Tensor]) -> None:
        """Copy the weights; raises ``UserError`` where they do not fit."""
        named = {key: tensor for key, tensor in self.tensors.items() if not key.startswith("statistics.")}
        try:
            found = modules.load_state_dict(named, strict=False)
        except RuntimeError as error:
            raise UserError(f"the policy in '{self.folder}' does not fit this pipeline: {error}") from error
        missing = [key for key in found.missing_keys if not key.startswith(OPTIONAL)]
        extra = [key for key in found.unexpected_keys if not key.startswith(OPTIONAL)]
        if missing or extra:
            what = f"lacks '{missing[0]}'" if missing else f"has '{extra[0]}', for which there is no place"
            raise UserError(f"the policy in '{self.folder}' {what}: network and action_head should be as it was made")
        for name, tensor in statistics.items():
            if (saved := self.tensors.get(f"statistics.{name}")) is None:
                continue
            if saved.shape != tensor.shape:
                raise UserError(
                    f"the policy in '{self.folder}' was made for states of {saved.numel()} numbers, "
                    f"but this environment gives {tensor.numel()}"
                )
            tensor.copy_(saved)


def load_clone(folder: str | Path) -> Clone:
    """Read what :func:`save_clone` wrote, or ``builtin:NAME``; raises ``UserError`` if it is not there."""
    from safetensors.torch import load_file

    folder = Path(resolve(str(folder), "config.json", "robot policy"))
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"pipeline.model: '{folder}' holds no robot policy: it has no {name}")
    return Clone(
        folder,
        json.loads((folder / "config.json").read_text(encoding="utf-8")),
        load_file(folder / "model.safetensors"),
    )


def save_clone(
    folder: str | Path, config: Mapping[str, Any], modules: nn.Module, statistics: Mapping[str, Tensor]
) -> None:
    """Write a policy so that ``pipeline.model: folder`` loads it."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    tensors = {**modules.state_dict(), **{f"statistics.{name}": tensor for name, tensor in statistics.items()}}
    save_file({key: x.detach().cpu().contiguous().clone() for key, x in tensors.items()}, folder / "model.safetensors")
