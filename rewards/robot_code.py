"""A reward of episodes that a language model has written, as in Text2Reward (arXiv 2309.11489)."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from mmrl.errors import UserError
from mmrl.scoring import describe_sample
from mmrl.types import Episode, Samples
from rewards.robot import episodes_of
from rewards.sandbox import Limits, Sandbox

Count = Annotated[int, Field(gt=0)]

WANTED = "reward(state, action, next_state)"


class RewardCode:
    """The sum over turns of a function ``reward(state, action, next_state)`` in a Python file.

    The function gets numpy arrays: the state ``[S]`` before the turn, the actions ``[h, D]`` that were executed in it,
    and the state ``[S]`` after it. It runs in a process with little time, memory and rights (``docs/text-rewards.md``),
    so a file from a model need not be trusted. Nothing is kept from one batch to the next.

    Args:
        file: with the function; it may import numpy (there as ``np``) and the standard library.
        seconds, memory_mb: what one batch of episodes may use.
        confine: "required" refuses to run where the kernel cannot confine the process; "auto" does what it can.
    """

    name = "reward_code"
    differentiable = False
    partial = False

    def __init__(
        self,
        file: str,
        seconds: Count = 10,
        memory_mb: Count = 2048,
        confine: Literal["auto", "required"] = "auto",
    ):
        self.file, self.code = file, _checked(file)
        self.sandbox = Sandbox("reward", Limits(seconds, memory_mb, workers=1, confine=confine))

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, the sums over turns."""
        return torch.tensor([sum(parts) for parts in self.turns(samples)], dtype=torch.float32)

    def turns(self, samples: Samples) -> list[list[float]]:
        """What each turn earned, for credit turn by turn (see :meth:`mmrl.scoring.Scorer.turns`).

        Raises:
            UserError: the samples are no episodes or have no states; the code fails or takes too much.
        """
        episodes = episodes_of(samples, self.name)
        for row, episode in enumerate(episodes):
            if episode.states is None:
                raise UserError(f"reward '{self.name}' looks at states, but {describe_sample(samples, row)} has none")
        columns = _columns(episodes)
        turns = len(columns["executed"])
        found = self.sandbox.run(
            {"code": self.code},
            lambda place: _scores(place, turns),
            lambda place: np.savez(place / "turns.npz", **columns),
        )
        if found is None:
            raise UserError(
                f"reward '{self.name}': {self.file} took more than {self.sandbox.limits.seconds} s or "
                f"{self.sandbox.limits.memory_mb} MB, or could not be confined, on a batch of {len(episodes)} episodes"
            )
        if "error" in found:
            raise UserError(f"reward '{self.name}': {self.file}, {found['error']}")
        counts = [episode.turns for episode in episodes]
        return [part.tolist() for part in torch.tensor(found["scores"], dtype=torch.float64).split(counts)]


def _checked(file: str) -> str:
    """The code, once it is certain that it defines the function; it is not run for that."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UserError(f"reward 'reward_code': there is no file '{file}'")
    code = path.read_text(encoding="utf-8")
    try:
        tree = ast.parse(code)
    except SyntaxError as error:
        raise UserError(f"reward 'reward_code': {file}, line {error.lineno}: {error.msg}") from error
    if not any(isinstance(node, ast.FunctionDef) and node.name == "reward" for node in tree.body):
        raise UserError(f"reward 'reward_code': {file} does not define {WANTED}")
    return code


def _columns(episodes: list[Episode]) -> dict[str, np.ndarray]:
    """One row a turn, of all episodes one after the other."""
    longest = max(episode.actions.shape[1] for episode in episodes)
    actions = [pad(episode.actions, (0, 0, 0, longest - episode.actions.shape[1])) for episode in episodes]
    columns = {
        "states": [episode.states[:-1] for episode in episodes],
        "actions": actions,
        "executed": [episode.executed for episode in episodes],
        "next_states": [episode.states[1:] for episode in episodes],
    }
    return {name: torch.cat(parts).cpu().numpy() for name, parts in columns.items()}


def _scores(folder: Path, turns: int) -> dict[str, Any] | None:
    """What the process left; None if it met its end first, or the code left something of its own in that place."""
    place = folder / "scores.json"
    if place.is_symlink() or not place.is_file():
        return None
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        return None
    if not isinstance(found, dict):
        return None
    if isinstance(found.get("error"), str):
        return {"error": found["error"]}
    scores = found.get("scores")
    fine = isinstance(scores, list) and len(scores) == turns and all(isinstance(score, float) for score in scores)
    return {"scores": scores} if fine else None
