"""Which prompts a step takes, from how they went before: variance-aware sampling, difficulty windows, curricula."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from mmrl import distributed
from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import Batch
from mmrl.scoring import LinearWeight, at_step
from mmrl.seeding import generator
from mmrl.types import Prompt


@dataclass(frozen=True)
class PromptChoice:
    """A share of each step's prompts is drawn by what is known of them; the others come in the usual order.

    Attributes:
        by: ``variance`` draws prompts whose scores vary (MMR1, arXiv 2509.21268): weight p (1 - p) for scores in
            [0, 1] and the variance for others, plus ``diversity`` times the share of distinct answers in the group;
            ``difficulty`` draws prompts whose mean score is near ``target``, which may move in the course of training.
        share: of a step's prompts that are drawn so.
        diversity: see above.
        target: mean score of the prompts wanted, a number or ``{start, end, steps}``; 1 is easy.
        width: how far from the target the weight falls to exp(-1/2).
        within: prompts whose mean score is known and outside of these bounds are not drawn.
        memory: share of what is known that stays when a prompt is seen again.
        unseen: weight of prompts not seen yet.
    """

    by: Literal["variance", "difficulty"] = "variance"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    diversity: Annotated[float, Field(ge=0)] = 0.0
    target: float | LinearWeight = 0.5
    width: Annotated[float, Field(gt=0)] = 0.25
    within: tuple[float, float] | None = None
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.5
    unseen: Annotated[float, Field(ge=0)] = 0.25


class PromptRecord:
    """What is known of each prompt: mean and variance of its scores and the share of distinct answers, by id."""

    def __init__(self, options: PromptChoice):
        self.options = options
        self.known: dict[str, list[float]] = {}

    def state(self) -> dict[str, list[float]]:
        return self.known

    def load_state(self, state: dict[str, list[float]]) -> None:
        self.known = {name: list(values) for name, values in state.items()}

    def choose(self, context: Context, prompts: Sequence[Prompt], step: int) -> list[Prompt]:
        """This process's prompts of the step; the drawn ones come first. The same record makes the same choice."""
        count = round(self.options.share * len(prompts))
        everything = context.prompts.prompts
        weights = torch.tensor([self.weight(prompt.id, step) for prompt in everything]).double()
        world, rank = distributed.world_size(), distributed.rank()
        count = min(count, int((weights > 0).sum()) // world)
        if count == 0:
            return list(prompts)
        drawn = torch.multinomial(weights, count * world, generator=generator(context.seed, "prompt choice", step))
        own = [everything[i] for i in drawn[rank * count : (rank + 1) * count].tolist()]
        names = {prompt.id for prompt in own}
        # A prompt that was drawn need not come a second time while there are others.
        rest = [prompt for prompt in prompts if prompt.id not in names] + [p for p in prompts if p.id in names]
        return own + rest[: len(prompts) - count]

    def weight(self, name: str, step: int) -> float:
        """Of one prompt in the draw."""
        options = self.options
        if name not in self.known:
            return options.unseen
        mean, variance, distinct = self.known[name]
        if options.within is not None and not options.within[0] <= mean <= options.within[1]:
            return 0.0
        if options.by == "variance":
            return variance + options.diversity * distinct
        target = at_step(options.target, step)
        return math.exp(-(((mean - target) / options.width) ** 2) / 2)

    def observe(self, batch: Batch) -> None:
        """Remember how a batch's prompts went, in all processes alike."""
        found: list[tuple[str, list[float]]] = []
        for number in range(batch.groups):
            rows = batch.rows_of(number)
            scores = batch.scores.total[rows]
            scores = scores[~scores.isnan()].double()
            if len(scores):
                texts = batch.rollout.samples.texts
                distinct = len({texts[row] for row in rows}) / len(rows) if texts is not None else 0.0
                values = [scores.mean().item(), scores.var(correction=0).item(), distinct]
                found.append((batch.rollout.samples.prompts[rows[0]].id, values))
        for part in distributed.gather_values(found):
            for name, values in part:
                old = self.known.get(name, values)
                keep = self.options.memory
                self.known[name] = [keep * a + (1 - keep) * b for a, b in zip(old, values, strict=True)]
