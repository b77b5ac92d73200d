"""A scheduler that stands in for a pipeline's own and does, at each step, what a *plan* says.

The pipeline's own code does everything else: text, guidance, packing, position ids, experts, decoding. The grid of
noise levels is computed by the pipeline's own scheduler (shift, dynamic shift, Karras...), of which a copy is kept
inside; for DDPM-type schedulers (PNDM, Euler, ...) it is that of a DDIM scheduler made from the same config.
"""

from __future__ import annotations

import abc
import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError
from pipelines.step_kernel import (
    LogProbKind,
    StepCoefficients,
    StepKind,
    ddim_coefficients,
    diffusion_cps_coefficients,
    diffusion_endpoints,
    flow_coefficients,
    flow_endpoints,
    step_logp,
    step_mean,
)


@dataclass(frozen=True)
class Kernel:
    """How stochastic steps are taken and scored.

    Attributes:
        step: name of the step, see :mod:`pipelines.step_kernel`.
        noise_level: ``a`` of Flow-SDE and CPS, ``eta`` of Dance and DDIM; one number, or one for each stochastic step
            by its index.
        log_prob: convention of the log-prob.
    """

    step: StepKind
    noise_level: float | Mapping[int, float]
    log_prob: LogProbKind = "auto"

    def level(self, index: int) -> float:
        """The noise level of stochastic step ``index``."""
        return self.noise_level[index] if isinstance(self.noise_level, Mapping) else self.noise_level

    def draw(
        self,
        mean: Tensor,
        c: StepCoefficients,
        noise: Sequence[torch.Generator],
        dtype: torch.dtype,
        aim: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Next states ``[N, ...]`` around ``aim`` or else ``mean``, one noise a row, and their log-probs ``[N]``.

        The log-probs are always those around ``mean``.
        """
        z = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in noise]).to(mean.device)
        # Rounded first: the log-prob is that of the state the pipeline really continues from.
        x = ((mean if aim is None else aim) + c.C * z).to(dtype).float()
        return x, step_logp(x, mean, c.C, self.log_prob, self.step)


@dataclass(frozen=True)
class FlowGrid:
    """Noise levels of a flow-matching run: ``sigmas`` (n+1, ends at 0), ``timesteps`` [n] as the network takes them.

    ``inverted`` is for models whose schedule counts ``1 - sigma`` (Mochi); sigmas here are always noise levels.
    ``shift`` is the strength of the time shift in ``shift u / (1 + (shift - 1) u)``.
    """

    sigmas: tuple[float, ...]
    timesteps: Tensor
    shift: float
    train_steps: int
    inverted: bool = False
    is_flow = True

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def coefficients(self, index: int, kernel: Kernel, stochastic: bool) -> StepCoefficients:
        """The numbers of step ``index``."""
        sigma, sigma_next = self.sigmas[index], self.sigmas[index + 1]
        kind, level = (kernel.step, kernel.level(index)) if stochastic else ("ode", 0.0)
        return flow_coefficients(kind, sigma, sigma_next, level, self.sigmas[1], index == 0)

    def prediction(self, output: Tensor) -> Tensor:
        """The velocity ``e - x0`` from what the pipeline hands to the scheduler."""
        return -output if self.inverted else output

    def endpoints(self, index: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of clean sample and noise at step ``index``."""
        return flow_endpoints(x, self.prediction(output), self.sigmas[index])

    def timesteps_at(self, time: Tensor) -> Tensor:
        """Timesteps, as the network takes them, of noise levels sigma in (0, 1]."""
        return ((1 - time) if self.inverted else time) * self.train_steps

    def step_times(self) -> Tensor:
        """Noise levels sigma at which the sampler calls the network."""
        return torch.tensor(self.sigmas[:-1])

    def noised_to(self, place: int, x0: Tensor, noise: Tensor) -> Tensor:
        """The noisy sample before step ``place``."""
        return (1 - self.sigmas[place]) * x0 + self.sigmas[place] * noise

    def noised(self, x0: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy sample at sigma ``time`` [N], and the velocity that the network should predict there."""
        s = time.view(-1, *[1] * (x0.ndim - 1))
        return (1 - s) * x0 + s * noise, noise - x0

    def x0_scale(self, time: Tensor) -> Tensor:
        """By how much ``[N]`` the estimate of the clean sample falls where the prediction rises by 1."""
        return time


DATA_VARIANCE = 0.25
"""Of latents, as consistency models assume it."""


@dataclass(frozen=True)
class DiffusionGrid:
    """Noise levels of a DDPM-type run: ``alphas`` (n+1 values of alpha-bar, the last is where the run ends).

    ``time`` in (0, 1] stands for the discrete timestep ``round(time * train_steps) - 1``. ``boundary`` is that of
    consistency models: the factor of timesteps in the weights by which the clean estimate becomes the sample itself at
    timestep 0 (arXiv:2303.01469, section 3).
    """

    alphas: tuple[float, ...]
    timesteps: Tensor
    alpha_table: Tensor
    prediction_type: str
    clip: float | None
    train_steps: int
    boundary: float | None = None
    shift: float = 1.0
    is_flow = False

    def __len__(self) -> int:
        return len(self.alphas) - 1

    def coefficients(self, index: int, kernel: Kernel, stochastic: bool) -> StepCoefficients:
        """The numbers of step ``index``; dt is the share of the diffusion's time that the step covers."""
        level = kernel.level(index) if stochastic else 0.0
        if kernel.step == "cps":
            return diffusion_cps_coefficients(self.alphas[index + 1], level, 1 / len(self))
        return ddim_coefficients(self.alphas[index], self.alphas[index + 1], level, 1 / len(self))

    def prediction(self, output: Tensor) -> Tensor:
        """What the network predicts (epsilon, v or x0), unchanged."""
        return output

    def endpoints(self, index: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of clean sample and noise at step ``index``."""
        x0hat, noise = diffusion_endpoints(x, output, self.alphas[index], self.prediction_type)
        x0hat = x0hat if self.clip is None else x0hat.clamp(-self.clip, self.clip)
        if self.boundary is not None:
            scaled = float(self.timesteps[index]) * self.boundary
            spread = scaled**2 + DATA_VARIANCE
            x0hat = DATA_VARIANCE / spread * x + scaled / math.sqrt(spread) * x0hat
        return x0hat, noise

    def timesteps_at(self, time: Tensor) -> Tensor:
        """Discrete timesteps of ``time`` in (0, 1]."""
        return (time * self.train_steps).round().long().clamp(1, self.train_steps) - 1

    def step_times(self) -> Tensor:
        """``time`` of the timesteps at which the sampler calls the network."""
        return (self.timesteps.cpu().float() + 1) / self.train_steps

    def noised_to(self, place: int, x0: Tensor, noise: Tensor) -> Tensor:
        """The noisy sample before step ``place``."""
        return math.sqrt(self.alphas[place]) * x0 + math.sqrt(1 - self.alphas[place]) * noise

    def noised(self, x0: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy sample at ``time`` [N], and what the network should predict there."""
        table = self.alpha_table.to(x0.device)
        alpha = table[self.timesteps_at(time)].view(-1, *[1] * (x0.ndim - 1))
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        target = {"epsilon": noise, "sample": x0, "v_prediction": signal * noise - sigma * x0}[self.prediction_type]
        return signal * x0 + sigma * noise, target

    def x0_scale(self, time: Tensor) -> Tensor:
        """By how much ``[N]`` the estimate of the clean sample falls where the prediction rises by 1."""
        alpha = self.alpha_table.to(time.device)[self.timesteps_at(time)]
        sigma = (1 - alpha).sqrt()
        return {"epsilon": sigma / alpha.sqrt(), "sample": -torch.ones_like(sigma), "v_prediction": sigma}[
            self.prediction_type
        ]


Grid = FlowGrid | DiffusionGrid


Critic = Callable[[Tensor, Tensor, float], Tensor]
"""Values ``[N]`` of states, from the states, the estimates of their clean samples and the time."""


class Plan(abc.ABC):
    """What one run of a pipeline does; subclasses collect their results on themselves."""

    grid: Grid

    def carries_grad(self, index: int) -> bool | None:
        """Whether the network call of step ``index`` is differentiated; None leaves that as it is."""
        return None

    def schedule(self, grid: Grid) -> tuple[Tensor, list[int]]:
        """The timesteps to run and the index of each in ``grid``."""
        self.grid = grid
        steps = self.steps(len(grid))
        return grid.timesteps[steps], steps

    def steps(self, total: int) -> list[int]:
        """Indices to run, out of ``range(total)``; none unless a subclass says so."""
        return []

    @abc.abstractmethod
    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        """Where the pipeline continues from, after step ``index`` at float32 ``x``; it will be rounded to ``dtype``."""


@dataclass
class Inspect(Plan):
    """Runs no step: the pipeline encodes its text, prepares its latents and its grid, and ends.

    Attributes:
        count: first steps to run all the same, for pipelines whose code fails without any.
    """

    count: int = 0

    def steps(self, total: int) -> list[int]:
        return list(range(self.count))

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        return x


@dataclass
class Sample(Plan):
    """Sampling. Steps in ``stochastic`` add noise and are scored; the others follow the ODE.

    Attributes:
        noise: a CPU generator per row.
        start, stop: the range of steps to run; ``stop`` None is the end.
        record: positions (0 is x_T, n is the result) whose states to keep; the position after the last step is always
            kept, ``None`` keeps all.
        grad_steps: how many of the last steps to differentiate through.
        jump: the last step goes straight to its estimate of the clean sample.
        critic: values the states before stochastic steps.
        push: ``[N, ...]``; a stochastic step aims past its mean by so many times its variance.
        aim: where the steps aimed at, kept with ``keep_mean``.
        keep_graph: keep the graphs of stochastic steps, in ``mean``; states carry no gradient from step to step.
    """

    kernel: Kernel
    stochastic: Sequence[int] = ()
    noise: Sequence[torch.Generator] = ()
    start: int = 0
    stop: int | None = None
    record: frozenset[int] | None = frozenset()
    grad_steps: int = 0
    jump: bool = False
    keep_mean: bool = False
    critic: Critic | None = None
    push: Tensor | None = None
    keep_graph: bool = False
    logp: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    aim: list[Tensor] = field(default_factory=list)
    std: list[float] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    states: dict[int, Tensor] = field(default_factory=dict)

    def steps(self, total: int) -> list[int]:
        stop = total if self.stop is None else self.stop
        self._end = stop
        return list(range(self.start, stop))

    def carries_grad(self, index: int) -> bool | None:
        if self.keep_graph:
            return index in self.stochastic
        return True if self.grad_steps and index >= self._end - self.grad_steps else None

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        stochastic = index in self.stochastic
        c = self.grid.coefficients(index, self.kernel, stochastic)
        endpoints = self.grid.endpoints(index, x, output)
        mean = step_mean(*endpoints, c)
        x_next = endpoints[0] if self.jump and index + 1 == self._end else mean
        if stochastic:
            if self.keep_mean or self.keep_graph:
                self.mean.append(mean)
            mean = mean.detach() if self.keep_graph else mean
            aim = mean if self.push is None else mean + c.C**2 * self.push
            x_next, logp = self.kernel.draw(mean, c, self.noise, dtype, aim)
            self.logp.append(logp)
            self.std.append(c.C)
            if self.keep_mean:
                self.aim.append(aim)
            if self.critic is not None:
                self.value.append(self.critic(x, endpoints[0], float(self.grid.step_times()[index])))
        self._keep(index, x)
        if index + 1 == self._end:
            self.states[index + 1] = x_next.to(dtype).float()
        return x_next

    def _keep(self, position: int, x: Tensor) -> None:
        if self.record is None or position in self.record:
            self.states[position] = x


@dataclass
class Replay(Plan):
    """Scores recorded steps (teacher forcing): each starts at its recorded state, whatever the one before arrived at.

    Attributes:
        chosen: step indices, in any order.
        starts, ends: recorded states before and after each of them, float32 ``[N, ...]``.
        back: long ``[N]``, which of the ``M`` rows of the run each recorded step starts from, where several start from
            one; there is one chosen step then, and ``starts`` are ``[M, ...]``.
        critic: values the states before the steps.
    """

    kernel: Kernel
    chosen: Sequence[int]
    starts: Sequence[Tensor]
    ends: Sequence[Tensor]
    back: Tensor | None = None
    critic: Critic | None = None
    logp: list[Tensor] = field(default_factory=list)
    mean: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    coefficients: list[StepCoefficients] = field(default_factory=list)

    def steps(self, total: int) -> list[int]:
        return list(self.chosen)

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        c = self.grid.coefficients(index, self.kernel, stochastic=True)
        endpoints = self.grid.endpoints(index, x, output)
        mean = step_mean(*endpoints, c)
        self.score(mean if self.back is None else mean[self.back], c)
        if self.critic is not None:
            self.value.append(self.critic(x, endpoints[0], float(self.grid.step_times()[index])))
        done = len(self.logp)
        return self.starts[done] if done < len(self.starts) else x

    def score(self, mean: Tensor, c: StepCoefficients) -> None:
        """Score the next recorded step, whose mean is known."""
        end = self.ends[len(self.logp)]
        self.logp.append(step_logp(end, mean, c.C, self.kernel.log_prob, self.kernel.step))
        self.mean.append(mean)
        self.coefficients.append(c)


@dataclass
class Velocity(Plan):
    """Captures what the network predicts at any time: ``time`` is one number, or one a row (float32 ``[N]``)."""

    time: Tensor
    output: Tensor | None = None

    def schedule(self, grid: Grid) -> tuple[Tensor, list[int]]:
        self.grid = grid
        return grid.timesteps_at(self.time.to(grid.timesteps.device))[None], [0]

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        self.output = self.grid.prediction(output)
        return x


@dataclass
class JumpToX0(Plan):
    """One network call at a recorded state, then straight to the estimate of the clean sample."""

    step: int

    def steps(self, total: int) -> list[int]:
        return [self.step]

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        return self.grid.endpoints(index, x, output)[0]


class SeamScheduler:
    """Stands in for a pipeline's scheduler during one run; unknown attributes are those of the base scheduler.

    Args:
        base: what :func:`base_scheduler` returns.
        plan: what to do at each step.
    """

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, base: Any, plan: Plan):
        self.base = base
        self.plan = plan
        self.state_dtype: torch.dtype | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.base, name)

    # Pipelines inspect this signature for the names of the schedules they may pass.
    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | None = None,
        original_inference_steps: int | None = None,
    ) -> None:
        """Lay out the grid as the base scheduler does, then keep the plan's part of it."""
        given = {"num_inference_steps": num_inference_steps, "sigmas": sigmas, "mu": mu, "timesteps": timesteps}
        given["original_inference_steps"] = original_inference_steps
        given = {name: value for name, value in given.items() if value is not None}
        accepted = inspect.signature(self.base.set_timesteps).parameters
        for name in given.keys() - accepted.keys():
            raise UserError(f"the pipeline's {type(self.base).__name__} takes no '{name}': leave it out of 'call'")
        self.base.set_timesteps(device=device, **given)
        self.grid = make_grid(self.base, mu)
        self.timesteps, self._indices = self.plan.schedule(self.grid)
        self.num_inference_steps = len(self.timesteps)
        if self.grid.is_flow:
            levels = [self.grid.sigmas[i] for i in self._indices] + [0.0]
            self.sigmas = torch.tensor(levels, dtype=torch.float32)
        self._position = 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Accepted and not needed: steps are counted."""

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """No scaling: both kinds of model here take their states as they are."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """One step of the plan, in float32; the state keeps the precision in which the pipeline prepared it.

        That need not be the precision handed over here: Mochi casts up before the step and down again after it.
        """
        index = self._indices[self._position]
        self._position += 1
        dtype = self.state_dtype or sample.dtype
        x_next = self.plan.take(index, sample.float(), model_output.float(), dtype).to(dtype).to(sample.dtype)
        grad = self.plan.carries_grad(index + 1)
        if grad is not None:
            torch.set_grad_enabled(grad)
        # The second is for pipelines of consistency models, which decode the clean estimate: at the end they are one.
        return SimpleNamespace(prev_sample=x_next) if return_dict else (x_next, x_next)


def base_scheduler(scheduler: Any, pipeline: str) -> Any:
    """A scheduler of our own to lay out the grid: a copy of the pipeline's, or a DDIM one from its config.

    Raises:
        UserError: the scheduler is neither flow matching nor of the DDPM family.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
    from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers

    config, name = scheduler.config, type(scheduler).__name__
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return copy.deepcopy(scheduler)
    if name == "FlowMatchHeunDiscreteScheduler":
        return FlowMatchEulerDiscreteScheduler.from_config(config)
    if config.get("use_flow_sigmas") and hasattr(scheduler, "sigmas"):
        return copy.deepcopy(scheduler)
    if name in ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"):
        return type(scheduler).from_config(config, clip_sample=False)  # they have the option and do not look at it
    consistency = name == "LCMScheduler"
    family = name in {kind.name for kind in KarrasDiffusionSchedulers} or isinstance(scheduler, DDIMScheduler)
    known = config.get("prediction_type") in ("epsilon", "v_prediction", "sample")
    if not (family or consistency) or not known:
        raise UserError(
            f"pipeline {pipeline} has no scheduler seam: its scheduler {name} is neither flow matching nor of the DDPM "
            "family with epsilon, v or sample prediction"
        )
    if config.get("thresholding"):
        raise UserError(f"pipeline {pipeline}: dynamic thresholding (scheduler option 'thresholding') is not supported")
    if consistency:
        return copy.deepcopy(scheduler)
    # DDIM clips x0 unless told otherwise; schedulers without that option never do.
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))


def make_grid(base: Any, mu: float | None) -> Grid:
    """The grid that ``base.set_timesteps`` has just laid out."""
    config = base.config
    train_steps = config.num_train_timesteps
    if hasattr(base, "sigmas"):
        inverted = bool(config.get("invert_sigmas"))
        sigmas = [1 - s if inverted else s for s in base.sigmas.tolist()]
        sigmas[-1] = 0.0
        shift = getattr(base, "shift", None) or config.get("flow_shift") or config.get("shift") or 1.0
        if config.get("use_dynamic_shifting") and mu is not None:
            shift = math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu
        return FlowGrid(tuple(sigmas), base.timesteps, float(shift), train_steps, inverted)
    table = base.alphas_cumprod.double()
    now = base.timesteps.tolist()
    # The last step arrives at x0, or at the noise level of timestep 0, as the config says.
    last = now[-1] - train_steps // len(now)
    end = table[last] if last >= 0 else base.final_alpha_cumprod.double()
    boundary = config.get("timestep_scaling")
    if boundary is not None:
        end = 1.0  # a consistency model's last step is its estimate of the clean sample
    return DiffusionGrid(
        (*(float(table[t]) for t in now), float(end)),
        base.timesteps,
        base.alphas_cumprod.float(),
        config.prediction_type,
        config.clip_sample_range if config.clip_sample else None,
        train_steps,
        boundary,
    )
