"""Policies, one per modality, over the libraries whose models they train."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipelines.adapters import LoRA
    from pipelines.diffusion import DiffusionPolicy
    from pipelines.robot.policy import RobotPolicy
    from pipelines.vlm.policy import VLMPolicy
    from pipelines.vlm.training import VLMLoRA

__all__ = ["DiffusionPolicy", "LoRA", "RobotPolicy", "VLMLoRA", "VLMPolicy"]

_HOMES = {
    "DiffusionPolicy": "pipelines.diffusion",
    "LoRA": "pipelines.adapters",
    "RobotPolicy": "pipelines.robot.policy",
    "VLMLoRA": "pipelines.vlm.training",
    "VLMPolicy": "pipelines.vlm.policy",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'pipelines' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
