"""Chunks of actions to explain: those of demonstrations, or those that a rollout carried out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Denoising, Prompt
from pipelines.robot.envs import Observation
from pipelines.robot.rollout import Trace


@dataclass(eq=False)
class Chunks:
    """M chunks of N samples.

    Attributes:
        observation: before each chunk.
        actions: ``[M, H, D]``.
        executed: long ``[M]``.
        row: long ``[M]``, the sample that each belongs to.
        count: long ``[N]``, chunks of each sample.
    """

    observation: Observation
    actions: Tensor
    executed: Tensor
    row: Tensor
    count: Tensor

    def normals(self, seeds: Sequence[int], width: int) -> Tensor:
        """``[M, width]`` standard normal numbers; those of sample k's chunks are a function of ``seeds[k]`` alone."""
        draw = torch.Generator("cpu")
        counts = self.count.tolist()
        return torch.cat(
            [
                torch.randn(count, width, generator=draw.manual_seed(seed))
                for count, seed in zip(counts, seeds, strict=True)
            ]
        )

    def mean(self, values: Tensor) -> Tensor:
        """Means ``[N]`` over the chunks of each sample of ``values`` ``[M]``."""
        if len(self.count) == len(self.row):
            return values
        row, count = self.row.to(values.device), self.count.to(values)
        return values.new_zeros(len(count)).index_add(0, row, values) / count


def of_rollout(trace: Trace) -> Chunks:
    """What was executed, in the policy's scale, with observations as the network saw them."""
    places, row, _ = trace.places()
    turns = trace.turns[places]
    return Chunks(turns.observation, turns.actions, turns.executed, row, trace.count)


def demonstrated(prompts: Sequence[Prompt]) -> Chunks:
    """What prompts show as their target, one chunk each, all in the units of the environment.

    Raises:
        UserError: a prompt has no such target.
    """
    seen: dict[str, list[Any]] = {"state": [], "image": []}
    for prompt in prompts:
        target = prompt.target
        if not isinstance(target, dict) or not {"observation", "actions"} <= target.keys():
            raise UserError(
                f"prompt '{prompt.id}' has no demonstration: target should be "
                "{observation: {state: ..., image: ...}, actions: [H, D]}"
            )
        for name, values in seen.items():
            if name in target["observation"]:
                values.append(target["observation"][name])
    actions = _stacked([prompt.target["actions"] for prompt in prompts], "actions").float()
    tensors = {name: _stacked(values, name) for name, values in seen.items() if len(values) == len(prompts)}
    if "state" in tensors:
        tensors["state"] = tensors["state"].float()
    executed = torch.full((len(prompts),), actions.shape[1])
    rows = torch.arange(len(prompts))
    observation = Observation(**tensors, instruction=[prompt.text for prompt in prompts])
    return Chunks(observation, actions, executed, rows, torch.ones_like(rows))


def widened_rows(denoising: Denoising, widen: Callable[[Tensor], Tensor]) -> Denoising:
    """The same with rows added by ``widen``."""
    present = {f.name: getattr(denoising, f.name) for f in fields(denoising) if f.name != "row"}
    return Denoising(**{name: None if value is None else widen(value) for name, value in present.items()})


def cut(denoising: Denoising, row: Tensor) -> Denoising:
    """The same without rows added at the end; ``row`` ``[M]`` is the sample of each that stays."""
    present = {f.name: getattr(denoising, f.name) for f in fields(denoising) if f.name != "row"}
    return replace(denoising, **{name: value[: len(row)] for name, value in present.items()}, row=row)


def _stacked(values: Sequence[Any], what: str) -> Tensor:
    if isinstance(values[0], Tensor):
        return torch.stack(list(values))
    try:
        return torch.from_numpy(np.stack([np.asarray(value) for value in values]))
    except ValueError as error:
        raise UserError(f"demonstrations differ in the shape of their {what}: {error}") from error
