"""SOAR: learn to come back from where the model's own steps lead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.algorithms.base import Context
from mmrl.algorithms.supervised import MicroBatch, Supervised
from mmrl.errors import UserError
from mmrl.seeding import generator
from mmrl.types import Denoising, Samples


class SelfCorrection(Supervised):
    """SOAR (arXiv 2604.12617): supervised training of a flow that also sees states off the straight path.

    From a noised target one step of the model's own leads to a state that it would meet when sampling; noised again
    towards the same noise, that state gives ``points`` more to predict at, with the velocity that leads from there to
    the target. Sampling steps are taken without guidance. A micro-batch keeps ``points + 1`` predictions in memory.

    Args:
        noise_draws: noise and timestep draws per row and step.
        points: states off the path per draw.
        weight: of one of them, where the draw itself weighs 1.
        num_steps: of the sampler whose step is taken.
    """

    verbs = frozenset({"denoise"})

    def __init__(
        self,
        noise_draws: Annotated[int, Field(ge=1)] = 1,
        points: Annotated[int, Field(ge=1)] = 6,
        weight: Annotated[float, Field(gt=0)] = 1.0,
        num_steps: Annotated[int, Field(ge=1)] = 40,
    ):
        super().__init__(noise_draws)
        self.points = points
        self.weight = weight
        self.num_steps = num_steps

    @property
    def fits_per_sample(self) -> int:
        """Predictions that a row costs in a step."""
        return self.noise_draws * (self.points + 1)

    def loss(self, context: Context, micro_batch: MicroBatch) -> Tensor:
        samples, seeds = Samples(prompts=micro_batch.prompts), micro_batch.seeds
        at = context.policy.denoise(samples, seeds)
        total = at.mean(at.error)
        context.tally.mean("fit", total)
        for point in range(self.points):
            off = context.policy.denoise(samples, seeds, at=off_path(at, seeds, point, self.num_steps))
            error = off.mean(off.error)
            context.tally.mean("fit/off_path", error)
            total = total + self.weight * error
        loss = total / (1 + self.weight * self.points)
        context.tally.mean("loss", loss)
        return loss.sum() / (micro_batch.rows_in_update * self.noise_draws)


@torch.no_grad()
def off_path(at: Denoising, seeds: Sequence[int], point: int, num_steps: int) -> Denoising:
    """States after one step of ``1 / num_steps`` from those of ``at``, noised again, with the way back as target.

    Noise levels are uniform between where the step ended (at least ``1 / num_steps``) and 1.

    Raises:
        UserError: the model is no flow.
    """
    if not torch.equal(at.x0_scale, at.time):
        raise UserError("algorithm soar needs a flow-matching model: it follows the straight path from noise to target")
    owners = range(len(at.time)) if at.row is None else at.row.tolist()
    draws = [torch.rand(1, generator=generator(seeds[owner], "off", point, k)) for k, owner in enumerate(owners)]
    u = torch.cat(draws).to(at.time)

    def scaled(values: Tensor) -> Tensor:
        return values.view(-1, *[1] * (at.x.ndim - 1))

    reached = (at.time - 1 / num_steps).clamp(min=0)
    x = at.x - scaled(at.time - reached) * at.prediction
    noise, clean = at.x + scaled(1 - at.time) * at.target, at.x - scaled(at.time) * at.target
    low = reached.clamp(min=1 / num_steps)
    time = low + (1 - low) * u
    share = scaled((time - reached) / (1 - reached))
    x = (1 - share) * x + share * noise
    return replace(at, x=x, time=time, x0_scale=time, target=(x - clean) / scaled(time), prediction=None)
