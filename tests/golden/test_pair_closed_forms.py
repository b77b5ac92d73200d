"""Diffusion-DPO on a linear-Gaussian model, where its margin has a closed form."""

import contextlib

import pytest
import torch
from table_policy import TablePolicy, table_context
from torch import nn

from mmrl import Prompt
from mmrl.algorithms.pairs import Pairs
from mmrl.algorithms.preference import PreferenceOptimisation
from mmrl.policy import Parameters
from mmrl.types import Samples
from pipelines.noising import noised_again
from pipelines.scheduler_seam import FlowGrid

MEAN, VARIANCE, BETA = 0.3, 0.49, 1.7


class LinearGaussian:
    """The exact velocity of a flow from N(0, 1) to N(MEAN, VARIANCE), moved by a trainable ``shift``.

    With x = (1 - t) x0 + t e it is ``E[e - x0 | x] = slope(t) (x - (1 - t) MEAN) - MEAN``.
    """

    verbs = frozenset({"fit", "denoise", "means"})
    fit_reduction = "mean"

    def __init__(self, shift):
        self.shift = nn.Parameter(torch.tensor(shift))
        self.parameters = Parameters({"shift": self.shift})
        self.parameters.snapshots["reference"] = {"shift": torch.tensor(0.0)}
        self.times = []

    def fit(self, samples, seeds):
        x0 = samples.images
        at = noised_again(FlowGrid((1.0, 0.0), torch.tensor([1000.0]), 1.0, 1000), x0, seeds, "logit_normal")
        self.times.append(at.time)
        t = at.time.view(-1, 1, 1, 1)
        velocity = slope(t) * (at.x - (1 - t) * MEAN) - MEAN + self.shift
        return (velocity - at.target).square().flatten(1).mean(1)

    @contextlib.contextmanager
    def reference(self):
        with self.parameters.swapped("reference"):
            yield


def slope(t):
    return (t - (1 - t) * VARIANCE) / ((1 - t) ** 2 * VARIANCE + t**2)


def test_diffusion_dpo_has_the_closed_form_of_a_linear_gaussian_model():
    """The noise cancels, as it is the same for all four: z = -2 beta shift ((1 - t) slope(t) + 1) (w - l)."""
    draw = torch.Generator().manual_seed(1)
    won, lost = (MEAN + VARIANCE**0.5 * torch.randn(64, 1, 2, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    policy = LinearGaussian(0.4)
    context = table_context(TablePolicy())
    context.policy = policy
    prompts = [Prompt("x", id=str(k)) for k in range(64)]
    pairs = Pairs(Samples(prompts, images=won), Samples(prompts, images=lost), list(range(64)))
    algorithm = PreferenceOptimisation(source="offline", beta=BETA)
    (update,) = algorithm.updates(context, pairs, 3)
    loss = sum(algorithm.loss(context, part) for part in update.micro_batches)
    loss.backward()

    times = torch.cat([policy.times[k][: len(policy.times[k]) // 2] for k in range(0, len(policy.times), 2)])
    for first, second in zip(policy.times[::2], policy.times[1::2], strict=True):
        assert torch.equal(first, second)  # policy and reference
        assert torch.equal(*first.chunk(2))  # winner and loser
    assert len(times.unique()) == 64
    times = times.double()
    gap = (won - lost).flatten(1).mean(1)
    rate = -2 * BETA * ((1 - times) * slope(times) + 1) * gap
    assert loss.item() == pytest.approx(-(0.4 * rate).sigmoid().log().mean().item(), rel=1e-5)
    slope_of_loss = -((-0.4 * rate).sigmoid() * rate).mean()
    assert policy.shift.grad.item() == pytest.approx(slope_of_loss.item(), rel=1e-4)
