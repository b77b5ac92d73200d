"""What a step of a config costs, from the config alone."""

from __future__ import annotations

from typing import Any

from mmrl.components import Component, build_algorithm
from mmrl.config import Config, StageConfig


def forwards_per_sample(pipeline: Component) -> dict[str, int]:
    """Network forwards of one sample for each verb.

    A policy class says so in a static ``forwards_per_sample(**options)``; without it a sampler of ``num_steps`` steps
    is assumed whose last step is not trained. "kept" is what the first update on a rollout need not run again.
    """
    hook = getattr(pipeline.target, "forwards_per_sample", None)
    if hook is not None:
        return dict(hook(**pipeline.keywords()))
    steps = int(pipeline.options.get("num_steps") or 1)
    return {"rollout": steps, "decisions": max(steps - 1, 1), "fit": 1, "generate": steps}


def step_cost(config: Config, stage: StageConfig) -> dict[str, Any]:
    """Samples and network forwards (rows through the network, guidance not counted) of one training step.

    The updates' numbers are upper bounds: groups without a reward difference are dropped before any forward.
    """
    algorithm = build_algorithm(stage.algorithm)
    each = forwards_per_sample(config.pipeline)
    samples = stage.data.batch_size * algorithm.group_size
    cost: dict[str, Any] = {"prompts": stage.data.batch_size, "samples": samples}
    passes = getattr(algorithm, "epochs", 1)
    references = 1 if algorithm.needs_reference else 0
    if "rollout" in algorithm.verbs:
        cost["rollout forwards"] = samples * each["rollout"]
    if "decisions" in algorithm.verbs:
        free = samples * each.get("kept", 0) // getattr(algorithm, "minibatches", 1)
        cost["update forwards"] = samples * each["decisions"] * passes - free
        cost["reference forwards"] = samples * each["decisions"] * passes * references
    if "candidates" in algorithm.verbs:
        # Each takes its step, and one more that shows where it leads.
        cost["candidate forwards"] = samples * algorithm.steps_per_rollout * algorithm.candidates * 2
        cost["update forwards"] = samples * algorithm.steps_per_rollout * 2 * passes
        cost["reference forwards"] = cost["update forwards"]
    if "complete" in algorithm.verbs:
        verb = "decisions" if algorithm.prospects.completion == "jump" else "complete"
        cost["completion forwards"] = samples * each[verb]
    if "fit" in algorithm.verbs or ("denoise" in algorithm.verbs and "chain" not in algorithm.verbs):
        rows = samples
        if "rollout" in algorithm.verbs and hasattr(algorithm, "pairs"):
            rows = stage.data.batch_size * 2 * (1 if algorithm.pairs == "best_worst" else algorithm.group_size // 2)
        draws = getattr(algorithm, "fits_per_sample", getattr(algorithm, "noise_draws", 1))
        cost["update forwards"] = int(rows * each["fit"] * passes * draws)
        cost["reference forwards"] = cost["update forwards"] * references
        if getattr(algorithm, "keeps_old", False) and algorithm.compares_with_old:
            cost["old policy's forwards"] = cost["update forwards"]
    if {"generate", "rollout"} <= algorithm.verbs:
        cost["baseline forwards"] = stage.data.batch_size * each["generate"]
    elif "chain" in algorithm.verbs:
        calls, with_gradient = algorithm.network_calls(each["generate"])
        cost["sampling forwards"] = samples * calls
        cost["of these with gradient"] = samples * with_gradient
    steps = passes * getattr(algorithm, "minibatches", 1)
    cost["optimiser steps"] = getattr(algorithm, "optimiser_steps", steps)
    return {key: value for key, value in cost.items() if value}
