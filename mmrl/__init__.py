"""mmrl: reinforcement-learning fine-tuning for multimodal models.

The names below are imported when first used (PEP 562), so that ``mmrl --help`` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmrl.errors import UserError
    from mmrl.types import Decisions, Prompt, Rollout, Samples

__all__ = ["Decisions", "Prompt", "Rollout", "Samples", "UserError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'mmrl' has no attribute '{name}'")
    return getattr(importlib.import_module("mmrl.errors" if name == "UserError" else "mmrl.types"), name)
