"""What a config points to, looked at before a model is loaded: data, pictures, optimisers."""

from __future__ import annotations

from dataclasses import dataclass

from mmrl.components import build_algorithm
from mmrl.config import Config, StageConfig, TrainerOptions
from mmrl.data import load_prompts
from mmrl.errors import UserError, located
from mmrl.types import Prompt


@dataclass
class StageData:
    """The prompts of a stage; ``eval`` is limited as the config says."""

    train: list[Prompt]
    eval: list[Prompt]


def check(config: Config) -> list[StageData]:
    """Check everything that needs no model; returns the prompts of each stage, so that they are read once.

    Raises:
        UserError: the first fault.
    """
    found = []
    for stage in config.stages:
        with located(config.source):
            check_optimizer(stage.trainer)
            rows = load_stage_data(stage)
            algorithm = build_algorithm(stage.algorithm)
            if hasattr(algorithm, "check_prompts"):
                algorithm.check_prompts(rows.train)
            found.append(rows)
    return found


def load_stage_data(stage: StageConfig) -> StageData:
    """Read the prompts of one stage."""
    data = stage.data
    train = load_prompts(data.prompts, columns=data.columns, split=data.split, options=data.options, limit=data.limit)
    limit = stage.eval.limit
    if data.eval_prompts is None:
        return StageData(train, train[:limit])
    held_out = load_prompts(
        data.eval_prompts,
        columns=data.columns,
        split=data.eval_split,
        options=data.eval_options,
        limit=limit,
        key="data.eval_prompts",
    )
    return StageData(train, held_out)


def check_optimizer(options: TrainerOptions) -> None:
    """Build the optimiser for a parameter of no consequence."""
    import torch

    from mmrl.optim import build_optimizer

    weight = torch.nn.Parameter(torch.zeros(2, 2))
    try:
        build_optimizer(options.optimizer, [weight], options.lr, options.optimizer_options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"trainer.optimizer_options: {options.optimizer} refuses them: {error}") from error
