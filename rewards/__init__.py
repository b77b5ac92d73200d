"""Reward functions. Names are looked up lazily, so that importing this package loads no model library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mmrl.errors import UserError
from mmrl.registry import find, load_object

if TYPE_CHECKING:
    from mmrl.options import Strict

REWARDS: dict[str, tuple[str, str]] = {
    "aesthetic": ("rewards.aesthetic:Aesthetic", "how pleasing a picture is, 1 to 10: CLIP embedding and MLP head"),
    "clip": ("rewards.clip:ClipSimilarity", "cosine of picture and prompt in a CLIP model"),
    "detection": ("rewards.detection:Detection", "objects, counts, colours and positions as in GenEval, by a detector"),
    "diversity": ("rewards.diversity:Diversity", "pixel distance of a picture to the others of its prompt"),
    "hpsv2": ("rewards.clip:HPSv2", "human preference score v2, an open_clip model"),
    "jpeg": ("rewards.jpeg:Jpeg", "size of the picture as JPEG, in kB: compressibility or incompressibility"),
    "judge_api": ("rewards.judges.api:JudgeApi", "score or yes/no of a model behind an OpenAI-compatible endpoint"),
    "judge_echo": ("rewards.judges.echo:JudgeEcho", "likelihood of the prompt given the picture under a local VLM"),
    "judge_pair": ("rewards.judges.pair:JudgePair", "win rate in the group, pairs judged in both orders by a local VLM"),
    "judge_score": ("rewards.judges.score:JudgeScore", "number in the verdict that a local VLM writes"),
    "judge_yes": ("rewards.judges.yes:JudgeYes", "probability that a local VLM answers yes to a question"),
    "ocr": ("rewards.ocr:Ocr", "edit distance of the text in the picture to the text wanted"),
    "pickscore": ("rewards.clip:PickScore", "PickScore, a CLIP model of human preference"),
    "pixels": ("rewards.pixels:Pixels", "brightness, colour, saturation, contrast or sharpness"),
    "remote": ("rewards.remote:Remote", "a reward that runs on another machine or in another process, over HTTP"),
    "shapes": ("rewards.shapes:Shapes", "exact check of colour, shape, count and position in pictures of plain shapes"),
}


def load_reward(name: str, **options: Any) -> Callable:
    """Build a reward.

    Args:
        name: one of :data:`REWARDS`; or ``"module:attribute"`` or ``"file.py:attribute"`` for a class, which is built
            with the options, or a function, which is given them at every call (see :mod:`rewards.function`).
        options: of the reward.

    Returns:
        A callable from :class:`mmrl.types.Samples` to scores ``[N]``: a float32 tensor from the named ones and from
        functions. A class of the user's returns what it returns; :class:`mmrl.scoring.Scorer` takes lists as well.

    Raises:
        UserError: unknown name, file, attribute or option; an option of the wrong type; weights that are not found.
    """
    from mmrl.options import validate, values

    checked = values(validate(reward_options(name), options, where=f"reward '{name}'", path=""))
    return build_reward(load_object(find("reward", name).target), checked)


def build_reward(target: Callable, options: dict[str, Any]) -> Callable:
    """A reward from what its name stands for and options that have been checked."""
    from rewards.function import FunctionReward

    if inspect.isclass(target):
        return target(**options)
    return FunctionReward(target, options) if inspect.isroutine(target) else target


def reward_options(name: str) -> type[Strict]:
    """The options of a reward as a pydantic model, for checking a config before anything is built."""
    from mmrl.options import model_from_fields, options_model
    from rewards.function import option_fields

    target = load_object(find("reward", name).target)
    if inspect.isclass(target):
        return options_model(target)
    if not callable(target):
        raise UserError(f"reward '{name}' is {type(target).__name__}, not a function or class")
    return model_from_fields(name, option_fields(target) if inspect.isroutine(target) else {})


def differentiable_rewards() -> list[str]:
    """The names in :data:`REWARDS` through which gradients flow."""
    return [name for name, (target, _) in REWARDS.items() if getattr(load_object(target), "differentiable", False)]
