"""Reward functions. Names are looked up lazily, so that importing this package loads no model library."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mmrl.errors import UserError
from mmrl.registry import find, load_object

if TYPE_CHECKING:
    from mmrl.options import Strict

REWARDS: dict[str, tuple[str, str]] = {
    "aesthetic": ("rewards.aesthetic:Aesthetic", "how pleasing a picture is, 1 to 10: CLIP embedding and MLP head"),
    "bleu": ("rewards.text_overlap:Bleu", "BLEU or chrF of the answer, by sacrebleu"),
    "boxes": (
        "rewards.geometry_boxes:Boxes",
        "boxes with labels, matched one to one: overlap, labels, misses and false alarms",
    ),
    "choice": ("rewards.answers:Choice", "whether the letter of a multiple-choice answer is right"),
    "classification": (
        "rewards.answers:Classification",
        "whether the class is right, with or without thinking (CLS-RL)",
    ),
    "clip": ("rewards.clip:ClipSimilarity", "cosine of picture and prompt in a CLIP model"),
    "counting": ("rewards.geometry_points:Counting", "whether a number of things is right, exactly or graded"),
    "detection": ("rewards.detection:Detection", "objects, counts, colours and positions as in GenEval, by a detector"),
    "diversity": ("rewards.diversity:Diversity", "pixel distance of a picture to the others of its prompt"),
    "dynamic_degree": ("rewards.video_motion:DynamicDegree", "how much moves in a clip, by optical flow (VBench)"),
    "edit_distance": (
        "rewards.text_overlap:EditDistance",
        "edit distance of the answer to the true text, by characters or words",
    ),
    "episode_return": ("rewards.robot:EpisodeReturn", "sum of the environment's rewards, credited turn by turn"),
    "exact": ("rewards.answers:Exact", "whether the answer is the true text"),
    "first_frame": ("rewards.video:FirstFrame", "likeness of a clip's first frame and the prompt's picture"),
    "format": ("rewards.text_shape:Format", "whether a text is think and answer tags, or others, and nothing else"),
    "frames": ("rewards.frames:Frames", "an image reward on sampled frames of a clip (InstructVideo)"),
    "goal_similarity": (
        "rewards.robot_frames:GoalSimilarity",
        "likeness of an episode's pictures to a goal in words (VLM-RM, VLM-RL)",
    ),
    "gui_action": ("rewards.answers:GuiAction", "kind, place and text of an action on a screen (GUI-R1)"),
    "hpsv2": ("rewards.clip:HPSv2", "human preference score v2, an open_clip model"),
    "iou": ("rewards.geometry_boxes:Iou", "overlap of the box in an answer with the true one: plain or generalised"),
    "jpeg": ("rewards.jpeg:Jpeg", "size of the picture as JPEG, in kB: compressibility or incompressibility"),
    "json_schema": ("rewards.text_shape:JsonSchema", "whether the answer is JSON that a schema allows"),
    "judge_api": ("rewards.judges.api:JudgeApi", "score or yes/no of a model behind an OpenAI-compatible endpoint"),
    "judge_echo": ("rewards.judges.echo:JudgeEcho", "likelihood of the prompt given the picture under a local VLM"),
    "judge_pair": (
        "rewards.judges.pair:JudgePair",
        "win rate in the group, pairs judged in both orders by a local VLM",
    ),
    "judge_score": ("rewards.judges.score:JudgeScore", "number in the verdict that a local VLM writes"),
    "judge_yes": ("rewards.judges.yes:JudgeYes", "probability that a local VLM answers yes to a question"),
    "language": ("rewards.text_shape:Language", "share of the letters of one script: language consistency"),
    "length": (
        "rewards.text_shape:Length",
        "right answers earn more when short, wrong ones lose less when long: cosine",
    ),
    "loudness": ("rewards.audio:Loudness", "level of a waveform in dB, or its nearness to a target"),
    "math": ("rewards.math_answers:Math", "whether a mathematical answer equals the true one, by math-verify"),
    "motion_smoothness": (
        "rewards.video_motion:MotionSmoothness",
        "how well frames are foreseen from their neighbours, by optical flow (VBench)",
    ),
    "moving_shapes": (
        "rewards.shapes:MovingShapes",
        "exact check of colour, shape, direction and speed in clips of plain shapes",
    ),
    "number": ("rewards.answers:Number", "whether a number is right within a tolerance"),
    "ocr": ("rewards.ocr:Ocr", "edit distance of the text in the picture to the text wanted"),
    "overlong": ("rewards.text_shape:Overlong", "soft punishment of overlong answers (DAPO)"),
    "partial_credit": (
        "rewards.answers:PartialCredit",
        "credit for parts of a list's items, penalties for guesses and gaps (STAR-R1)",
    ),
    "penalised": (
        "rewards.robot_shaping:Penalised",
        "a reward of episodes times factors in [0, 1], turn by turn (CaRL)",
    ),
    "permutation": ("rewards.answers:Permutation", "how much of an order is right (Visual Jigsaw)"),
    "pickscore": ("rewards.clip:PickScore", "PickScore, a CLIP model of human preference"),
    "pixels": ("rewards.pixels:Pixels", "brightness, colour, saturation, contrast or sharpness"),
    "point_distance": (
        "rewards.geometry_points:PointDistance",
        "how near the points in an answer are to the true ones",
    ),
    "point_in_box": ("rewards.geometry_points:PointInBox", "share of the points in an answer that lie in the true box"),
    "point_in_region": (
        "rewards.geometry_regions:PointInRegion",
        "share of the points in an answer that lie in the true polygon or mask (Embodied-R1)",
    ),
    "remote": ("rewards.remote:Remote", "a reward that runs on another machine or in another process, over HTTP"),
    "render": ("rewards.render:Render", "likeness of the picture that an answer's code draws: SVG, matplotlib, TikZ"),
    "repetition": ("rewards.text_shape:Repetition", "minus the share of repeated n-grams"),
    "reward_code": (
        "rewards.robot_code:RewardCode",
        "reward(state, action, next_state) from a file that a model wrote, confined (Text2Reward)",
    ),
    "rouge": ("rewards.text_overlap:Rouge", "ROUGE of the answer, by rouge-score"),
    "salient_boxes": ("rewards.geometry_boxes:SalientBoxes", "overlap with boxes of which some matter more (GRiP)"),
    "shapes": ("rewards.shapes:Shapes", "exact check of colour, shape, count and position in pictures of plain shapes"),
    "shaping": ("rewards.robot_shaping:Shaping", "potential-based shaping, which leaves the best policies the best"),
    "success": ("rewards.robot:Success", "whether the environment said that its task is done"),
    "temporal_consistency": (
        "rewards.video:TemporalConsistency",
        "likeness of a clip's frames in a CLIP model (VBench)",
    ),
    "temporal_iou": (
        "rewards.geometry_points:TemporalIou",
        "overlap of the interval of time in an answer with the true one",
    ),
    "tool_use": ("rewards.tool_use:ToolUse", "calls of tools that worked: the bonus of DeepEyes"),
    "trajectory": ("rewards.geometry_points:Trajectory", "how near the path in an answer is to the true one (VLA-R1)"),
    "video_clip": ("rewards.video:VideoClip", "cosine of a clip's frames, on average, and prompt in a CLIP model"),
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


def nested_reward(name: str, of: Mapping[str, Any]) -> Callable:
    """The reward that is an option of the reward ``name``: ``{type: ..., its options}``.

    Raises:
        UserError: it has no type; or as :func:`load_reward`.
    """
    options = dict(of)
    kind = options.pop("type", None)
    if not isinstance(kind, str):
        raise UserError(f"reward '{name}': 'of' needs a 'type', the name of a reward")
    return load_reward(kind, **options)


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
