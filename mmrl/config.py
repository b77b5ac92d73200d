"""The config: sections with types and ranges, components by name, stages; loaded and checked before any model.

``load_config`` reads and validates; ``mmrl.checks`` looks at what a config points to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl.components import (
    Component,
    algorithm_component,
    build_algorithm,
    pipeline_component,
    reward_component,
)
from mmrl.errors import UserError, located, nearest
from mmrl.options import Strict, absolute_if_found, plain, validate
from mmrl.overrides import (
    apply_override,
    describe,
    get_path,
    merge,
    parse_override,
    read_yaml,
    to_yaml,
    write_yaml,
)
from mmrl.registry import load_object

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


class DataOptions(Strict):
    """Where prompts come from and how many a step takes.

    Attributes:
        prompts: a .txt, .jsonl, .json or .csv file, a folder of pictures with captions, a folder saved by Hugging Face
            datasets, ``hub:owner/name`` for a data set on the hub, ``module:function`` or ``file.py:function``, or a
            list of texts and rows. See ``mmrl.data``.
        eval_prompts: held-out prompts in any of these forms; without them evaluations use ``prompts``.
        batch_size: prompts per training step, over all processes.
        shuffle: a new order every epoch; otherwise the order of the source.
        columns: which column of a row is ``text``, ``images``, ``videos``, ``messages``, ``target``, ``task``,
            ``inputs``, ``id``, where it has another name.
        limit: only the first so many training prompts.
        split, eval_split: of a Hugging Face data set.
        options, eval_options: keywords for the function, or for ``datasets.load_dataset`` (a hub data set's ``name``,
            ``revision``).
    """

    prompts: str | list[str | dict[str, Any]]
    eval_prompts: str | list[str | dict[str, Any]] | None = None
    batch_size: Count = 8
    shuffle: bool = True
    columns: dict[Literal["text", "images", "videos", "messages", "target", "task", "inputs", "id"], str] = Field(
        default_factory=dict
    )
    limit: Count | None = None
    split: str = "train"
    eval_split: str = "test"
    options: dict[str, Any] = Field(default_factory=dict)
    eval_options: dict[str, Any] = Field(default_factory=dict)


class EmaOptions(Strict):
    """A moving average of the trained weights, which evaluations and the exported model use.

    Attributes:
        decay: share of the old average kept at an optimiser step.
        warmup: start with less, ``min((1 + n) / (10 + n), decay)`` at the n-th step.
    """

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    warmup: bool = True


class TrainerOptions(Strict):
    """The loop and the optimiser.

    Attributes:
        steps: training steps; a step is one rollout and the algorithm's updates on it.
        lr: learning rate.
        optimizer: class in ``torch.optim``.
        optimizer_options: its keywords other than ``lr``, e.g. ``{betas: [0.9, 0.999], weight_decay: 0.0001}``.
        schedule: of the learning rate after the warm-up: constant, linear or cosine down to 0.
        warmup: steps over which the learning rate rises from 0.
        max_grad_norm: gradients are scaled down to this norm; null never.
        micro_batch_size: samples per backward; the pipeline's ``batch_size`` when not given.
        mixed_precision: autocast of the networks; step mathematics stays in float32.
        ema: moving average of the weights; null for none.
        save_every: steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: how many of the latest stay; null keeps all.
        eval_every: steps between evaluations; 0 evaluates before the first and after the last step only.
        log_every: steps between lines where there is no terminal, by default about 40 lines a stage; ``metrics.jsonl``
            has every step.
        device: ``auto`` takes CUDA, then MPS, then the CPU.
        threads: CPU threads; torch's choice when not given.
        compile: ``torch.compile`` for the trained networks.
        tensorboard: write TensorBoard events.
        wandb: Weights & Biases project; null does not use it.
    """

    steps: Count = 100
    lr: Positive = 1e-4
    optimizer: str = "AdamW"
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: Annotated[int, Field(ge=0)] = 0
    max_grad_norm: Positive | None = 1.0
    micro_batch_size: Count | None = None
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    ema: EmaOptions | None = None
    save_every: Annotated[int, Field(ge=0)] = 0
    keep_checkpoints: Count | None = 3
    eval_every: Annotated[int, Field(ge=0)] = 0
    log_every: Count | None = None
    device: str = "auto"
    threads: Count | None = None
    compile: bool = False
    tensorboard: bool = True
    wandb: str | None = None


class EvalOptions(Strict):
    """Evaluations: fixed prompts, fixed seeds, the deterministic sampler.

    Attributes:
        samples_per_prompt: 2 or more for rewards that compare the samples of a prompt, such as diversity.
        seed: of the samples' noise; the same at every evaluation and independent of the training seed.
        limit: only the first so many evaluation prompts.
        rewards: what to report; the training rewards when not given.
        record: of policies that act in an environment, how many prompts' episodes are kept as moving pictures.
    """

    samples_per_prompt: Count = 1
    seed: Annotated[int, Field(ge=0)] = 0
    limit: Count | None = None
    rewards: list[Any] | None = None
    record: Annotated[int, Field(ge=0)] = 8


@dataclass
class StageConfig:
    """One stage, complete: what the top level says with the stage's own keys laid over it."""

    name: str
    data: DataOptions
    rewards: list[Component]
    algorithm: Component
    trainer: TrainerOptions
    eval: EvalOptions
    eval_rewards: list[Component]

    def dump(self) -> dict[str, Any]:
        """As it could stand in a config file, every default spelt out."""
        own = None if self.eval_rewards == self.rewards else [reward.dump() for reward in self.eval_rewards]
        return {
            "data": plain(self.data),
            "rewards": [reward.dump() for reward in self.rewards],
            "algorithm": self.algorithm.dump(),
            "trainer": plain(self.trainer),
            "eval": {**plain(self.eval), "rewards": own},
        }


@dataclass
class Config:
    """A validated config.

    Attributes:
        run_dir: the run's folder, relative to the working directory.
        seed: of everything random.
        pipeline: the model.
        stages: at least one, in order.
        source: the file it was read from, for messages.
    """

    run_dir: str
    seed: int
    pipeline: Component
    stages: list[StageConfig]
    source: str = field(default="config", compare=False)

    def dump(self) -> dict[str, Any]:
        """Plain values with every default spelt out; loading them gives an equal config."""
        head = {"run_dir": self.run_dir, "seed": self.seed, "pipeline": self.pipeline.dump()}
        if len(self.stages) == 1 and self.stages[0].name == DEFAULT_STAGE:
            return head | self.stages[0].dump()
        return head | {"stages": [{"name": stage.name, **stage.dump()} for stage in self.stages]}

    def to_yaml(self) -> str:
        """:meth:`dump` as YAML."""
        return to_yaml(self.dump())

    def save(self, path: Path) -> None:
        """Write ``to_yaml`` to a file."""
        write_yaml(self.dump(), path)


DEFAULT_STAGE = "train"
_SECTIONS = ("data", "rewards", "algorithm", "trainer", "eval")
_TOP = ("run_dir", "seed", "pipeline", *_SECTIONS, "stages")
_STAGE = ("name", *_SECTIONS)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config file, apply ``key=value`` overrides and validate everything but the files it points to.

    Relative paths are looked for in the config file's folder, then in the working directory.

    Raises:
        UserError: the first fault, as one sentence with the file, the dotted key and what would be right.
    """
    path = Path(path)
    data = read_yaml(path)
    where = str(path) if not overrides else f"{path} with {' '.join(overrides)}"
    return parse_config(data, overrides, where=where, folder=path.parent, name=path.stem)


def parse_config(
    data: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    where: str = "config",
    folder: Path = Path(),
    name: str = "run",
) -> Config:
    """A config from plain values; see :func:`load_config`.

    Args:
        where: begins error messages.
        folder: where relative paths are looked for first.
        name: of the run folder ``runs/NAME`` when ``run_dir`` is not given.
    """
    data = _spell_out(data)
    paths = []
    for text in overrides:
        keys, value = parse_override(text)
        apply_override(data, keys, value)
        paths.append(keys)
    data = _spell_out(data)
    _check_keys(data, _TOP, where, "")
    folders = [folder, Path.cwd()]
    head = validate(_Head, {k: data[k] for k in ("run_dir", "seed") if k in data}, where=where, path="")
    if "pipeline" not in data:
        raise UserError(f"{where}: 'pipeline' is missing")
    pipeline = pipeline_component(data["pipeline"], where=where, path="pipeline", folders=folders)
    base = {key: data[key] for key in _SECTIONS if key in data}
    partial = data.get("stages")
    if partial is not None:
        stages = _stages(base, partial, paths, where, folders)
    else:
        stages = [_stage(DEFAULT_STAGE, base, where, folders)]
    for stage in stages:
        check_fit(pipeline, stage, where if partial is None else f"{where}, stage '{stage.name}'")
    return Config(head.run_dir or f"runs/{name}", head.seed, pipeline, stages, where)


def check_fit(pipeline: Component, stage: StageConfig, where: str) -> None:
    """Whether pipeline, algorithm and rewards go together.

    Raises:
        UserError: the algorithm needs what the policy does not offer, rewards that are not there, or their gradient.
    """
    algorithm = build_algorithm(stage.algorithm)
    # What a policy offers may depend on its options; one may know only once it is built, and then there is no set.
    offers = getattr(pipeline.target, "offers", None)
    offered = offers(**pipeline.options) if offers is not None else getattr(pipeline.target, "verbs", None)
    missing = sorted(algorithm.verbs - offered) if isinstance(offered, (set, frozenset)) else []
    if missing:
        from mmrl.policy import VERB_HELP

        raise UserError(
            f"{where}: algorithm '{stage.algorithm.type}' needs a policy that offers {', '.join(missing)}, "
            f"but pipeline '{pipeline.type}' offers {', '.join(sorted(offered))}"
            + (f" ({VERB_HELP[missing[0]]})" if missing[0] in VERB_HELP else "")
        )
    if isinstance(offered, (set, frozenset)) and hasattr(algorithm, "defaults_for"):
        # Written out, so that the plan and the run's own config say what an option that was not given stands for.
        with located(where):
            defaults = algorithm.defaults_for(frozenset(offered))
        for key, value in defaults.items():
            if stage.algorithm.options[key] is None:
                stage.algorithm.options[key] = value
    if algorithm.needs_rewards and not stage.rewards:
        raise UserError(f"{where}: 'rewards' is empty, but algorithm '{stage.algorithm.type}' needs at least one")
    if getattr(algorithm, "needs_comparison", False):
        for reward in stage.rewards:
            if reward.shared.get("weight") != 0 and not hasattr(reward.target, "compare"):
                raise UserError(
                    f"{where}: algorithm.pairs is 'compared', but reward '{reward.type}' cannot compare two samples: "
                    "use one that can, such as judge_pair, or pairs: best_worst"
                )
    if algorithm.needs_gradient_of_reward:
        for reward in stage.rewards:
            if reward.shared.get("weight") != 0 and not getattr(reward.target, "differentiable", False):
                able = load_object("rewards:differentiable_rewards")()
                raise UserError(
                    f"{where}: algorithm '{stage.algorithm.type}' needs gradients, which do not flow through reward "
                    f"'{reward.type}' (they do through {', '.join(sorted(able))})"
                )


class _Head(Strict):
    run_dir: str | None = None
    seed: Annotated[int, Field(ge=0)] = 0


def _stages(
    base: Mapping[str, Any], partial: Any, overridden: Sequence[list[str]], where: str, folders: list[Path]
) -> list[StageConfig]:
    if not isinstance(partial, list) or not partial:
        raise UserError(f"{where}: 'stages' is {describe(partial)}, but should be a list of at least one stage")
    stages: list[StageConfig] = []
    for number, own in enumerate(partial):
        if not isinstance(own, Mapping):
            raise UserError(f"{where}: 'stages.{number}' is {describe(own)}, but should be a mapping")
        _check_keys(own, _STAGE, where, f"stages.{number}.")
        name = own.get("name", f"stage{number + 1}")
        if not isinstance(name, str) or name in [stage.name for stage in stages]:
            raise UserError(f"{where}: 'stages.{number}.name' is {describe(name)}, but should be text and not repeat")

        data = merge(base, {key: value for key, value in own.items() if key != "name"})
        stages.append(_stage(name, data, f"{where}, stage '{name}'", folders))
    for keys in overridden:
        if keys[0] in _SECTIONS and all(get_path(own, keys)[0] for own in partial):
            raise UserError(
                f"{where}: the override of '{'.'.join(keys)}' changes nothing, because every stage sets it: "
                f"use stages.0.{'.'.join(keys)}=... instead"
            )
    return stages


def _stage(name: str, data: Mapping[str, Any], where: str, folders: list[Path]) -> StageConfig:
    for key in ("data", "algorithm"):
        if key not in data:
            raise UserError(f"{where}: '{key}' is missing")

    def section(model: type[Strict], key: str) -> Any:
        return validate(model, data.get(key, {}), where=where, path=key)

    prompts = section(DataOptions, "data")
    for key in ("prompts", "eval_prompts"):
        setattr(prompts, key, _find_source(getattr(prompts, key), folders))
    rewards = _rewards(data.get("rewards", []), where, "rewards", folders)
    evaluation = section(EvalOptions, "eval")
    eval_rewards = rewards
    if evaluation.rewards is not None:
        eval_rewards = _rewards(evaluation.rewards, where, "eval.rewards", folders)
    return StageConfig(
        name=name,
        data=prompts,
        rewards=rewards,
        algorithm=algorithm_component(data["algorithm"], where=where, path="algorithm", folders=folders),
        trainer=section(TrainerOptions, "trainer"),
        eval=evaluation.model_copy(update={"rewards": None}),
        eval_rewards=eval_rewards,
    )


def _find_source(source: Any, folders: list[Path]) -> Any:
    """A path, or the file of ``file.py:function``, made absolute."""
    if not isinstance(source, str):
        return source
    place, colon, attribute = source.rpartition(":")
    if colon and place.endswith(".py"):
        return f"{absolute_if_found(place, folders)}:{attribute}"
    return absolute_if_found(source, folders)


def _rewards(items: Any, where: str, path: str, folders: list[Path]) -> list[Component]:
    if not isinstance(items, list):
        raise UserError(f"{where}: '{path}' is {describe(items)}, but should be a list of rewards")
    rewards = [
        reward_component(item, where=where, path=f"{path}.{number}", folders=folders)
        for number, item in enumerate(items)
    ]
    names = [reward.shared["name"] for reward in rewards]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise UserError(
                f"{where}: '{path}.{number}' is called '{name}' like an earlier reward: "
                "give it another name (name: ...)"
            )
    return rewards


def _check_keys(data: Mapping[str, Any], known: Sequence[str], where: str, prefix: str) -> None:
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key '{prefix}{key}'{nearest(str(key), known)}")


def _spell_out(data: Mapping[str, Any]) -> dict[str, Any]:
    """A copy with the short forms written out: ``rewards: [clip]``, ``algorithm: grpo``, sections without content."""
    out = deepcopy(dict(data))
    parts = [out, *(stage for stage in out.get("stages") or [] if isinstance(stage, dict))]
    for part in parts:
        for key in ("pipeline", "data", "algorithm", "trainer", "eval"):
            if key in part and part[key] is None:
                part[key] = {}
        for key in ("pipeline", "algorithm"):
            if isinstance(part.get(key), str):
                part[key] = {"type": part[key]}
        evaluation = part.get("eval")
        for holder in (part, evaluation if isinstance(evaluation, dict) else {}):
            if isinstance(holder.get("rewards"), list):
                holder["rewards"] = [{"type": r} if isinstance(r, str) else r for r in holder["rewards"]]
            elif "rewards" in holder and holder["rewards"] is None and holder is part:
                holder["rewards"] = []
    return out
