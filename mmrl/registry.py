"""Names that a config may use for pipelines, algorithms and rewards, and where each lives.

A target is ``"module:attribute"`` and is imported only when it is used: the core names pipelines and rewards here but
never imports them on its own.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmrl.errors import UserError, nearest

Kind = Literal["pipeline", "algorithm", "reward"]


@dataclass(frozen=True)
class Entry:
    """One name a config can use.

    Attributes:
        target: ``"module:attribute"`` or ``"file.py:attribute"``.
        description: one line for ``mmrl list``.
        defaults: options that differ from the target's own defaults; the config still overrides them.
    """

    target: str
    description: str
    defaults: Mapping[str, Any] = field(default_factory=dict)


_POLICY_GRADIENT = "mmrl.algorithms.policy_gradient:PolicyGradient"
_STEPWISE = "mmrl.algorithms.stepwise_preference:StepwisePreference"
_REWARD_BACKPROP = "mmrl.algorithms.reward_backprop:RewardBackprop"
_WHITENED = {"whiten": True, "aggregation": "token", "advantage_clip": None}

PIPELINES = {
    "diffusion": Entry("pipelines.diffusion:DiffusionPolicy", "any diffusers pipeline, through its scheduler"),
    "initial_noise": Entry(
        "pipelines.initial_noise:InitialNoisePolicy",
        "a learned distribution of the noise a pipeline starts from (FIND)",
    ),
    "vlm": Entry("pipelines.vlm.policy:VLMPolicy", "any transformers model for images and text"),
    "robot": Entry("pipelines.robot.policy:RobotPolicy", "action heads over gymnasium environments"),
    "residual_robot": Entry("pipelines.robot.residual:ResidualPolicy", "a small actor corrects a frozen robot policy"),
}
ALGORITHMS = {
    "grpo": Entry(_POLICY_GRADIENT, "clipped policy gradient with group-normalised advantages (GRPO, Flow-GRPO)"),
    "dr_grpo": Entry(
        _POLICY_GRADIENT,
        "GRPO without the division by the group's spread and by length (Dr.GRPO)",
        {"advantage": "mean", "aggregation": "constant"},
    ),
    "dapo": Entry(
        _POLICY_GRADIENT,
        "GRPO on tokens: higher upper clip, mean over tokens, truncated samples masked, dynamic sampling (DAPO)",
        {
            "clip_range": 0.2,
            "clip_range_high": 0.28,
            "aggregation": "token",
            "mask_truncated": True,
            "dynamic_sampling": {"max_tries": 3},
        },
    ),
    "bnpo": Entry(
        _POLICY_GRADIENT, "GRPO with the mean over the tokens of blocks of samples (BNPO)", {"aggregation": "blocks"}
    ),
    "rloo": Entry(
        _POLICY_GRADIENT,
        "REINFORCE with the mean of the others in the group as baseline (RLOO)",
        {"objective": "reinforce", "advantage": "rloo"},
    ),
    "reinforce": Entry(
        _POLICY_GRADIENT,
        "REINFORCE with the batch's mean and spread; works with group_size 1",
        {"objective": "reinforce", "advantage": "global", "group_size": 1},
    ),
    "reinforce_plus_plus": Entry(
        _POLICY_GRADIENT,
        "PPO's clip on rewards to come less KL, whitened over all tokens (REINFORCE++)",
        _WHITENED | {"advantage": "returns", "group_size": 1, "kl_in": "reward"},
    ),
    "reinforce_plus_plus_baseline": Entry(
        _POLICY_GRADIENT,
        "the group's mean as baseline, then whitened over all tokens (REINFORCE++-baseline)",
        _WHITENED | {"advantage": "mean"},
    ),
    "remax": Entry(
        _POLICY_GRADIENT,
        "REINFORCE with the reward of the greedy output as baseline (ReMax)",
        {"objective": "reinforce", "advantage": "remax", "group_size": 1, "advantage_clip": None},
    ),
    "ppo": Entry(
        _POLICY_GRADIENT,
        "PPO with a value head and GAE",
        _WHITENED | {"advantage": "gae", "group_size": 1, "kl_in": "reward"},
    ),
    "opo": Entry(
        _POLICY_GRADIENT,
        "REINFORCE with the length-weighted mean of the group as baseline (OPO)",
        {"objective": "reinforce", "advantage": "opo", "advantage_clip": None},
    ),
    "gpg": Entry(
        _POLICY_GRADIENT,
        "REINFORCE with the group's mean, scaled up for groups without signal (GPG)",
        {"objective": "reinforce", "advantage": "gpg", "aggregation": "token", "advantage_clip": None},
    ),
    "pass_at_k": Entry(
        _POLICY_GRADIENT, "only the best of a group, by its lead (pass@k policy gradient)", {"advantage": "pass_at_k"}
    ),
    "gspo": Entry(_POLICY_GRADIENT, "clip on a sample's mean log-ratio (GSPO)", {"objective": "gspo"}),
    "gspo_token": Entry(
        _POLICY_GRADIENT, "GSPO with the gradient of each decision's own log-prob", {"objective": "gspo_token"}
    ),
    "cispo": Entry(_POLICY_GRADIENT, "policy gradient weighted by the clamped ratio (CISPO)", {"objective": "cispo"}),
    "sapo": Entry(_POLICY_GRADIENT, "a sigmoid instead of the clip's edge (SAPO)", {"objective": "sapo"}),
    "gmpo": Entry(_POLICY_GRADIENT, "geometric mean of a sample's clipped ratios (GMPO)", {"objective": "gmpo"}),
    "nft": Entry(
        _POLICY_GRADIENT,
        "right answers by likelihood, wrong ones by that of an implicit negative policy (NFT)",
        {"objective": "nft", "advantage_clip": None},
    ),
    "reg_grpo": Entry(
        _POLICY_GRADIENT,
        "regress advantages on log-ratios instead of clipping (DeepVideo-R1)",
        {"objective": "regression"},
    ),
    "grpo_guard": Entry(
        _POLICY_GRADIENT,
        "clip on the standardised ratio of Gaussian steps (GRPO-Guard)",
        {"objective": "guard", "clip_range": 2e-6},
    ),
    "flow_dppo": Entry(
        _POLICY_GRADIENT, "drops steps that moved too far instead of clipping (Flow-DPPO)", {"objective": "dppo"}
    ),
    "gdpo": Entry(
        _POLICY_GRADIENT, "GRPO that normalises each reward by itself before the sum (GDPO)", {"advantage": "gdpo"}
    ),
    "dpo": Entry(
        "mmrl.algorithms.preference:PreferenceOptimisation", "online DPO on best/worst pairs of a group (Diffusion-DPO)"
    ),
    "kto": Entry(
        "mmrl.algorithms.unpaired_preference:UnpairedPreference", "outputs that are good or bad each by itself (KTO)"
    ),
    "d3po": Entry(
        _STEPWISE,
        "each denoising step of the better output is preferred to that of the worse (D3PO)",
        {"ratio_clip": 0.1},
    ),
    "spo": Entry(
        _STEPWISE,
        "candidates for one denoising step, best against worst (SPO)",
        {"group_size": 1, "candidates": 4, "beta": 10.0},
    ),
    "reward_backprop": Entry(_REWARD_BACKPROP, "gradient of the reward through the sampler's last K steps (DRaFT-K)"),
    "draft": Entry(_REWARD_BACKPROP, "gradient of the reward through all steps (DRaFT)", {"grad_steps": "all"}),
    "draft_lv": Entry(
        _REWARD_BACKPROP, "the last step's gradient at several draws of noise (DRaFT-LV)", {"renoise": 2}
    ),
    "alignprop": Entry(
        _REWARD_BACKPROP, "gradient through a random number of last steps (AlignProp)", {"grad_steps": "random"}
    ),
    "refl": Entry(
        _REWARD_BACKPROP,
        "gradient of one late step, whose estimate of the output is scored (ReFL)",
        {"stop": (0.75, 1.0), "hinge": 2.0},
    ),
    "controlnet_pp": Entry(
        _REWARD_BACKPROP,
        "the noised target is cleaned in one step and scored (ControlNet++)",
        {"begin": (0.8, 1.0), "stop": (0.0, 0.0), "fit_coef": 2.0},
    ),
    "ctrl_u": Entry(
        _REWARD_BACKPROP,
        "ControlNet++ with losses weighted by how sure the reward is (Ctrl-U)",
        {"begin": (0.6, 1.0), "stop": (0.0, 0.0), "fit_coef": 10.0, "group_size": 2, "uncertainty": 1.0, "hinge": 1.0},
    ),
    "instructvideo": Entry(
        _REWARD_BACKPROP,
        "the noised target goes through the last part of the sampler",
        {"begin": (0.4, 0.4)},
    ),
    "tdm_r1": Entry(
        "mmrl.algorithms.surrogate_reward:SurrogateReward",
        "few-step samplers climb a learned surrogate of any reward (TDM-R1)",
    ),
    "raft": Entry("mmrl.algorithms.rejection:BestOfN", "fit the best of each group (RAFT, best of n)"),
    "rwr": Entry(
        "mmrl.algorithms.reward_weighted:RewardWeighted", "fit weighted by exp(reward / beta) (RWR, Flow-RWR)"
    ),
    "awr": Entry("mmrl.algorithms.reward_weighted:AdvantageWeighted", "fit weighted by exp(advantage / beta) (AWR)"),
    "diffusion_nft": Entry(
        "mmrl.algorithms.forward_process:DiffusionNFT",
        "implicit positive and negative predictions on the forward process (DiffusionNFT)",
    ),
    "awm": Entry(
        "mmrl.algorithms.forward_process:AdvantageMatching", "advantage-weighted matching of predictions (AWM)"
    ),
    "dgpo": Entry(
        "mmrl.algorithms.forward_process:GroupPreference", "preference between parts of a group, at shared noise (DGPO)"
    ),
    "crd": Entry("mmrl.algorithms.forward_process:CentredReward", "regress centred rewards on denoising errors (CRD)"),
    "prdp": Entry(
        "mmrl.algorithms.reward_difference:RewardDifference",
        "regress reward differences on log-ratios of whole samples (PRDP)",
    ),
    "distill": Entry(
        "mmrl.algorithms.distillation:Distillation", "KL to a teacher at the decisions that the policy takes itself"
    ),
    "distill_predictions": Entry(
        "mmrl.algorithms.distillation:PredictionDistillation",
        "a teacher's predictions (velocities) on the policy's own outputs",
    ),
    "soar": Entry(
        "mmrl.algorithms.self_correction:SelfCorrection",
        "supervised training that also learns the way back from the model's own steps (SOAR)",
    ),
    "residual_rl": Entry(
        "mmrl.algorithms.off_policy:OffPolicy", "soft actor-critic on replayed transitions of a residual policy (RLPD)"
    ),
    "sft": Entry("mmrl.algorithms.supervised:Supervised", "supervised training on the prompts' targets"),
}


def entries(kind: Kind) -> Mapping[str, Entry]:
    """The built-in names of a kind."""
    if kind == "pipeline":
        return PIPELINES
    if kind == "algorithm":
        return ALGORITHMS
    table = load_object("rewards:REWARDS")
    return {name: Entry(target, description) for name, (target, description) in table.items()}


def find(kind: Kind, name: str) -> Entry:
    """The entry called ``name``; ``"module:attribute"`` and ``"file.py:attribute"`` name things outside the registry.

    Raises:
        UserError: there is no such name; the sentence gives the nearest spelling.
    """
    if ":" in name:
        return Entry(name, "")
    known = entries(kind)
    if name not in known:
        raise UserError(f"there is no {kind} '{name}'{nearest(name, known)}")
    return known[name]


def resolve(kind: Kind, name: str) -> Any:
    """The class or function that ``name`` stands for; see :func:`find`."""
    return load_object(find(kind, name).target)


def is_target(text: str) -> bool:
    """Whether ``text`` has the form ``module:attribute`` or ``file.py:attribute``."""
    place, _, attribute = text.rpartition(":")
    if not attribute.isidentifier() or not place:
        return False
    return place.endswith(".py") or all(part.isidentifier() for part in place.split("."))


def load_object(target: str) -> Any:
    """Import ``"module:attribute"`` or ``"file.py:attribute"``.

    Raises:
        UserError: the file, module or attribute does not exist. An error inside the module itself is not caught.
    """
    if not is_target(target):
        raise UserError(f"'{target}' should have the form 'module:name' or 'file.py:name'")
    place, _, attribute = target.rpartition(":")
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place, target)
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise UserError(f"'{target}': '{place}' has nothing called '{attribute}'{nearest(attribute, public)}")
    return getattr(module, attribute)


def _import_module(name: str, target: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A missing module further down is a broken installation, not a misspelt target.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise UserError(f"'{target}': there is no module '{error.name}'") from error


def _import_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    name = f"mmrl user file {path}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        # Registered first, so that dataclasses and pickling inside the file find their module.
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]
