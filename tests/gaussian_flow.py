"""A whole flow policy whose every distribution is a Gaussian known in closed form: one number a sample, two parameters.

Outputs are N(mean, exp(log_std)^2). The velocity is the exact one of that distribution on the straight path to standard
normal noise, so the flow's ODE leads from noise e to ``mean + std e`` without discretisation error. The noises of a
group are stratified, one from each of equally likely intervals, so that few samples show what many would.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from training import training_step

from mmrl.algorithms.base import Context
from mmrl.data import PromptSampler
from mmrl.policy import Parameters
from mmrl.scoring import Scorer
from mmrl.seeding import derive_seed, generator, prompt_keys
from mmrl.tally import Clock, Tally
from mmrl.types import Decisions, Denoising, Prompt, Rollout, Rows, Samples

HERE = Path(__file__).resolve()


@dataclass(eq=False)
class Trace(Rows):
    x0: torch.Tensor


class GaussianFlow:
    """``fit_kind`` says what ``fit`` is: the denoising error of the flow, or the exact negative log-likelihood."""

    verbs = frozenset({"rollout", "decisions", "fit", "denoise", "generate"})
    load = staticmethod(lambda model=None: None)

    def __init__(self, net: object = None, mean: float = 0.0, std: float = 1.0, fit_kind: str = "error"):
        self.mean = nn.Parameter(torch.tensor([mean]))
        self.log_std = nn.Parameter(torch.tensor([std]).log())
        self.parameters = Parameters({"mean": self.mean, "log_std": self.log_std})
        self.counters = Counter()
        self.batch_size = 4096
        self.fit_kind = fit_kind
        self.has_frozen_base = self.keep_mean = False

    def to(self, device):
        return self

    @property
    def std(self) -> torch.Tensor:
        return self.log_std.exp()

    def log_prob(self, x0):
        return torch.distributions.Normal(self.mean, self.std).log_prob(x0).squeeze(1)

    def velocity(self, x, time):
        """``E[e - x0 | x_t = x]`` for ``x [N, 1]`` and ``time [N, 1]``."""
        self.counters["forwards"] += 1
        self.counters["rows"] += len(x)
        variance = (1 - time) ** 2 * self.std**2 + time**2
        residual = (x - (1 - time) * self.mean) / variance
        return time * residual - (self.mean + (1 - time) * self.std**2 * residual)

    def _outputs(self, prompts, group, seeds):
        u = torch.cat([torch.rand(1, generator=generator(seed), dtype=torch.float64) for seed in seeds])
        size = len(seeds) // (int(group.max()) + 1)
        share = (torch.arange(len(seeds)) % size + u) / size
        noise = torch.special.ndtri(share.clamp(1e-9, 1 - 1e-9)).float()[:, None]
        x0 = (self.mean + self.std * noise).detach()
        samples = Samples(list(prompts), images=x0[:, :, None, None], group=group)
        with torch.no_grad():
            logp = self.log_prob(x0)[:, None]
        return Rollout(samples, logp, torch.ones_like(logp, dtype=torch.bool), group, Trace(x0))

    def rollout(self, prompts, group_size, seed, step=0):
        seeds = [derive_seed(seed, *key, k) for key in prompt_keys(prompts) for k in range(group_size)]
        rows = [prompt for prompt in prompts for _ in range(group_size)]
        return self._outputs(rows, torch.arange(len(prompts)).repeat_interleave(group_size), seeds)

    def decisions(self, rollout, steps=None):
        return Decisions(self.log_prob(rollout.trace.x0)[:, None])

    def decision_chunks(self, rollout):
        return [[0]]

    def denoise(self, samples, seeds, at=None):
        if at is None:
            x0 = self._clean(samples)
            draws = [generator(seed, "noise") for seed in seeds]
            time = torch.cat([1 - torch.rand(1, generator=g) for g in draws])
            noise = torch.stack([torch.randn(1, generator=g) for g in draws])
            x = (1 - time[:, None]) * x0 + time[:, None] * noise
            at = Denoising(noise - x0, x, time, time)
        return replace(at, prediction=self.velocity(at.x, at.time[:, None]))

    def _clean(self, samples):
        if isinstance(samples, Rollout):
            return samples.trace.x0
        return torch.tensor([[float(prompt.target)] for prompt in samples.prompts])

    def fit(self, samples, seeds):
        return self.denoise(samples, seeds).error if self.fit_kind == "error" else -self.log_prob(self._clean(samples))

    def generate(self, prompts, seeds, grad_steps=0):
        return self._outputs(prompts, torch.arange(len(prompts)), seeds).samples

    def reference(self):
        return self.parameters.swapped("reference")

    def export(self, folder: Path):
        Path(folder).mkdir(parents=True, exist_ok=True)


def value(samples: Samples):
    """The number itself, as reward."""
    return samples.images[:, 0, 0, 0]


def context(policy: GaussianFlow, prompts: int = 4, reward=value, micro_batch_size: int = 4096) -> Context:
    """What the trainer would lend an algorithm."""
    rows = [Prompt(f"p{k}", id=f"p{k}") for k in range(prompts)]
    sampler = PromptSampler(rows, prompts, shuffle=False)
    policy.parameters.take_snapshot("reference")
    return Context(policy, Scorer([reward]), 7, micro_batch_size, Clock(), Tally(), sampler)


def gradients(algorithm, lent: Context, step: int = 0) -> torch.Tensor:
    """The first update's gradient by mean and log_std."""
    with torch.no_grad():
        experience = algorithm.collect(lent, lent.prompts.batch(step), step)
    update = next(iter(algorithm.updates(lent, experience, step)))
    for micro_batch in update.micro_batches:
        algorithm.loss(lent, micro_batch).backward()
    found = [torch.zeros(1) if p.grad is None else p.grad.clone() for p in lent.policy.parameters]
    for parameter in lent.policy.parameters:
        parameter.grad = None
    return torch.cat(found)


def train(algorithm, lent: Context, steps: int, lr: float) -> torch.Tensor:
    """Mean and std after some steps of Adam with a falling rate, averaged over the last third."""
    optimizer = torch.optim.Adam(list(lent.policy.parameters), lr=lr)
    kept = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        training_step(algorithm, lent, optimizer, step)
        if step >= steps * 2 // 3:
            kept.append(torch.cat([lent.policy.mean, lent.policy.std]).detach())
    return torch.stack(kept).mean(0)
