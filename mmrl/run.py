"""From a config to a run: build policy, stages and writers, then train, evaluate or sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mmrl import checkpoints, distributed
from mmrl.algorithms.collecting import row_chunks
from mmrl.checks import StageData, check
from mmrl.components import build_algorithm, build_policy, build_scorer
from mmrl.config import Config, StageConfig, load_config
from mmrl.data import PromptSampler
from mmrl.display import Display
from mmrl.errors import UserError
from mmrl.evaluation import Evaluation
from mmrl.metrics import MetricsWriter
from mmrl.policy import Policy
from mmrl.seeding import derive_seed
from mmrl.trainer import AVERAGE, Stage, Trainer
from mmrl.types import Prompt, Samples

CONFIG_FILE = "config.yaml"


def train(config: Config) -> dict[str, Any]:
    """Train from the start in a fresh run folder; returns the summary.

    If ``config.run_dir`` holds a run already, the next free ``NAME-2``, ``NAME-3``... is taken and put in its place:
    nothing is overwritten.
    """
    data = check(config)
    device = start_processes(config)
    run_dir = _fresh_folder(Path(config.run_dir))
    config.run_dir = str(run_dir)
    if distributed.rank() == 0:
        run_dir.mkdir(parents=True, exist_ok=True)
        config.save(run_dir / CONFIG_FILE)
    distributed.barrier()
    return _trainer(config, data, device).run()


def resume(run_dir: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Go on from the latest checkpoint of a run, or from the start if it has none; returns the summary."""
    config = run_config(run_dir, overrides)
    data = check(config)
    return _trainer(config, data, start_processes(config)).run(resume=True)


def evaluate(config: Config, checkpoint: Path | None = None) -> dict[str, float]:
    """Scores of the last stage's held-out prompts, with the weights of ``checkpoint`` or the config's own model."""
    data = check(config)[-1]
    evaluation = _evaluation(config.stages[-1], data)
    if evaluation is None:
        raise UserError(f"{config.source}: there is nothing to evaluate: 'rewards' and 'eval.rewards' are empty")
    return evaluation(load_policy(config, checkpoint), 0)


def sample(config: Config, prompts: Sequence[Prompt], seeds: Sequence[int], checkpoint: Path | None = None) -> Samples:
    """One sample per prompt and seed by the deterministic sampler."""
    policy = load_policy(config, checkpoint)
    with torch.no_grad():
        parts = [policy.generate(prompts[rows], seeds[rows]) for rows in row_chunks(len(prompts), policy.batch_size)]
    return Samples.cat(parts)


def run_config(run_dir: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved config of a run folder, which may have been moved since."""
    path = Path(run_dir) / CONFIG_FILE
    if not path.is_file():
        raise UserError(f"'{run_dir}' is not a run folder: it has no {CONFIG_FILE}")
    config = load_config(path, overrides)
    config.run_dir = str(run_dir)
    return config


def latest_checkpoint(run_dir: Path) -> Path:
    """The newest complete checkpoint; raises ``UserError`` if there is none."""
    found = checkpoints.checkpoints(Path(run_dir))
    if not found:
        raise UserError(f"run '{run_dir}' has no checkpoint yet")
    return found[-1]


def load_policy(config: Config, checkpoint: Path | None = None) -> Policy:
    """The policy on its device, with the weights of a checkpoint (averaged ones if it has them)."""
    policy = _policy(config, start_processes(config))
    if checkpoint is not None:
        checkpoints.load(checkpoint, policy.parameters)
        if AVERAGE in policy.parameters.snapshots:
            policy.parameters.load(policy.parameters.snapshots[AVERAGE])
    return policy


def start_processes(config: Config) -> torch.device:
    """Join the process group if a launcher made one; returns the device of this process."""
    from accelerate import PartialState

    options = config.stages[0].trainer
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    state = PartialState(cpu=options.device == "cpu")
    return state.device if options.device in ("auto", "cpu") else torch.device(options.device)


def _policy(config: Config, device: torch.device) -> Policy:
    # Adapters draw their first weights inside peft, from torch's global generator.
    torch.manual_seed(derive_seed(config.seed, "init"))
    return build_policy(config.pipeline).to(device)


def _trainer(config: Config, data: list[StageData], device: torch.device) -> Trainer:
    run_dir, options = Path(config.run_dir), config.stages[0].trainer
    policy = _policy(config, device)
    if options.compile:
        policy.compile()
    stages = [_stage(config, number, stage_data) for number, stage_data in enumerate(data)]
    display = Display(rank=distributed.rank(), log_every=options.log_every)
    display.start(_overview(config, policy, device))
    writer = None
    if distributed.rank() == 0:
        writer = MetricsWriter(run_dir, options.tensorboard, options.wandb, config.dump())
    return Trainer(policy, stages, run_dir, writer, display)


def _stage(config: Config, number: int, data: StageData) -> Stage:
    stage = config.stages[number]
    seed = derive_seed(config.seed, "stage", number)
    world, rank = distributed.world_size(), distributed.rank()
    sampler = PromptSampler(data.train, stage.data.batch_size, seed, stage.data.shuffle, rank, world)
    return Stage(
        name=stage.name,
        algorithm=build_algorithm(stage.algorithm),
        prompts=sampler,
        scorer=build_scorer(stage.rewards),
        evaluation=_evaluation(stage, data),
        options=stage.trainer,
        seed=seed,
    )


def _evaluation(stage: StageConfig, data: StageData) -> Evaluation | None:
    scorer = build_scorer(stage.eval_rewards)
    if scorer is None:
        return None
    return Evaluation(data.eval, stage.eval.samples_per_prompt, stage.eval.seed, scorer, stage.eval.record)


def _overview(config: Config, policy: Policy, device: torch.device) -> dict[str, Any]:
    """What is about to run, for the terminal."""
    out = {"run": config.run_dir, "model": config.pipeline.options.get("model") or config.pipeline.type}
    for stage in config.stages:
        rewards = ", ".join(reward.shared["name"] for reward in stage.rewards) or "none"
        clip = stage.algorithm.options.get("clip_range")
        bounds = "" if clip is None else f", clip range {clip:g}"
        out[stage.name] = f"{stage.algorithm.type}, {stage.trainer.steps} steps, rewards: {rewards}{bounds}"
    if hasattr(policy, "overview"):
        out |= policy.overview()
    out["training"] = f"{policy.parameters.count:,} parameters on {device}"
    return out


def _fresh_folder(folder: Path) -> Path:
    """``folder``, or with a number behind it where a run is there already."""
    number, candidate = 1, folder
    while (candidate / "metrics.jsonl").exists() or (candidate / "checkpoints").exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    # Nobody may make the folder before everybody has looked.
    distributed.barrier()
    return candidate
