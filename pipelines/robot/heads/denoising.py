"""Flow-matching and diffusion heads: chunks of actions by the same step kernel as pictures.

:meth:`DenoisingHead.transition` alone says where a step goes on average and with which std; the sampler and the scorer
both ask it, so that a replay cannot drift from the rollout.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.types import Decisions, Denoising
from pipelines.robot.heads.base import (
    ActionHead,
    HeadShape,
    OverActions,
    OverSteps,
    Sampled,
    chunk_error,
    chunk_logp,
    live_actions,
)
from pipelines.robot.networks import ChunkNetwork, NoiseNetwork
from pipelines.step_kernel import (
    StepCoefficients,
    cosine_alpha_bars,
    ddim_coefficients,
    diffusion_endpoints,
    flow_coefficients,
    flow_endpoints,
    gaussian_log_density,
    step_mean,
    step_table,
    steps_at,
)

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Trained = Literal["all", "random"] | Annotated[int, Field(ge=1)]
FlowStep = Literal["ode", "flow_sde", "dance", "cps"]


class DenoisingHead(ActionHead):
    """Denoise a chunk in K steps, some of which add noise and are decisions. See the heads built on it for the options.

    Args:
        shape: of context and chunk.
        network: ``network(context, x, time) -> [n, H, D]`` with an attribute ``time`` that embeds times.
        noise: learned stds, in place of the steps' own.
        steps: coefficients of the K steps as they are with noise.
        plain: those of the deterministic sampler.
        times: ``[K]`` in [0, 1], what the network is told.
    """

    def __init__(
        self,
        shape: HeadShape,
        network: nn.Module,
        noise: NoiseNetwork | None,
        steps: Sequence[StepCoefficients],
        plain: Sequence[StepCoefficients],
        times: Sequence[float],
        train_steps: Trained,
        early: Literal["ode", "frozen"],
        min_std: float,
        min_logp_std: float | None,
        noise_clip: float | None,
        sample_clip: float | None,
        logp_clamp: tuple[float, float] | None,
        over_steps: OverSteps,
        over_actions: OverActions,
    ):
        super().__init__()
        self.shape = shape
        self.network = network
        self.noise = noise
        self.min_std, self.min_logp_std = min_std, min_std if min_logp_std is None else min_logp_std
        self.noise_clip, self.sample_clip, self.logp_clamp = noise_clip, sample_clip, logp_clamp
        self.over_steps, self.over_actions = over_steps, over_actions
        self.steps = len(steps)
        noisy = [k for k, step in enumerate(steps) if step.C > 0 or min_std > 0 or noise is not None]
        if not noisy:
            raise UserError(
                f"no step of the action head adds noise with num_steps {self.steps}, so there is nothing to train by "
                "reinforcement: take more steps, or set min_std or learned_std"
            )
        if isinstance(train_steps, int) and train_steps > len(noisy):
            raise UserError(f"train_steps is {train_steps}, but only {len(noisy)} of {self.steps} steps add noise")
        self.random = train_steps == "random"
        self.trained = noisy[-train_steps:] if isinstance(train_steps, int) else noisy
        self.decision_steps = self.trained_calls = 1 if self.random else len(self.trained)
        self.decisions_per_turn = self.decision_steps if over_steps == "step" else 1
        # Steps before the trained ones: their noise is that of the frozen copy, as in DPPO.
        self.frozen = deepcopy(network).requires_grad_(False) if early == "frozen" else None
        self.early = [k for k in noisy if k < self.trained[0]] if early == "frozen" else []
        self.noisy_steps = sorted([*self.early, *self.trained])
        # Row k is step k without noise, row K + k the same with it.
        self.register_buffer("table", step_table([*plain, *steps]), persistent=False)
        self.register_buffer("times", torch.tensor(times), persistent=False)
        steps_in = self.decision_steps if over_steps == "sum" else 1
        self.elements_per_decision = steps_in * (shape.horizon * shape.action_dim if over_actions == "sum" else 1)
        plain_gaussian = noise is None and logp_clamp is None and self.decisions_per_turn == self.decision_steps
        self.verbs = frozenset({"denoise", "means"} if plain_gaussian and over_actions == "mean" else {"denoise"})
        self.fit_normals = 1 + shape.horizon * shape.action_dim

    @abstractmethod
    def endpoints(self, x: Tensor, output: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of the clean chunk and of the noise from the network's output at the steps ``index`` ``[n]``."""

    def transition(self, context: Any, x: Tensor, index: Tensor, noisy: Tensor, frozen: bool = False):
        """Mean ``[n, H, D]`` and std of the steps ``index`` ``[n]`` from ``x``, with noise where ``noisy`` is 1.

        The std broadcasts against the mean and is without floors. ``frozen`` asks the copy that early steps keep.
        """
        network = self.frozen if frozen else self.network
        time = self.times[index]
        x0hat, x1hat = self.endpoints(x, network(context, x, time), index)
        coefficients = steps_at(self.table, index + self.steps * noisy, x.ndim)
        mean = step_mean(x0hat, x1hat, coefficients)
        if self.noise is None:
            return mean, coefficients.C
        return mean, self.noise(context, network.time(time))

    def draw(self, turns: int, generator: torch.Generator, deterministic: bool = False) -> Tensor:
        """The start of each chunk, noise for each step that has some, and with ``random`` which step that is."""
        chunks = 1 if deterministic else 1 + (1 if self.random else len(self.noisy_steps))
        numbers = torch.randn(turns, chunks * self.shape.horizon * self.shape.action_dim, generator=generator)
        if not self.random or deterministic:
            return numbers
        return torch.cat([numbers, torch.rand(turns, 1, generator=generator)], 1)

    def sample(self, context: Any, draws: Tensor, deterministic: bool = False) -> Sampled:
        """See :meth:`ActionHead.sample`."""
        n, size = len(draws), self.shape.horizon * self.shape.action_dim
        noise = draws[:, : draws.shape[1] // size * size].unflatten(1, (-1, self.shape.horizon, self.shape.action_dim))
        chosen = None
        if self.random and not deterministic:
            place = (draws[:, -1] * len(self.trained)).long().clamp(max=len(self.trained) - 1)
            chosen = torch.tensor(self.trained, device=draws.device)[place]
        x, drawn = noise[:, 0], 1
        decided: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for step in range(self.steps):
            index = torch.full((n,), step, device=draws.device)
            adds_noise = step in self.noisy_steps and not deterministic
            noisy = torch.full_like(index, adds_noise) if chosen is None else (chosen == index).long()
            frozen = self.frozen is not None and step < self.trained[0]
            mean, std = self.transition(context, x, index, noisy, frozen)
            if not adds_noise:
                x = mean
                continue
            z = noise[:, 1 if self.random else drawn]
            drawn += 1
            if self.noise_clip is not None:
                z = z.clamp(-self.noise_clip, self.noise_clip)
            after = mean + std.clamp(min=self.min_std) * z
            if chosen is not None:
                # A row adds noise in its own step alone.
                after = torch.where(noisy[:, None, None] > 0, after, mean)
            if step in self.trained:
                decided.append((x, after, mean, std))
            x = after
        if deterministic:
            return Sampled(x, {})
        before, after, mean, std = (torch.stack(column, 1) for column in zip(*decided, strict=True))
        index = torch.tensor(self.trained, device=x.device).expand(n, -1).contiguous()
        if chosen is not None:
            own = torch.arange(n, device=x.device), place
            before, after, mean, std, index = (column[own][:, None] for column in (before, after, mean, std, index))
        record = {"before": before, "after": after, "step": index}
        return Sampled(x, record, self._elements(after, mean, std), mean)

    def _elements(self, after: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        """Log-density of each element, std floored and values clamped as the options say."""
        elements = gaussian_log_density(after, mean, std.clamp(min=self.min_logp_std))
        return elements if self.logp_clamp is None else elements.clamp(*self.logp_clamp)

    def logp(self, elements: Tensor, executed: Tensor) -> Tensor:
        """See :func:`chunk_logp`."""
        return chunk_logp(elements, executed, self.over_actions, self.over_steps)

    def decisions(
        self, context: Any, record: Mapping[str, Tensor], executed: Tensor, columns: Sequence[int] | None = None
    ) -> Decisions:
        """All steps asked for go through the network in one call; see :meth:`ActionHead.decisions`."""
        count = self.decision_steps
        places = list(range(count)) if columns is None or self.over_steps != "step" else list(columns)
        before, after, index = (record[name][:, places] for name in ("before", "after", "step"))
        n, k = index.shape
        context = context if k == 1 else context.repeat_interleave(k, 0)
        flat = index.flatten()
        mean, std = self.transition(context, before.flatten(0, 1), flat, torch.ones_like(flat))
        elements = self._elements(after.flatten(0, 1), mean, std).unflatten(0, (n, k))
        logp = self.logp(elements, executed)
        if "means" not in self.verbs:
            return Decisions(logp)
        # What was not executed must not count in divergences either.
        live = live_actions(executed, self.shape.horizon)[:, None]
        mean = torch.where(live, mean.unflatten(0, (n, k)), after)
        std = std.clamp(min=self.min_logp_std).view(n, k)
        return Decisions(logp, action=after, mean=mean, std=std, dt=self.table[index, 3])

    @abstractmethod
    def noised(self, actions: Tensor, normals: Tensor) -> Denoising:
        """Chunks ``[n, H, D]`` at noise levels drawn for training, without a prediction."""

    def denoise(
        self, context: Any, actions: Tensor, executed: Tensor, normals: Tensor, at: Denoising | None = None
    ) -> Denoising:
        """The network's prediction at noise levels of ``normals`` or at given states.

        Where actions were not executed the prediction is the target, so that they teach nothing.
        """
        at = self.noised(actions, normals) if at is None else at
        predicted = self.network(context, at.x, at.time)
        return replace(at, prediction=torch.where(live_actions(executed, self.shape.horizon), predicted, at.target))

    def fit(self, context: Any, actions: Tensor, executed: Tensor, normals: Tensor) -> Tensor:
        """Squared error of the prediction, mean over executed actions and their numbers."""
        found = self.denoise(context, actions, executed, normals)
        return chunk_error((found.prediction - found.target).square(), executed)

    def begin_stage(self) -> None:
        """Early steps keep the network as it is now."""
        if self.frozen is not None:
            self.frozen.load_state_dict(self.network.state_dict())

    def kept(self) -> dict[str, Tensor]:
        """The copy that early steps use."""
        return {} if self.frozen is None else {f"frozen.{name}": x for name, x in self.frozen.state_dict().items()}

    def overview(self) -> str:
        """Which steps are trained and what a log-prob is over."""
        which = "one random step" if self.random else f"steps {self.trained[0] + 1}-{self.trained[-1] + 1}"
        numbers = f"{self.shape.horizon} x {self.shape.action_dim} numbers"
        steps = "" if self.over_steps == "step" else f", {self.over_steps} over {self.decision_steps} steps"
        return (
            f"{self.decisions_per_turn} a turn ({which} of {self.steps}), log-prob the {self.over_actions} over "
            f"{numbers}{steps}: {self.elements_per_decision} effective dimension(s)"
        )


class FlowHead(DenoisingHead):
    """Rectified flow: velocity ``noise - action`` at sigma from 1 (noise) to 0 in K equal steps (arXiv:2209.03003).

    Args:
        shape: of context and chunk.
        num_steps: K.
        hidden: widths of the network's layers.
        time_width: of the time's embedding.
        step: how noise is added; see :func:`pipelines.step_kernel.flow_coefficients`. ``ode`` adds none but that of
            ``min_std`` or ``learned_std``.
        noise_level: a of ``flow_sde``, ``dance`` and ``cps``.
        train_steps: ``all`` steps with noise are decisions; a number: only the last so many have any; ``random``: one,
            drawn for every turn, all others follow the ODE.
        early: what comes before the last so many: ``ode`` steps of the network as it is, or noisy ones of a copy that
            was ``frozen`` when the stage began.
        min_std: floor of the std in sampling (DPPO, arXiv:2409.00588); with one the last step has noise as well.
        min_logp_std: floor in log-probs; the same when not given.
        learned_std: bounds of a learned std per element (ReinFlow, arXiv:2505.22094), in place of the steps' own.
        noise_hidden: widths of its network.
        noise_clip: bound on standard normal draws; log-probs do not account for it.
        logp_clamp: bounds on the log-prob of an element.
        over_steps: every denoising ``step`` is a decision with a ratio of its own, or the chunk is one decision whose
            log-prob is the ``mean`` or ``sum`` over steps.
        over_actions: log-probs are the ``mean`` or the ``sum`` over executed actions and their numbers.
    """

    def __init__(
        self,
        shape: HeadShape,
        num_steps: Annotated[int, Field(ge=1)] = 4,
        hidden: Sequence[int] = (128, 128),
        time_width: Annotated[int, Field(ge=2)] = 16,
        step: FlowStep = "flow_sde",
        noise_level: NotNegative = 0.5,
        train_steps: Trained = "all",
        early: Literal["ode", "frozen"] = "ode",
        min_std: NotNegative = 0.0,
        min_logp_std: Positive | None = None,
        learned_std: tuple[Positive, Positive] | None = None,
        noise_hidden: Sequence[int] = (64, 64),
        noise_clip: Positive | None = None,
        logp_clamp: tuple[float, float] | None = None,
        over_steps: OverSteps = "step",
        over_actions: OverActions = "mean",
    ):
        sigmas = [1 - k / num_steps for k in range(num_steps + 1)]
        kind = "ode" if learned_std is not None else step

        def coefficients(kind: str) -> list[StepCoefficients]:
            return [flow_coefficients(kind, now, after, noise_level, sigmas[1]) for now, after in pairwise(sigmas)]

        super().__init__(
            shape,
            *_networks(shape, hidden, time_width, learned_std, noise_hidden),
            coefficients(kind),
            coefficients("ode"),
            sigmas[:-1],
            train_steps,
            early,
            min_std,
            min_logp_std,
            noise_clip,
            None,
            logp_clamp,
            over_steps,
            over_actions,
        )

    def endpoints(self, x: Tensor, output: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`pipelines.step_kernel.flow_endpoints`."""
        return flow_endpoints(x, output, self.times[index].view(-1, 1, 1))

    def noised(self, actions: Tensor, normals: Tensor) -> Denoising:
        """At a uniform sigma."""
        # A normal number made uniform by its own distribution function, so that a row draws once.
        sigma = torch.special.ndtr(normals[:, 0])
        noise = normals[:, 1:].view_as(actions)
        x = torch.lerp(actions, noise, sigma[:, None, None])
        return Denoising(noise - actions, x, sigma, sigma)


class DiffusionHead(DenoisingHead):
    """DDPM / DDIM over chunks (Diffusion Policy, arXiv:2303.04137), predicting the noise.

    The network is trained on ``diffusion_steps`` levels of the cosine schedule; sampling takes ``num_steps`` of them,
    evenly spaced. With all of them and ``eta`` 1 a step is DDPM's posterior.

    Args:
        shape: of context and chunk.
        num_steps: K.
        diffusion_steps: levels of the schedule, a multiple of K; K when not given.
        eta: of DDIM; 0 adds no noise but that of ``min_std`` or ``learned_std``.
        sample_clip: bound on the estimated clean chunk, from which the noise is then estimated anew.

    All other options are those of :class:`FlowHead`.
    """

    def __init__(
        self,
        shape: HeadShape,
        num_steps: Annotated[int, Field(ge=1)] = 10,
        diffusion_steps: Annotated[int, Field(ge=1)] | None = None,
        eta: Annotated[float, Field(ge=0, le=1)] = 1.0,
        sample_clip: Positive | None = 1.0,
        hidden: Sequence[int] = (128, 128),
        time_width: Annotated[int, Field(ge=2)] = 16,
        train_steps: Trained = "all",
        early: Literal["ode", "frozen"] = "ode",
        min_std: NotNegative = 0.0,
        min_logp_std: Positive | None = None,
        learned_std: tuple[Positive, Positive] | None = None,
        noise_hidden: Sequence[int] = (64, 64),
        noise_clip: Positive | None = None,
        logp_clamp: tuple[float, float] | None = None,
        over_steps: OverSteps = "step",
        over_actions: OverActions = "mean",
    ):
        levels = diffusion_steps or num_steps
        if levels % num_steps:
            raise UserError(f"diffusion_steps is {levels}, but should be a multiple of num_steps ({num_steps})")
        bars = cosine_alpha_bars(levels)
        stride = levels // num_steps
        places = list(range(levels - 1, -1, -stride))
        used = [bars[place] for place in places]
        following = [*used[1:], 1.0]
        eta = 0.0 if learned_std is not None else eta

        def coefficients(eta: float) -> list[StepCoefficients]:
            return [ddim_coefficients(a, b, eta, 1 / num_steps) for a, b in zip(used, following, strict=True)]

        super().__init__(
            shape,
            *_networks(shape, hidden, time_width, learned_std, noise_hidden),
            coefficients(eta),
            coefficients(0.0),
            [(place + 1) / levels for place in places],
            train_steps,
            early,
            min_std,
            min_logp_std,
            noise_clip,
            sample_clip,
            logp_clamp,
            over_steps,
            over_actions,
        )
        self.register_buffer("bars", torch.tensor(bars), persistent=False)
        self.register_buffer("used", torch.tensor(used), persistent=False)

    def endpoints(self, x: Tensor, output: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """See :func:`pipelines.step_kernel.diffusion_endpoints`; after clipping the noise is that of the clipped."""
        bar = self.used[index].view(-1, 1, 1)
        x0hat, noise = diffusion_endpoints(x, output, bar, "epsilon")
        if self.sample_clip is None:
            return x0hat, noise
        return diffusion_endpoints(x, x0hat.clamp(-self.sample_clip, self.sample_clip), bar, "sample")

    def noised(self, actions: Tensor, normals: Tensor) -> Denoising:
        """At a uniform level."""
        levels = len(self.bars)
        level = (torch.special.ndtr(normals[:, 0]) * levels).long().clamp(max=levels - 1)
        noise = normals[:, 1:].view_as(actions)
        bar = self.bars[level]
        signal, spread = bar.sqrt(), (1 - bar).sqrt()
        x = signal.view(-1, 1, 1) * actions + spread.view(-1, 1, 1) * noise
        return Denoising(noise, x, (level + 1) / levels, spread / signal)


def _networks(
    shape: HeadShape,
    hidden: Sequence[int],
    time_width: int,
    learned_std: tuple[float, float] | None,
    noise_hidden: Sequence[int],
) -> tuple[nn.Module, NoiseNetwork | None]:
    """What is asked at every step, the encoder's own or an MLP, and the network of learned stds if they are."""
    make = getattr(shape.encoder, "chunk_network", None)
    network = make(shape.horizon, shape.action_dim, time_width) if make is not None else None
    if network is None:
        network = ChunkNetwork(shape.context_dim, shape.horizon, shape.action_dim, hidden, time_width)
    if learned_std is None:
        return network, None
    sizes = shape.context_dim, time_width, shape.horizon, shape.action_dim
    return network, NoiseNetwork(*sizes, noise_hidden, learned_std)
