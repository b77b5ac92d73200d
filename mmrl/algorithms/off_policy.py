"""Soft actor-critic on replayed transitions, many updates for each episode (SAC, RLPD)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl import distributed
from mmrl.algorithms.base import Context, Update
from mmrl.algorithms.collecting import roll_out, row_chunks, score
from mmrl.algorithms.turns import turns_of
from mmrl.errors import UserError
from mmrl.scoring import Scores
from mmrl.seeding import generator
from mmrl.transitions import Transitions
from mmrl.types import Prompt, Rollout

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


@dataclass
class MicroBatch:
    """Transitions and standard normal numbers ``[n, A]`` for actions; ``rows`` divides the loss.

    ``critics`` holds the numbers of the critics that judge; None makes it one of an update of the actor.
    """

    transitions: Transitions
    normals: Tensor
    rows: int
    critics: Tensor | None


class OffPolicy:
    """Soft actor-critic (arXiv 1801.01290) with an ensemble of critics and half-and-half data (RLPD, 2302.02948).

    A step rolls out one episode from each of its prompts and puts their turns into the policy's replay buffer, then
    takes ``updates_per_step`` updates of the critics on transitions drawn from it; after every ``actor_every`` of them
    one of the actor and of the temperature. A transition is a turn; a time limit does not end what can be earned.

    Args:
        updates_per_step: updates of the critics.
        actor_every: updates of the critics for one of the actor.
        draws: transitions of an update.
        discount: of a turn.
        prior_steps: the first steps only collect. Their episodes that score above their mean are prior data as well.
        critic_steps: in so many steps after these only the critics learn, so that the actor can trust them.
        prior_share: of each update's transitions are prior data, where there are any.
        target_rate: share of the way to the critics that their slow copies move after each update.
        judges: critics that are drawn anew for each update; the least of what their slow copies say is believed.
        entropy: of the actor in nats per number of an action, that the temperature is moved to hold. Uniform actions
            in [-1, 1] have 0.69.
        entropy_in_target: the critics count the entropy to come as reward; off as RLPD has it for sparse rewards.
    """

    verbs = frozenset({"rollout", "transitions"})
    needs_reference = False
    needs_gradient_of_reward = False
    needs_rewards = True
    group_size = 1

    def __init__(
        self,
        updates_per_step: Count = 64,
        actor_every: Count = 2,
        draws: Count = 256,
        discount: Share = 0.99,
        prior_steps: Annotated[int, Field(ge=0)] = 4,
        critic_steps: Annotated[int, Field(ge=0)] = 4,
        prior_share: Share = 0.5,
        target_rate: Annotated[float, Field(gt=0, le=1)] = 0.005,
        judges: Count = 2,
        entropy: float = -0.5,
        entropy_in_target: bool = False,
    ):
        self.updates_per_step = updates_per_step
        self.actor_every = actor_every
        self.draws = draws
        self.discount = discount
        self.prior_steps = prior_steps
        self.critic_steps = critic_steps
        self.prior_share = prior_share
        self.target_rate = target_rate
        self.judges = judges
        self.entropy = entropy
        self.entropy_in_target = entropy_in_target

    @property
    def optimiser_steps(self) -> int:
        """Of critics and actor, in a training step."""
        return self.updates_per_step + self.updates_per_step // self.actor_every

    def collect(self, context: Context, prompts: Sequence[Prompt], step: int) -> None:
        """Episodes go into the replay buffer; nothing else is handed on."""
        if distributed.world_size() > 1:
            raise UserError("residual_rl keeps one replay buffer: train it in one process")
        rollout = roll_out(context, prompts, 1, step)
        scores = score(context, rollout, step)
        rewards = turn_rewards(context, rollout, scores, step)
        context.policy.remember(rollout, rewards)
        if step < self.prior_steps:
            good = (scores.total > scores.total.nanmean()).nonzero().flatten().tolist()
            if good:
                context.policy.remember(rollout[good], [rewards[row] for row in good], prior=True)

    def updates(self, context: Context, experience: None, step: int) -> Iterator[Update]:
        if step < self.prior_steps:
            return
        for k in range(self.updates_per_step):
            judges = torch.randperm(context.policy.num_critics, generator=generator(context.seed, "judges", step, k))
            yield self._update(context, step, k, judges[: self.judges])
            context.policy.follow(self.target_rate)
            if step >= self.prior_steps + self.critic_steps and (k + 1) % self.actor_every == 0:
                yield self._update(context, step, k, None)

    def _update(self, context: Context, step: int, k: int, critics: Tensor | None) -> Update:
        draw = generator(context.seed, "replay", step, k, "actor" if critics is None else "critics")
        transitions = context.policy.recall(self.draws, self.prior_share, draw)
        normals = torch.randn(transitions.action.shape, generator=draw).to(transitions.action.device)
        chunks = row_chunks(self.draws, context.micro_batch_size)
        return Update(
            self.draws, [MicroBatch(transitions[rows], normals[rows], self.draws, critics) for rows in chunks]
        )

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        loss = self._actor_loss if micro_batch.critics is None else self._critic_loss
        return loss(context, micro_batch).sum() / micro_batch.rows

    def target(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        """What the critics should say ``[n]``: the reward, and unless it ended what the judges expect from there."""
        policy, transitions = context.policy, micro_batch.transitions
        with torch.no_grad():
            action, logp = policy.act(transitions.after, micro_batch.normals)
            value = policy.critics(transitions.after, action, "slow")[micro_batch.critics].amin(0)
            if self.entropy_in_target:
                value = value - policy.log_temperature.exp() * logp
            return transitions.reward + self.discount * (1 - transitions.terminated) * value

    def _critic_loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        target, transitions = self.target(context, micro_batch), micro_batch.transitions
        value = context.policy.critics(transitions.situation, transitions.action, "trained")
        error = (value - target).square().mean(0)
        context.tally.mean("critic/loss", error)
        context.tally.mean("critic/value", value)
        return error

    def _actor_loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        policy, situation = context.policy, micro_batch.transitions.situation
        action, logp = policy.act(situation, micro_batch.normals)
        value = policy.critics(situation, action, "fixed").mean(0)
        temperature = policy.log_temperature.exp()
        surplus = -logp.detach() - self.entropy * action.shape[1]
        context.tally.mean("actor/entropy", -logp / action.shape[1])
        context.tally.mean("actor/size", action.abs())
        context.tally.mean("actor/value", value)
        context.tally.mean("temperature", temperature)
        return temperature.detach() * logp - value + temperature * surplus


def turn_rewards(context: Context, rollout: Rollout, scores: Scores, step: int) -> list[list[float]]:
    """What each turn of each sample earned; its last turn gets what no reward gives to a turn."""
    earned = context.scorer.turns(rollout.samples, step)
    if earned is None:
        earned = [[0.0] * count for count in turns_of(rollout, rollout.mask.cpu()).mask.sum(1).tolist()]
    totals = scores.total.nan_to_num(0.0).tolist()
    return [[*turns[:-1], total - sum(turns[:-1])] for turns, total in zip(earned, totals, strict=True)]
