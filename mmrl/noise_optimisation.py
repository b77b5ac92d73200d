"""ReNO (arXiv 2406.04312): at sampling time, move the start noise up the gradient of a reward; no weight changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.policy import ChainPolicy
from mmrl.scoring import Scorer
from mmrl.types import Chain, Prompt, Samples


@dataclass(eq=False)
class OptimisedNoise:
    """The best of each row's path.

    Attributes:
        samples: N outputs.
        noise: ``[N, ...]``, what they start from.
        totals: ``[iterations, N]`` rewards on the way; the first are those of the noise that was drawn.
    """

    samples: Samples
    noise: Tensor
    totals: Tensor


def optimise_noise(
    policy: ChainPolicy,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    iterations: int = 50,
    lr: float = 5.0,
    norm_coef: float = 0.01,
    max_grad_norm: float = 0.1,
) -> OptimisedNoise:
    """Outputs of the training sampler from noise that was optimised for the reward, row by row.

    The defaults are the released ones, made for a sampler of one to four steps; a sampler of many should run with
    ``gradient_checkpointing: step``.

    Args:
        policy: as built, or trained.
        scorer: its rewards must be differentiable.
        seeds: of the noise that each row begins with.
        iterations: outputs that are looked at, the first included.
        lr: of gradient descent with Nesterov momentum 0.9.
        norm_coef: weight of minus the log-density of the noise's norm, ``norm^2 / 2 - (d - 1) log norm`` with d its
            number of elements, which keeps the noise a likely one.
        max_grad_norm: longest gradient of a row.

    Raises:
        UserError: a reward is not differentiable.
    """
    chain = Chain(0, policy.num_steps, policy.num_steps)
    noise = policy.start(prompts, seeds).requires_grad_()
    optimizer = torch.optim.SGD([noise], lr=lr, momentum=0.9, nesterov=True)
    best: OptimisedNoise | None = None
    totals: list[Tensor] = []
    with _frozen(policy), torch.enable_grad():
        for _ in range(iterations):
            made = policy.chain(prompts, seeds, chain, noise)
            total = scorer(made.samples, grad=True).total
            norm = noise.flatten(1).norm(dim=1)
            unlikely = norm.square() / 2 - (noise[0].numel() - 1) * norm.log()
            (noise.grad,) = torch.autograd.grad((norm_coef * unlikely - total).sum(), noise)
            totals.append(total.detach())
            best = _better(best, made.samples.detached(), noise.detach().clone(), torch.stack(totals))
            long = noise.grad.flatten(1).norm(dim=1) / max_grad_norm
            noise.grad /= long.clamp(min=1).view(-1, *[1] * (noise.ndim - 1))
            optimizer.step()
    assert best is not None, "iterations is at least 1"
    return best


def _better(best: OptimisedNoise | None, samples: Samples, noise: Tensor, totals: Tensor) -> OptimisedNoise:
    """Row by row what has the highest reward so far."""
    if best is None:
        return OptimisedNoise(samples, noise, totals)
    count = len(samples)
    new = (totals[-1] > totals[:-1].max(0).values).cpu()
    rows = torch.arange(count) + count * new.long()
    both = torch.cat([best.noise, noise])
    return OptimisedNoise(Samples.cat([best.samples, samples])[rows], both[rows.to(both.device)], totals)


@contextlib.contextmanager
def _frozen(policy: ChainPolicy) -> Iterator[None]:
    """Inside, no parameter asks for a gradient."""
    for parameter in policy.parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in policy.parameters:
            parameter.requires_grad_(True)
