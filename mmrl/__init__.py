"""mmrl: reinforcement-learning fine-tuning for multimodal models."""

from mmrl.errors import UserError
from mmrl.types import Decisions, Prompt, Rollout, Samples

__all__ = ["Decisions", "Prompt", "Rollout", "Samples", "UserError"]
__version__ = "0.1.0"
