"""From scores to the advantage of each decision."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mmrl import distributed
from mmrl.advantages import (
    AdvantageMethod,
    decoupled_advantages,
    discounted_returns,
    extremes,
    generalized_advantages,
    group_advantages,
    last_decision_rewards,
    soft_advantages,
    whiten,
)
from mmrl.algorithms.denoising_credit import branch_advantages, column_advantages, reward_gains
from mmrl.algorithms.turns import Turns, turn_rewards
from mmrl.errors import UserError
from mmrl.scoring import Scores
from mmrl.types import Rollout

CreditMethod = Literal[AdvantageMethod, "gdpo", "decoupled", "remax", "returns", "gae", "gain", "tree"]
# These compare the samples of a group, so a group of one has nothing to learn from.
GROUP_BASELINES = frozenset(
    {"group", "mean", "batch", "rloo", "gdpo", "decoupled", "opo", "gpg", "pass_at_k", "gain", "tree"}
)
PER_DECISION = frozenset({"returns", "gae"})
# These compare decisions with the same one of other samples.
PER_COLUMN = frozenset({"gain", "tree"})


@dataclass(frozen=True)
class Credit:
    """How scores are shared out; see :class:`mmrl.algorithms.policy_gradient.PolicyGradient` for the options."""

    method: CreditMethod
    clip: float | None
    whiten: bool
    gamma: float
    lam: float
    soft: tuple[float, float]
    scale: tuple[float, float]
    extremes: int | None = None
    process: float = 0.0

    def __call__(
        self,
        scores: Scores,
        rollout: Rollout,
        mask: Tensor,
        penalty: Tensor | None = None,
        baseline: Tensor | None = None,
        turns: Sequence[Sequence[float]] | None = None,
        before: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages ``[N, T]`` on the CPU, 0 where masked, and the returns that a value head should predict.

        Args:
            scores: of all rewards.
            mask: bool ``[N, T]``, the decisions that count.
            penalty: ``[N, T]`` subtracted from the reward of each decision.
            baseline: ``[N]`` for ``remax``.
            turns: what each turn of a dialogue earned of its sample's total, for rewards per decision; the rest belongs
                to the last decision, like the whole total where this is None.
            before: ``[N, T]`` scores in prospect before each decision, for ``gain``.
        """
        mask = mask.cpu()
        returns = None
        if self.method in PER_DECISION:
            total = scores.total.detach().cpu().float()
            earned = torch.zeros(mask.shape) if turns is None else _earned(turns, rollout) * mask
            rewards = last_decision_rewards(total - earned.sum(1), mask) + earned
            if penalty is not None:
                rewards = rewards - penalty.cpu() * mask
            advantage, returns = self._per_decision(rewards, rollout, mask)
        elif self.method in PER_COLUMN:
            advantage = self._per_column(scores.total.detach().cpu().float(), rollout, mask, before)
        else:
            per_sample = self._per_sample(scores, rollout, mask, penalty, baseline)
            if self.soft != (0.0, 0.0):
                per_sample = soft_advantages(per_sample, *self.soft)
            advantage = per_sample.cpu()[:, None] * mask
        if self.process:
            earned = rollout.process.cpu()
            advantage = advantage + self.process * column_advantages(earned, rollout.group.cpu(), mask)
        if self.extremes is not None:
            kept = extremes(scores.total.detach().cpu(), rollout.group.cpu(), self.extremes)
            advantage = advantage * kept[:, None]
        if self.scale != (1.0, 1.0):
            advantage = torch.where(advantage > 0, self.scale[0], self.scale[1]) * advantage
        if self.whiten:
            advantage = whiten(advantage, mask, distributed.total)
        if self.clip is not None:
            advantage = advantage.clamp(-self.clip, self.clip)
        return advantage, returns

    def _per_decision(self, rewards: Tensor, rollout: Rollout, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Advantages and returns ``[N, T]``; where decisions belong to turns, those of their turn."""
        turns = None if rollout.turn is None else Turns(rollout.turn.cpu(), mask)
        where = mask if turns is None else turns.mask
        if turns is not None:
            rewards = turns.summed(rewards)
        final = None if rollout.final_value is None else rollout.final_value.cpu().float()
        if self.method == "gae":
            values = torch.where(mask, rollout.value.cpu().float(), 0.0)
            values = values if turns is None else turns.first(values)
            found = generalized_advantages(rewards, values, where, self.gamma, self.lam, final)
        else:
            found = discounted_returns(rewards, where, self.gamma, final), None
        return found if turns is None else tuple(None if x is None else turns.spread(x) for x in found)

    def _per_column(self, total: Tensor, rollout: Rollout, mask: Tensor, before: Tensor | None) -> Tensor:
        """Advantages ``[N, T]`` of decisions over the same one of the other samples of the group."""
        group = rollout.group.cpu()
        if self.method == "gain":
            return column_advantages(discounted_returns(reward_gains(before, total), mask, self.gamma), group, mask)
        if rollout.branch is None:
            raise UserError("advantage 'tree' needs samples that share decisions, as with pipeline.branching")
        return branch_advantages(total, group, rollout.branch.cpu(), mask)

    def _per_sample(
        self, scores: Scores, rollout: Rollout, mask: Tensor, penalty: Tensor | None, baseline: Tensor | None
    ) -> Tensor:
        """Advantages of this process's samples, from the scores of all processes."""
        group, total = rollout.group, scores.total
        if penalty is not None:
            total = total - (penalty * mask).sum(1).to(total)
        if self.method == "remax":
            return (total - baseline.to(total)).nan_to_num(nan=0.0)
        rank, groups, rows = distributed.rank(), int(group.max()) + 1, len(group)
        all_groups = distributed.gather_rows(group + rank * groups)
        if self.method in ("gdpo", "decoupled"):
            table = distributed.gather_rows(scores.values)
            batch_norm = self.method == "gdpo"
            out = decoupled_advantages(table, scores.weights, all_groups.to(table.device), batch_norm=batch_norm)
        else:
            table = distributed.gather_rows(total)
            lengths = distributed.gather_rows(rollout.mask.sum(1).to(table.device)) if self.method == "opo" else None
            out = group_advantages(table, all_groups.to(table.device), self.method, lengths=lengths)
        return out[rank * rows : (rank + 1) * rows]


def _earned(turns: Sequence[Sequence[float]], rollout: Rollout) -> Tensor:
    return turn_rewards(turns, rollout.mask.cpu(), None if rollout.turn is None else rollout.turn.cpu())
