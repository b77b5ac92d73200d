"""Residual reinforcement learning: a frozen robot policy, a small actor that corrects it, and critics over replay."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm, relu

from mmrl.errors import UserError
from mmrl.policy import Parameters
from mmrl.transitions import Replay, Transitions
from mmrl.types import Rollout
from pipelines.robot.envs import Observation
from pipelines.robot.heads.base import HeadShape
from pipelines.robot.heads.residual import ResidualHead, tanh_log_density
from pipelines.robot.loading import Clone, load_clone
from pipelines.robot.networks import StateEncoder
from pipelines.robot.policy import RobotPolicy, padded
from pipelines.robot.rollout import Trace

OWN = "residual."

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class Critics(nn.Module):
    """An ensemble of MLPs with layer normalisation (RLPD, arXiv 2302.02948), asked in one go; at the start all say 0.

    Args:
        inputs: numbers of situation and action.
        hidden: widths of the layers.
        count: E.
    """

    def __init__(self, inputs: int, hidden: Sequence[int], count: int):
        super().__init__()
        sizes = [inputs, *hidden, 1]
        self.weights = nn.ParameterList(
            torch.empty(count, before, after).uniform_(-1, 1) / math.sqrt(before) for before, after in pairwise(sizes)
        )
        nn.init.zeros_(self.weights[-1])
        self.biases = nn.ParameterList(torch.zeros(count, 1, after) for after in sizes[1:])

    def forward(self, situation: Tensor, action: Tensor) -> Tensor:
        """Predicted return ``[E, n]``."""
        x = torch.cat([situation, action], 1).expand(len(self.weights[0]), -1, -1)
        last = len(self.weights) - 1
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x, weight)
            if number < last:
                x = relu(layer_norm(x, x.shape[-1:]))
        return x[:, :, 0]


class ResidualPolicy(RobotPolicy):
    """A frozen :class:`RobotPolicy` whose chunks a small actor corrects; see :class:`ResidualHead`.

    To the actor and the critics a turn's action is the correction, and the situation is the context together with the
    chunk that the base proposes. Trained by the algorithm ``residual_rl``.

    Args:
        clone: what ``ResidualPolicy.load`` makes of a folder: a policy to correct, or a corrected one.
        env, env_options, execute, envs, batch_size, frames: see :class:`RobotPolicy`.
        scale: bound of the correction, where 1 is half the range of an action.
        hidden: widths of the actor's layers.
        std: of the correction at the start, before it is scaled.
        critics: networks in the ensemble.
        critic_hidden: widths of their layers.
        temperature: weight of the entropy at the start.
        capacity: transitions that the replay buffer keeps.

    Raises:
        UserError: the folder's policy does not read states, or does not fit.
    """

    verbs = frozenset({"rollout", "decisions", "generate", "transitions"})

    def __init__(
        self,
        clone: Clone,
        env: Any,
        scale: Positive = 0.3,
        hidden: Sequence[int] = (128, 128),
        std: Positive = 0.3,
        critics: Annotated[int, Field(ge=2)] = 4,
        critic_hidden: Sequence[int] = (128, 128),
        temperature: Positive = 0.001,
        capacity: Count = 50_000,
        env_options: dict[str, Any] | None = None,
        execute: Count | None = None,
        envs: Count = 64,
        batch_size: Count = 256,
        frames: bool = False,
    ):
        own = {name.removeprefix(OWN): x for name, x in clone.tensors.items() if name.startswith(OWN)}
        base = {name: x for name, x in clone.tensors.items() if not name.startswith(OWN)}
        super().__init__(
            replace(clone, tensors=base),
            env,
            execute=execute,
            env_options=env_options,
            envs=envs,
            batch_size=batch_size,
            frames=frames,
        )
        if not isinstance(self.encoder, StateEncoder):
            raise UserError(f"the policy in '{clone.folder}' reads pictures; only those that read states are corrected")
        self.modules.requires_grad_(False)
        shape = HeadShape(self.encoder.context_dim, self.horizon, self.envs.action_dim)
        self.head = ResidualHead(shape, self.head, scale, hidden, std)
        self.num_critics = critics
        self._critics = Critics(self.head.situation_size + self.head.size, critic_hidden, critics)
        self._slow = copy.deepcopy(self._critics).requires_grad_(False)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        trained = nn.ModuleDict({"actor": self.head.actor, "critics": self._critics})
        trained.register_parameter("log_temperature", self.log_temperature)
        if own:
            try:
                trained.load_state_dict(own)
            except RuntimeError as error:
                raise UserError(f"the residual in '{clone.folder}' does not fit this pipeline: {error}") from error
            self._slow.load_state_dict(self._critics.state_dict())
        self.modules["residual"] = trained
        self._replay = {name: Replay(capacity, self.head.situation_size, self.head.size) for name in ("own", "prior")}
        kept = {f"replay.{name}.{key}": x for name, ring in self._replay.items() for key, x in ring.buffers.items()}
        self.parameters = Parameters(
            {f"{OWN}{name}": parameter for name, parameter in trained.named_parameters()},
            self.parameters.buffers | {f"slow.{name}": x for name, x in self._slow.named_parameters()} | kept,
        )
        self.verbs = ResidualPolicy.verbs

    @staticmethod
    def load(model: str) -> Clone:
        """Read a folder that ``export`` of a robot policy wrote, corrected already or not."""
        return load_clone(model)

    @staticmethod
    def offers(**options: Any) -> frozenset[str]:
        """The verbs, whatever the options."""
        return ResidualPolicy.verbs

    @staticmethod
    def validate(**options: Any) -> None:
        """Nothing to check without the folder, which may be another run's to write."""

    @staticmethod
    def forwards_per_sample(**options: Any) -> dict[str, int]:
        """Rows through the actor for each verb in a turn; the base's come on top."""
        return dict.fromkeys(("rollout", "decisions", "generate"), 1)

    def to(self, device: torch.device | str) -> ResidualPolicy:
        """Move the networks; transitions stay on the CPU."""
        self._slow.to(device)
        super().to(device)
        return self

    def overview(self) -> dict[str, str]:
        """See :meth:`RobotPolicy.overview`."""
        actor = sum(parameter.numel() for parameter in self.head.actor.parameters())
        return super().overview() | {"residual": f"actor of {actor} numbers, {self.num_critics} critics, frozen base"}

    def act(self, situation: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`mmrl.policy.TransitionsPolicy.act`."""
        mean, log_std = self.head.gaussian(situation)
        u = mean + log_std.exp() * normals
        return u.tanh(), tanh_log_density(u, mean, log_std).sum(1)

    def critics(self, situation: Tensor, action: Tensor, which: Literal["trained", "fixed", "slow"]) -> Tensor:
        """See :meth:`mmrl.policy.TransitionsPolicy.critics`."""
        if which == "slow":
            return self._slow(situation, action)
        if which == "trained":
            return self._critics(situation, action)
        fixed = {name: parameter.detach() for name, parameter in self._critics.named_parameters()}
        return functional_call(self._critics, fixed, (situation, action))

    @torch.no_grad()
    def follow(self, rate: float) -> None:
        """Move the slow copies of the critics so far towards them."""
        for slow, parameter in zip(self._slow.parameters(), self._critics.parameters(), strict=True):
            slow.lerp_(parameter, rate)

    def remember(self, rollout: Rollout, rewards: Sequence[Sequence[float]], prior: bool = False) -> None:
        """See :meth:`mmrl.policy.TransitionsPolicy.remember`."""
        self._replay["prior" if prior else "own"].add(self.transitions(rollout, rewards))

    def recall(self, count: int, prior_share: float, generator: torch.Generator) -> Transitions:
        """See :meth:`mmrl.policy.TransitionsPolicy.recall`."""
        own, prior = self._replay["own"], self._replay["prior"]
        shown = int(count * prior_share) if len(prior) else 0
        parts = [(own, count - shown), (prior, shown)]
        found = [ring.draw(size, generator) for ring, size in parts if size]
        return Transitions.cat(found).to(self.device)

    @torch.no_grad()
    def transitions(self, rollout: Rollout, rewards: Sequence[Sequence[float]]) -> Transitions:
        """The turns of a rollout, episode after episode."""
        trace: Trace = rollout.trace
        turns = trace.turns[trace.places()[0]]
        last = trace.count.cumsum(0) - 1
        situation = turns.record["situation"].cpu()
        after = situation.roll(-1, 0)
        after[last] = self._final_situation(rollout, turns.record["starts"][last])
        terminated = torch.zeros(len(turns))
        terminated[last] = (~rollout.samples.truncated).float()
        reward = torch.tensor([earned for turns in rewards for earned in turns])
        return Transitions(situation, after, turns.record["u"].tanh().cpu(), reward, terminated)

    def _final_situation(self, rollout: Rollout, starts: Tensor) -> Tensor:
        """Where episodes ended ``[N, S]``; what the base proposes there starts from the noise of their last turn."""
        states = torch.stack([episode.states[-1] for episode in rollout.samples.episodes])
        observation = self._normalised(Observation(state=states, instruction=[p.text for p in rollout.samples.prompts]))
        context = self._context(observation)
        chunk = self.head.propose(context, padded(starts).to(self.device))
        return self.head.situation(context, chunk)[: len(states)].cpu()
