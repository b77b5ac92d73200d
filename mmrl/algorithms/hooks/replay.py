"""Selective sample replay (VL-Rethinker, arXiv 2504.08837)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from pydantic import Field

from mmrl import distributed
from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import Experience, reference_logp, with_groups
from mmrl.errors import UserError
from mmrl.seeding import generator
from mmrl.types import Rollout


@dataclass(frozen=True)
class Replay:
    """Samples that taught something are kept and take the place of samples that teach nothing.

    A kept sample is drawn with a chance that grows with the size of its advantage, ``|A| ** exponent``, and is learnt
    from again with the advantage it had; its ratio is against the policy that sampled it.

    Attributes:
        capacity: samples kept, over all processes; the oldest go.
        exponent: see above; 0 draws all alike.
        share: of the samples without advantage that are replaced at most.
    """

    capacity: Annotated[int, Field(ge=1)] = 512
    exponent: Annotated[float, Field(ge=0)] = 1.0
    share: Annotated[float, Field(gt=0, le=1)] = 1.0

    verbs = frozenset({"given"})


class ReplayBuffer:
    """The samples kept, as token ids and numbers, so that a checkpoint holds them exactly."""

    def __init__(self, options: Replay):
        self.options = options
        self.entries: list[dict[str, Any]] = []

    def state(self) -> list[dict[str, Any]]:
        return self.entries

    def load_state(self, state: list[dict[str, Any]]) -> None:
        self.entries = list(state)

    def __call__(self, context: Context, experience: Experience, given: torch.Tensor, step: int) -> Experience:
        """The experience with rows of no advantage replaced; its own rows are then kept, except ``given`` ones."""
        silent = (experience.advantage == 0).all(1)
        fresh = self._entries(context, experience, ~silent & ~given)
        places = silent.nonzero().flatten()
        count = min(int(len(places) * self.options.share), len(self.entries))
        context.tally.mean("replay/share", torch.tensor(count / len(experience)))
        if count:
            experience = self._with_rows(context, experience, places[:count], self._draw(context, count, step))
        # Every process keeps the same entries, in the same order.
        self.entries += [entry for part in distributed.gather_values(fresh) for entry in part]
        self.entries = self.entries[-self.options.capacity :]
        return experience

    def _entries(self, context: Context, experience: Experience, chosen: torch.Tensor) -> list[dict[str, Any]]:
        rollout = experience.rollout
        if not chosen.any():
            return []
        kept: Rollout = rollout[chosen]
        truncated = kept.samples.truncated
        out = []
        for row, tokens in enumerate(context.policy.completions(kept)):
            length = len(tokens)
            own = experience.advantage[chosen][row, :length]
            out.append(
                {
                    "prompt": kept.samples.prompts[row].id,
                    "tokens": tokens,
                    "logp": kept.logp[row, :length].tolist(),
                    "advantage": float(own[own != 0][0]),
                    "truncated": bool(truncated[row]) if truncated is not None else False,
                }
            )
        return out

    def _draw(self, context: Context, count: int, step: int) -> list[dict[str, Any]]:
        weights = torch.tensor([abs(entry["advantage"]) for entry in self.entries]).double() ** self.options.exponent
        draw = generator(context.seed, "replay", step, distributed.rank())
        return [self.entries[i] for i in torch.multinomial(weights, count, generator=draw).tolist()]

    def _with_rows(
        self, context: Context, experience: Experience, places: torch.Tensor, drawn: list[dict[str, Any]]
    ) -> Experience:
        known: Mapping[str, Any] = {prompt.id: prompt for prompt in context.prompts.prompts}
        lost = next((entry["prompt"] for entry in drawn if entry["prompt"] not in known), None)
        if lost is not None:
            raise UserError(f"the replay buffer holds row '{lost}', which the data no longer have")
        prompts, tokens = [known[entry["prompt"]] for entry in drawn], [entry["tokens"] for entry in drawn]
        rollout = context.policy.given(prompts, tokens, score=False)
        logp = torch.zeros(rollout.mask.shape)
        for row, entry in enumerate(drawn):
            logp[row, : len(entry["logp"])] = torch.tensor(entry["logp"])
        samples = replace(rollout.samples, truncated=torch.tensor([entry["truncated"] for entry in drawn]))
        rollout = replace(rollout, logp=logp.to(rollout.logp.device), samples=samples)
        rollout = with_groups(rollout, experience.rollout.group[places])
        mask = rollout.mask.cpu()
        advantage = torch.tensor([entry["advantage"] for entry in drawn])[:, None] * mask
        old = Experience(
            rollout,
            advantage,
            mask,
            factor=None if experience.factor is None else mask.float(),
            reference_logp=None if experience.reference_logp is None else reference_logp(context, rollout),
        )
        joined = Experience.cat([experience, old])
        order = torch.arange(len(experience))
        order[places] = len(experience) + torch.arange(len(places))
        return joined[order]
