"""A plain Flow-GRPO training loop, in the manner of flow_grpo, to compare with.

It does what a straightforward script does: encode the text of every copy of a prompt in every step, sample, decode,
score, compute the old log-probs in a pass of their own (as UniRL's recipes do; flow_grpo itself keeps those of the
rollout, which ``recompute_old=False`` gives), and for the KL run the reference, adapters off, through the whole
log-prob of a scheduler step. Maths, batch sizes and numbers of decisions are those of mmrl's step: Flow-SDE, CFG as one
batch of 2B, every step but the last trained, log-probs as means over elements, advantages by group mean and std, exact
KL, one optimiser step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Phase = Callable[[str], contextlib.AbstractContextManager]


@dataclass
class Batch:
    """B sampled rows: T + 1 states, T - 1 log-probs ``[B]``, embeddings of 2B rows with the negative prompt first."""

    states: list[Tensor]
    logp: list[Tensor]
    embeds: Tensor
    pooled: Tensor
    images: Tensor


class PlainLoop:
    """Args: see :mod:`image_step`; ``phase(name)`` is entered around what the comparison names."""

    def __init__(
        self,
        pipe: Any,
        optimizer: torch.optim.Optimizer,
        reward: Callable[[Tensor], Tensor],
        phase: Phase,
        *,
        num_steps: int,
        noise_level: float,
        guidance: float,
        side: int,
        batch_size: int,
        group_size: int,
        clip_range: float,
        kl_coef: float,
        max_sequence_length: int,
        recompute_old: bool = True,
    ):
        self.pipe, self.optimizer, self.reward, self.phase = pipe, optimizer, reward, phase
        self.noise_level, self.guidance, self.side = noise_level, guidance, side
        self.batch_size, self.group_size = batch_size, group_size
        self.clip_range, self.kl_coef, self.recompute_old = clip_range, kl_coef, recompute_old
        self.max_sequence_length = max_sequence_length
        pipe.scheduler.set_timesteps(num_steps)
        self.sigmas, self.timesteps = pipe.scheduler.sigmas.tolist(), pipe.scheduler.timesteps
        # Once for the whole run, as flow_grpo does.
        with torch.no_grad():
            self.negative = self._encode([""])

    def step(self, prompts: Sequence[str], seed: int) -> None:
        """One training step on ``len(prompts) * group_size`` samples."""
        torch.manual_seed(seed)
        copies = [prompt for prompt in prompts for _ in range(self.group_size)]
        with torch.no_grad():
            rows = range(0, len(copies), self.batch_size)
            batches = [self._sample(copies[i : i + self.batch_size]) for i in rows]
            scores = torch.cat([self.reward(batch.images) for batch in batches]).view(-1, self.group_size)
            advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-4)
            old = [self._old_logp(batch) if self.recompute_old else batch.logp for batch in batches]
        decisions = len(self.timesteps) - 1
        for number, (batch, advantage) in enumerate(
            zip(batches, advantages.clamp(-5, 5).flatten().split(self.batch_size), strict=True)
        ):
            for i in range(decisions):
                logp, mean, std = self._replay(batch, i)
                with torch.no_grad(), self.phase("reference"):
                    self.pipe.transformer.disable_adapters()
                    _, mean_ref, _ = self._replay(batch, i)
                    self.pipe.transformer.enable_adapters()
                ratio = torch.exp(logp - old[number][i])
                clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped).sum()
                kl = ((mean - mean_ref) ** 2).mean(dim=(1, 2, 3)) / (2 * std**2)
                loss = (loss + self.kl_coef * kl.sum()) / (len(copies) * decisions)
                loss.backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        return embeds, pooled

    def _sample(self, prompts: list[str]) -> Batch:
        pipe, count = self.pipe, len(prompts)
        embeds, pooled = self._encode(prompts)
        embeds = torch.cat([self.negative[0].expand(count, -1, -1), embeds])
        pooled = torch.cat([self.negative[1].expand(count, -1), pooled])
        x = torch.randn(count, pipe.transformer.config.in_channels, self.side, self.side)
        states, logps = [x], []
        with self.phase("rollout"):
            for i in range(len(self.timesteps)):
                velocity = self._velocity(x, i, embeds, pooled)
                if i + 1 == len(self.timesteps):
                    x = x + (self.sigmas[i + 1] - self.sigmas[i]) * velocity
                else:
                    mean, std = self._mean_std(x, velocity, i)
                    x = mean + std * torch.randn_like(mean)
                    logps.append(log_prob(x, mean, std))
                states.append(x)
        config = pipe.vae.config
        decoded = pipe.vae.decode(x / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return Batch(states, logps, embeds, pooled, pipe.image_processor.postprocess(decoded, output_type="pt"))

    def _velocity(self, x: Tensor, i: int, embeds: Tensor, pooled: Tensor) -> Tensor:
        output = self.pipe.transformer(
            hidden_states=torch.cat([x, x]),
            timestep=self.timesteps[i].expand(2 * len(x)),
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            return_dict=False,
        )[0]
        negative, positive = output.chunk(2)
        return negative + self.guidance * (positive - negative)

    def _mean_std(self, x: Tensor, velocity: Tensor, i: int) -> tuple[Tensor, float]:
        """Flow-SDE, as flow_grpo writes it."""
        sigma, sigma_next = self.sigmas[i], self.sigmas[i + 1]
        dt = sigma_next - sigma
        g = math.sqrt(sigma / (1 - (self.sigmas[1] if sigma == 1 else sigma))) * self.noise_level
        factor = g**2 / (2 * sigma)
        mean = x * (1 + factor * dt) + velocity * (1 + factor * (1 - sigma)) * dt
        return mean, g * math.sqrt(-dt)

    def _replay(self, batch: Batch, i: int) -> tuple[Tensor, Tensor, float]:
        """Log-prob, mean and std of recorded step ``i``."""
        mean, std = self._mean_std(batch.states[i], self._velocity(batch.states[i], i, batch.embeds, batch.pooled), i)
        return log_prob(batch.states[i + 1], mean, std), mean, std

    def _old_logp(self, batch: Batch) -> list[Tensor]:
        with self.phase("old log-probs"):
            return [self._replay(batch, i)[0] for i in range(len(self.timesteps) - 1)]


def log_prob(x: Tensor, mean: Tensor, std: float) -> Tensor:
    """Gaussian log density, mean over elements."""
    element = -((x - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))
    return element.mean(dim=(1, 2, 3))
