"""Starts of episodes, and what scripted experts do from them, as prompts.

In a config: ``data: {prompts: "pipelines.robot.demonstrations:starts", options: {env: planar:push, count: 512}}``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch

from mmrl.errors import UserError
from mmrl.seeding import derive_seed
from mmrl.types import Prompt
from pipelines.robot.envs import Envs, make_envs
from pipelines.robot.planar.chance import normals

_SIDE_BY_SIDE = {"planar": 256}
"""Episodes at a time; where they are not stepped together, more than one would only cost their making."""


def starts(
    env: str,
    count: int,
    split: Literal["train", "eval", "demonstrations"] = "train",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Starts of episodes.

    Args:
        env: as :func:`pipelines.robot.envs.make_envs` takes it.
        count: how many.
        split: starts of different splits never have a seed in common.
        seed: another one gives other starts.
        options: of the environment; only the instructions depend on them.

    Returns:
        Prompts with the instruction as text (what the environment calls its task, if it gives none) and the episode's
        seed as ``inputs["seed"]``.
    """
    seeds = [_seed(split, seed, number) for number in range(count)]
    texts: list[str] = []
    envs = _envs(env, count, options)
    try:
        while len(texts) < count:
            seen = envs.reset(seeds[len(texts) : len(texts) + envs.size])
            told = seen.instruction or [env] * len(seen)
            texts += told if envs.backend.layout.instructs else told[:1] * count
    finally:
        envs.close()
    return [
        Prompt(id=f"{split}-{number}", text=text, inputs={"seed": start}, metadata={"env": env})
        for number, (text, start) in enumerate(zip(texts, seeds, strict=False))
    ]


def demonstrations(
    env: str,
    episodes: int,
    horizon: int,
    noise: float = 0.0,
    slowness: float = 0.0,
    keep: Literal["all", "success"] = "all",
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Iterator[Prompt]:
    """What a scripted expert does, a prompt for each turn of ``horizon`` actions.

    The expert looks at the environment before every action. Its actions, as they are executed and recorded, are
    ``(1 - slowness) * expert + noise * z`` with standard normal z, clipped to the limits.

    Args:
        env, options: as for :func:`starts`.
        episodes: how many episodes are tried.
        horizon: actions in a turn; in the last one of an episode, actions that were not executed repeat the last one.
        noise: standard deviation, in units of the action.
        slowness: share of the expert's action that is left out, 0 to 1.
        keep: whether episodes that failed are kept.
        seed: another one gives other episodes.

    Returns:
        Prompts whose ``target`` is ``{"observation": {"state": [S], "image": [3, h, w]}, "actions": [H, D]}`` with
        those of the two that there are, and whose text is the instruction.

    Raises:
        UserError: the environment has no expert, or no episode succeeded.
    """
    if not 0 <= slowness <= 1 or noise < 0:
        raise UserError(f"slowness is {slowness} and noise {noise}, but should be 0 to 1, and not negative")
    envs = _envs(env, episodes, options)
    kept = 0
    try:
        for first in range(0, episodes, envs.size):
            numbers = range(first, min(first + envs.size, episodes))
            seeds = [_seed("demonstrations", seed, number) for number in numbers]
            for number, turns, success in _run(envs, seeds, horizon, noise, slowness):
                if success or keep == "all":
                    kept += 1
                    for turn, (text, observation, actions) in enumerate(turns):
                        yield Prompt(
                            id=f"demonstration-{numbers[number]}-{turn}",
                            text=text or env,
                            target={"observation": observation, "actions": actions},
                            metadata={"env": env, "seed": seeds[number]},
                        )
    finally:
        envs.close()
    if not kept:
        raise UserError(f"none of {episodes} demonstrations of env '{env}' succeeded: less noise would help")


def _envs(env: str, count: int, options: Mapping[str, Any] | None) -> Envs:
    """In this process, where the expert can look at them."""
    size = min(count, _SIDE_BY_SIDE.get(env.partition(":")[0], 1))
    return make_envs(env, size, **{**(options or {}), "processes": 0})


def _run(envs: Envs, seeds: list[int], horizon: int, noise: float, slowness: float) -> Iterator[tuple[int, list, bool]]:
    """The turns of one episode from each seed, and whether it succeeded."""
    stepped = envs.backend.envs
    low, high = envs.action_low.numpy(), envs.action_high.numpy()
    envs.reset(seeds)
    seed_array = np.asarray(seeds, np.uint64)
    turns: list[list] = [[] for _ in seeds]
    success = np.zeros(len(seeds), bool)
    live = np.arange(len(seeds))
    step = 0
    while len(live):
        seen = stepped.observe(live)
        actions = np.zeros((len(seeds), horizon, envs.action_dim), np.float32)
        moving = live
        for k in range(horizon):
            chosen = (1 - slowness) * stepped.expert(moving)
            chosen = chosen + noise * normals(seed_array[moving], envs.action_dim, stream=1000 + step + k)
            actions[moving, k:] = np.clip(chosen, low, high)[:, None]
            _, terminated, truncated, info = stepped.advance(moving, actions[moving, k])
            success[moving] |= info["success"]
            moving = moving[~(terminated | truncated)]
            if not len(moving):
                break
        for place, row in enumerate(live):
            observation = {name: torch.from_numpy(seen[name][place]) for name in ("state", "image") if name in seen}
            text = seen["instruction"][place] if "instruction" in seen else ""
            turns[row].append((text, observation, torch.from_numpy(actions[row])))
        live, step = moving, step + horizon
    return zip(range(len(seeds)), turns, success.tolist(), strict=True)


def _seed(split: str, seed: int, number: int) -> int:
    """The seed of a start, below 2^31 since some simulators take no more; no two splits share one."""
    place = ("train", "eval", "demonstrations").index(split)
    return (place << 29) | (derive_seed(seed, split, number) >> 34)
