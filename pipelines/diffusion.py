"""RL on image and video diffusion pipelines: any diffusers pipeline with a scheduler seam is a policy."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.policy import Parameters
from mmrl.seeding import derive_seed, generator, prompt_keys
from mmrl.types import Chain, Decisions, Denoising, Prompt, Rollout, Samples
from pipelines import adapters, latents, loading
from pipelines.adapters import LoRA
from pipelines.branching import Branching, branched_rollout
from pipelines.diffusion_options import check_options, check_step, forwards_per_sample
from pipelines.guidance import NegativeBranch, NegativeModel
from pipelines.kept_graph import KeptGraph
from pipelines.noising import FitTime, noised_again
from pipelines.prediction import Prediction
from pipelines.scheduler_seam import Critic, JumpToX0, Kernel, Replay, Sample
from pipelines.seam import Call, Seam
from pipelines.state_value import state_value
from pipelines.steering import Steered, Steering
from pipelines.step_kernel import LogProbKind, StepKind
from pipelines.trace import Trace, shared_states
from pipelines.windows import noise_levels, window_steps


class DiffusionPolicy:
    """A diffusers pipeline as a policy: its denoiser trains, its code runs unmodified.

    Args:
        pipe: the pipeline (``DiffusionPolicy.load`` makes one from a folder or hub id).
        num_steps: sampling steps in training.
        step: kind of the stochastic steps (:mod:`pipelines.step_kernel`); ``ode`` samples without noise and has no
            decisions. On DDPM-type pipelines (SD 1.x, SDXL) ``flow_sde`` and ``ddim`` are DDIM with eta = noise_level.
            Consistency models and other few-step ones are sampled by ``cps`` with noise_level 1.
        noise_level: strength of the noise: one number, or a list with one for each stochastic step, in order; with a
            window that moves they move along (noise by the depth of a tree, calibrated noise of DenseGRPO).
        window: which steps are stochastic (:func:`pipelines.windows.window_steps`); the others follow the ODE.
        call: extra arguments of the pipeline's call: height, width, guidance_scale...
        log_prob: convention of log-probs; ``auto`` is the published one for the step.
        lora: adapters to train; None trains the whole denoiser.
        train: without adapters, names of the components whose weights train, such as ``[controlnet]``.
        batch_size: rows per pipeline call.
        same_noise: members of a group start from the same x_T.
        shared_prefix: run the steps before the window once per prompt; needs ``same_noise``.
        branching: samples of a prompt share their first steps, as a tree or a fan (:mod:`pipelines.branching`).
        steering: rewards whose gradient steers rollouts (Euphonium, :mod:`pipelines.steering`).
        value_head: predict the reward of the state before each stochastic step (:mod:`pipelines.state_value`), for
            ``ppo``; not part of what is exported.
        value_lr_scale: learning rate of the value head as a multiple of ``trainer.lr``.
        gradient_checkpointing: recompute activations in the backward pass (the denoiser's blocks and the VAE); with
            ``step``, whole denoising steps, so that the gradient of many steps needs the memory of one.
        keep_graph: keep the graphs of the stochastic steps while sampling, so that the first update on a rollout runs
            no forward again (:mod:`pipelines.kept_graph`). Memory grows with the rows of a rollout times the steps of
            the window: for short windows, small models, or together with ``gradient_checkpointing``.
        vae_tiling: decode pictures in overlapping tiles, one at a time; clips also in overlapping chunks of frames, by
            VAEs that do not go frame by frame anyway.
        keep_mean: keep the behaviour means in ``rollout.mean``.
        keep_states: ``window`` keeps the states that decisions need, ``all`` keeps every step's.
        offload_states: keep them in the host's memory (pinned, where there is a GPU) until a decision needs them.
        eval_num_steps, eval_call: for ``generate``; the rest of ``call`` still applies.
        negative: for ``generate``, weights of the opposite preference that guidance steers away from.
        fit_call: call arguments for ``fit``; None switches guidance off.
        fit_time: distribution of noise levels in ``fit`` and ``denoise`` (:mod:`pipelines.noising`); ``auto`` is
            ``logit_normal`` for flows (arXiv:2403.03206) and ``uniform`` for DDPM-type models.

    Raises:
        UserError: an option does not fit the pipeline.
    """

    verbs = frozenset(
        {"rollout", "decisions", "fit", "denoise", "generate", "chain", "candidates", "complete", "means"}
        | {"branches", "values", "steered"}
    )

    def __init__(
        self,
        pipe: Any,
        num_steps: Annotated[int, Field(ge=1)] = 10,
        step: StepKind = "flow_sde",
        noise_level: Annotated[float, Field(ge=0)] | list[Annotated[float, Field(gt=0)]] = 0.7,
        window: str | list[int] | dict[str, Any] = "all",
        call: dict[str, Any] | None = None,
        log_prob: LogProbKind = "auto",
        lora: LoRA | None = None,
        train: list[str] | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        same_noise: bool = False,
        shared_prefix: bool = False,
        branching: Branching | None = None,
        steering: Steering | None = None,
        value_head: bool = False,
        value_lr_scale: Annotated[float, Field(gt=0)] = 1.0,
        gradient_checkpointing: bool | Literal["step"] = False,
        keep_graph: bool = False,
        vae_tiling: bool = False,
        keep_mean: bool = False,
        keep_states: Literal["window", "all"] = "window",
        offload_states: bool = False,
        eval_num_steps: Annotated[int, Field(ge=1)] | None = None,
        eval_call: dict[str, Any] | None = None,
        negative: NegativeModel | None = None,
        fit_call: dict[str, Any] | None = None,
        fit_time: Literal["auto"] | FitTime = "auto",
    ):
        if lora is not None and train is not None:
            raise UserError("pipeline.train names what trains without adapters: leave it out, or set lora to null")
        self.pipe = pipe
        self.seam = Seam(pipe)
        self.kernel = Kernel(check_step(step, noise_level, self.seam), 0.0, log_prob)
        self.noise_level = noise_level
        self.noise_scale: Sequence[float] | None = None
        self.num_steps = num_steps
        self.window = window
        check_options(
            num_steps,
            step,
            window,
            same_noise,
            shared_prefix,
            noise_level=noise_level,
            branching=branching,
            value_head=value_head,
            steering=steering,
            keep_graph=keep_graph,
        )
        self.batch_size = batch_size
        self.same_noise = same_noise
        self.shared_prefix = shared_prefix
        self.branching = branching
        self.steered = None if steering is None else Steered(steering)
        self.verbs = self.offers(branching, value_head, steering)
        self.keep_mean = keep_mean
        self.keep_states = keep_states
        self.offload_states = offload_states
        self.fit_time = ("logit_normal" if self.seam.is_flow else "uniform") if fit_time == "auto" else fit_time
        call = dict(call or {})
        for key, kwargs in (("call", call), ("eval_call", eval_call or {}), ("fit_call", fit_call or {})):
            self.seam.check_call(kwargs, key)
        self.train = Call(num_steps, call)
        self.eval = Call(eval_num_steps or num_steps, {**call, **(eval_call or {})})
        unguided = {name: value for name, value in call.items() if not name.startswith("negative_prompt")}
        unguided |= self.seam.guidance_off()
        self.fitting = Call(num_steps, unguided if fit_call is None else {**call, **fit_call})
        self.predict = Prediction(self.seam)
        adapters.freeze(pipe)
        self.negative = None if negative is None else NegativeBranch(pipe, negative)
        self.lora = lora
        self.parameters = adapters.train_all(pipe, train) if lora is None else adapters.add_lora(pipe, lora)
        self.value = state_value(self.seam, self.train) if value_head else None
        if self.value is not None:
            own = {f"value.{name}": parameter for name, parameter in self.value.named_parameters()}
            self.parameters = Parameters(self.parameters.named | own, None, dict.fromkeys(own, value_lr_scale))
        self.kept = KeptGraph(self.parameters) if keep_graph else None
        if gradient_checkpointing:
            adapters.enable_gradient_checkpointing(pipe, whole_steps=gradient_checkpointing == "step")
        if vae_tiling:
            latents.enable_tiling(pipe)

    load = staticmethod(loading.load_pipeline)

    validate = staticmethod(check_options)
    forwards_per_sample = staticmethod(forwards_per_sample)

    @staticmethod
    def offers(branching: Any = None, value_head: bool = False, steering: Any = None, **others: Any) -> frozenset[str]:
        """The verbs of a policy with these options."""
        optional = {"branches": branching, "values": value_head, "steered": steering}
        missing = {verb for verb, on in optional.items() if not on}
        return DiffusionPolicy.verbs - missing

    @property
    def counters(self):
        """Work done so far; see :class:`pipelines.seam.Seam`."""
        return self.seam.counters

    @property
    def has_frozen_base(self) -> bool:
        """The start is at hand without a copy, by switching adapters off."""
        return self.lora is not None

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return self.seam.device

    def to(self, device: torch.device | str) -> DiffusionPolicy:
        """Move the pipeline."""
        self.pipe.to(device)
        if self.value is not None:
            self.value.to(device)
        return self

    def compile(self) -> None:
        """``torch.compile`` the trained networks in place."""
        for module in adapters.denoisers(self.pipe).values():
            module.compile()

    def rollout(self, prompts: Sequence[Prompt], group_size: int, seed: int, step: int = 0) -> Rollout:
        """Sample ``group_size`` pictures per prompt with stochastic steps; see :class:`mmrl.policy.Policy`.

        What a sample starts from and the noise of its steps depend on ``seed``, its prompt and its number within the
        group, not on the batch it is in.
        """
        stochastic = () if self.kernel.step == "ode" else window_steps(self.window, self.num_steps, step, seed)
        limit = 1.0 if self.kernel.step in ("cps", "ddim") else math.inf
        levels = noise_levels(self.noise_level, stochastic, self.noise_scale, limit)
        kernel = replace(self.kernel, noise_level=levels)
        if self.branching is not None:
            return branched_rollout(self, self.branching, prompts, group_size, seed, stochastic, kernel)
        keys = list(prompt_keys(prompts))
        rows = [(g, k) for g in range(len(prompts)) for k in range(group_size)]
        starts = [derive_seed(seed, "start", *keys[g], 0 if self.same_noise else k) for g, k in rows]
        noises = [derive_seed(seed, "noise", *keys[g], k) for g, k in rows]
        start, x = 0, None
        if self.shared_prefix and stochastic and stochastic[0] > 0:
            start = stochastic[0]
            x = self._prefix(prompts, starts[::group_size], start).repeat_interleave(group_size, 0)
        group = torch.tensor([g for g, _ in rows])
        chosen = [prompts[g] for g, _ in rows]
        if self.kept is not None:
            self.kept.forget()
        return self._sample(
            chosen, group, starts, noises, stochastic, start, x, None, kernel, self.steered, self.kept is not None
        )

    def finish_backward(self) -> None:
        """Carry gradients on into the forwards that the rollout kept."""
        if self.kept is not None:
            self.kept.backward()

    def decisions(self, rollout: Rollout, steps: Sequence[int] | None = None) -> Decisions:
        """Score recorded steps again, with gradient; each starts at its recorded state.

        Args:
            rollout: N rows.
            steps: columns of ``rollout.logp``; default all.
        """
        trace: Trace = rollout.trace
        columns = list(range(trace.steps.shape[1]) if steps is None else steps)
        # Samples that share steps do so in other ways in each column.
        together = [columns] if rollout.branch is None else [[column] for column in columns]
        where = [tuple(row) for row in torch.cat([trace.positions, trace.steps, trace.noise], 1).tolist()]
        parts, order = [], []
        for rows in self._batches(rollout.samples.prompts, self.train, where):
            scored = [self._score(rollout[rows], some) for some in together]
            parts.append({name: torch.cat([found[name] for found in scored], 1) for name in scored[0]})
            order += rows
        back = torch.tensor(order).argsort().to(self.device)
        return Decisions(**{name: torch.cat([part[name] for part in parts])[back] for name in parts[0]})

    def _score(self, rollout: Rollout, columns: Sequence[int]) -> dict[str, Tensor]:
        """Fields of the decisions ``columns`` of rows at the same steps; rows that share a state share its forward."""
        trace: Trace = rollout.trace
        rows, back = list(range(len(rollout))), None
        if rollout.branch is not None:
            rows, back = shared_states(rollout, columns[0])
        chosen = [int(trace.steps[0, column]) for column in columns]
        before = [trace.at(s)[rows].to(self.device) for s in chosen]
        after = [trace.at(s + 1).to(self.device) for s in chosen]
        prompts, seeds = [rollout.samples.prompts[i] for i in rows], trace.seeds[rows].tolist()
        plan = Replay(trace.kernel(self.kernel), chosen, before, after, back, self._critic(prompts))
        means = self.kept.means(trace.kept, columns) if self.kept and torch.is_grad_enabled() else None
        if means is None:
            self.seam.run(prompts, self.train, plan, seeds, before[0], torch.is_grad_enabled())
        else:
            grid = self.seam.inspect(prompts[0], self.train).grid
            for step, mean in zip(chosen, means, strict=True):
                plan.score(mean, grid.coefficients(step, plan.kernel, stochastic=True))
        numbers = torch.tensor([[c.C for c in plan.coefficients], [c.dt for c in plan.coefficients]])
        std, dt = numbers.to(self.device)[:, None].expand(2, len(rollout), len(chosen))
        found = {"logp": plan.logp, "action": after, "mean": plan.mean, "value": plan.value}
        return {name: torch.stack(each, 1) for name, each in found.items() if each} | {"std": std, "dt": dt}

    def _critic(self, prompts: Sequence[Prompt]) -> Critic | None:
        """The value head for rows of these prompts."""
        if self.value is None:
            return None
        text = torch.stack([self.seam.inspect(prompt, self.train).text for prompt in prompts])
        return functools.partial(self.value, text)

    def decision_chunks(self, rollout: Rollout) -> list[list[int]]:
        """One denoising step at a time."""
        return [[column] for column in range(rollout.logp.shape[1])]

    def velocity(self, prompts: Sequence[Prompt], x: Tensor, time: Tensor, call: Call | None = None) -> Tensor:
        """The network's float32 prediction ``[N, ...]`` at ``x [N, ...]`` and ``time [N]``, with gradient if enabled.

        For flows ``time`` is sigma in (0, 1] and the prediction the velocity ``e - x0``. For DDPM-type models ``time``
        in (0, 1] stands for timestep ``round(time * train_steps) - 1`` and the prediction is what the model is trained
        to predict. Guidance is off unless ``call`` says otherwise.
        """
        call = call or self.fitting
        parts, order = [], []
        for rows in self._batches(prompts, call):
            parts.append(self.predict([prompts[i] for i in rows], x[rows], time[rows].float(), call))
            order += rows
        output = torch.cat(parts)
        return output[torch.tensor(order).argsort().to(output.device)]

    def fit(self, samples: Samples | Rollout, seeds: Sequence[int]) -> Tensor:
        """Denoising error ``[N]`` on pictures: the mean over elements of ``(prediction - target)^2``, with gradient.

        See :meth:`denoise`.
        """
        return self.denoise(samples, seeds).error

    def noised(self, samples: Samples | Rollout, seeds: Sequence[int]) -> Denoising:
        """What :meth:`denoise` predicts at, without the prediction; gradient flows to the latents of a rollout."""
        prompts = samples.samples.prompts if isinstance(samples, Rollout) else samples.prompts
        grid = self.seam.inspect(prompts[0], self.fitting).grid
        return noised_again(grid, self._clean(samples), seeds, self.fit_time)

    def denoise(self, samples: Samples | Rollout, seeds: Sequence[int], at: Denoising | None = None) -> Denoising:
        """Predictions for pictures that are noised again; see :class:`mmrl.policy.DenoisingPolicy`.

        Pictures are ``samples.images``, or the prompts' ``target`` when there are none; those of a rollout are known as
        latents already. Row k's noise and noise level depend on ``seeds[k]`` alone.
        """
        prompts = samples.samples.prompts if isinstance(samples, Rollout) else samples.prompts
        at = self.noised(samples, seeds) if at is None else at
        return replace(at, prediction=self.velocity(prompts, at.x, at.time))

    def _clean(self, samples: Samples | Rollout) -> Tensor:
        """Latents ``[N, ...]`` of pictures without noise."""
        if isinstance(samples, Rollout):
            return samples.trace.states[:, -1].to(self.device)
        shapes = [self.seam.inspect(prompt, self.fitting).latent_shape for prompt in samples.prompts]
        self.counters["targets_encoded"] += len(samples)
        return latents.encode(self.pipe, samples, shapes, self.batch_size)

    def encoded(self, samples: Samples) -> Rollout:
        """Pictures, or the prompts' targets, as a rollout without decisions, so that they are encoded this once."""
        clean = self._clean(samples)[:, None]
        count = len(samples)
        none = torch.zeros(count, 0, device=self.device)
        ends, seeds = torch.full((count, 1), self.num_steps), torch.zeros(count, dtype=torch.long)
        trace = Trace(clean, ends, none.long().cpu(), none.double().cpu(), seeds)
        return Rollout(samples, none, none.bool(), torch.arange(count), trace)

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Samples:
        """One picture per prompt by the sampler of evaluation; row k's noise is that of ``seeds[k]``.

        The sampler is deterministic, but for consistency models, which add noise again in each step.
        """
        pictures, order = [], []
        for rows in self._batches(prompts, self.eval):
            starts = [derive_seed(seeds[i], "start") for i in rows]
            chosen, plan = [prompts[i] for i in rows], Sample(self.kernel)
            if self.seam.is_consistency:
                noise = [generator(seeds[i], "steps") for i in rows]
                plan = Sample(Kernel("cps", 1.0), range(self.eval.num_steps - 1), noise)
            x = self.initial_states(chosen, [seeds[i] for i in rows])
            with self.negative.active(len(rows)) if self.negative else contextlib.nullcontext():
                pictures.append(self.seam.run(chosen, self.eval, plan, starts, x, decode=True))
            order += rows
        back = torch.tensor(order).argsort()
        return self._samples(prompts, torch.cat(pictures).float()[back.to(self.device)], torch.arange(len(prompts)))

    def initial_states(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor | None:
        """What :meth:`generate` starts from, ``[N, ...]``; None is the noise that the pipeline draws itself."""
        return None

    def chain(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        chain: Chain,
        source: Samples | Rollout | Tensor | None = None,
    ) -> Rollout:
        """Pictures at the end of a stretch of the training sampler (``num_steps``, ``call``), without step noise.

        Gradient flows through the stretch's last steps, the decoder and a ``source`` that are states. See
        :class:`mmrl.policy.ChainPolicy`.
        """
        starts = [derive_seed(seed, "start") for seed in seeds]
        if source is not None and not isinstance(source, Tensor):
            grid = self.seam.inspect(prompts[0], self.train).grid
            clean = self._clean(source)
            noise = torch.stack([torch.randn(clean.shape[1:], generator=generator(seed, "noised")) for seed in seeds])
            source = grid.noised_to(chain.begin, clean, noise.to(clean.device))
        return self._sample(prompts, torch.arange(len(prompts)), starts, starts, (), chain.begin, source, chain)

    def start(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """Noise ``[N, ...]`` from which :meth:`chain` and :meth:`generate` start for the same seeds, float32."""
        found, order = [], []
        for rows in self._batches(prompts, self.train):
            seen: dict[str, Any] = {"texts": []}
            starts = [derive_seed(seeds[i], "start") for i in rows]
            self.seam.run([prompts[i] for i in rows], self.train, self.seam.inspection(), starts, seen=seen)
            found.append(seen["latents"].float())
            order += rows
        return torch.cat(found)[torch.tensor(order).argsort().to(self.device)]

    def jump_to_x0(self, rollout: Rollout, step: int) -> Samples:
        """Decoded estimates of the clean pictures at the recorded state before ``step``, with gradient if enabled."""
        prompts, pictures, order = rollout.samples.prompts, [], []
        for rows in self._batches(prompts, self.train):
            trace: Trace = rollout.trace[rows]
            x, seeds = trace.at(step).to(self.device), trace.seeds.tolist()
            chosen = [prompts[i] for i in rows]
            pictures.append(
                self.seam.run(chosen, self.train, JumpToX0(step), seeds, x, torch.is_grad_enabled(), decode=True)
            )
            order += rows
        back = torch.tensor(order).argsort()
        return self._samples(prompts, torch.cat(pictures).float()[back.to(self.device)], rollout.group)

    @torch.no_grad()
    def complete(self, rollout: Rollout, column: int, jump: bool = False) -> Samples:
        """Pictures of the states before decision ``column``; see :class:`mmrl.policy.CompletingPolicy`.

        Each costs the forwards of the steps that are left, or one with ``jump``; rows that share a state share them.
        """
        rows, back = shared_states(rollout, column)
        states = rollout[rows]
        steps = states.trace.steps[:, column]
        parts, order = [], []
        for step in steps.unique().tolist():
            chosen = (steps == step).nonzero().flatten()
            part = states[chosen]
            if jump:
                parts.append(self.jump_to_x0(part, step))
            else:
                prompts, seeds, x = part.samples.prompts, part.trace.seeds.tolist(), part.trace.at(step)
                parts.append(self._sample(prompts, part.group, seeds, seeds, (), step, x).samples)
            order += chosen.tolist()
        return Samples.cat(parts)[torch.tensor(order).argsort()[back]]

    def branch(self, rollout: Rollout, step: int, copies: int, seed: int) -> Rollout:
        """Continue each row ``copies`` times, with fresh noise, from its recorded state before ``step``.

        Rows that continue one row are adjacent and form a group. Decisions are the rollout's own from ``step`` on.
        """
        rows = [i for i in range(len(rollout)) for _ in range(copies)]
        trace: Trace = rollout.trace[rows]
        stochastic = tuple(s for s in trace.steps[0].tolist() if s >= step)
        noises = [derive_seed(seed, "branch", i, k) for i in range(len(rollout)) for k in range(copies)]
        prompts = [rollout.samples.prompts[i] for i in rows]
        start_seeds = trace.seeds.tolist()
        kernel = trace.kernel(self.kernel)
        x = trace.at(step)
        return self._sample(prompts, torch.tensor(rows), start_seeds, noises, stochastic, step, x, kernel=kernel)

    def candidates(self, rollout: Rollout, column: int, copies: int, seed: int) -> Rollout:
        """One decision taken ``copies`` times anew, as a rollout whose pictures are the estimates right after it.

        Rows that share a state are adjacent and form a group.
        """
        rows = [i for i in range(len(rollout)) for _ in range(copies)]
        trace: Trace = rollout.trace[rows]
        step = int(trace.steps[0, column])
        noises = [derive_seed(seed, "candidate", i, k) for i in range(len(rollout)) for k in range(copies)]
        prompts = [rollout.samples.prompts[i] for i in rows]
        stretch, kernel = Chain(step, step + 2, 0, jump=True), trace.kernel(self.kernel)
        x, starts = trace.at(step), trace.seeds.tolist()
        return self._sample(prompts, torch.tensor(rows), starts, noises, (step,), step, x, stretch, kernel)

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy is the snapshot ``reference``, or what it started from if there is none."""
        in_snapshots = "reference" in self.parameters.snapshots
        return self.parameters.swapped("reference") if in_snapshots else self._frozen_base()

    @contextlib.contextmanager
    def _frozen_base(self) -> Iterator[None]:
        assert self.lora is not None, "take_snapshot('reference') before training starts"
        kept, self.kept = self.kept, None  # the graphs are those of the adapters
        try:
            with adapters.lora_off(adapters.denoisers(self.pipe).values()):
                yield
        finally:
            self.kept = kept

    def export(self, folder: Path) -> None:
        """LoRA: a file for ``pipe.load_lora_weights(folder)``. Full fine-tuning: a plain pipeline folder."""
        if self.lora is None:
            with loading.quiet():
                self.pipe.save_pretrained(folder)
        else:
            adapters.export_lora(self.pipe, Path(folder))

    def _batches(self, prompts: Sequence[Prompt], call: Call, also: Sequence[Any] | None = None) -> Iterator[list[int]]:
        """Row numbers per pipeline call: at most ``batch_size`` adjacent rows, less where rows cannot be together."""
        for begin in range(0, len(prompts), self.batch_size):
            end = min(begin + self.batch_size, len(prompts))
            for rows in self.seam.batches(prompts[begin:end], call):
                groups: dict[Any, list[int]] = {}
                for row in rows:
                    groups.setdefault(also[begin + row] if also else None, []).append(begin + row)
                yield from groups.values()

    def _prefix(self, prompts: Sequence[Prompt], starts: Sequence[int], stop: int) -> Tensor:
        """States ``[P, ...]`` before step ``stop``, one per prompt, by the ODE."""
        states, order = [], []
        for rows in self._batches(prompts, self.train):
            plan = Sample(self.kernel, stop=stop)
            self.seam.run([prompts[i] for i in rows], self.train, plan, [starts[i] for i in rows])
            states.append(plan.states[stop])
            order += rows
        return torch.cat(states)[torch.tensor(order).argsort().to(self.device)]

    def _sample(
        self,
        prompts: Sequence[Prompt],
        group: Tensor,
        starts: Sequence[int],
        noises: Sequence[int],
        stochastic: Sequence[int],
        start: int,
        x: Tensor | None,
        chain: Chain | None = None,
        kernel: Kernel | None = None,
        steered: Steered | None = None,
        keep_graph: bool = False,
    ) -> Rollout:
        """Sample rows from step ``start`` (at ``x``, or at x_T) to the picture, or to the end of a ``chain``.

        ``kernel`` has the noise levels of the stochastic steps.
        """
        kernel = kernel or self.kernel
        kept = {position for s in stochastic for position in (s, s + 1)}
        everything = self.keep_states == "all" and chain is None
        chain = chain or Chain(start, self.num_steps, 0)
        grad = start in stochastic if keep_graph else chain.grad_steps >= chain.end - chain.begin
        parts, order = [], []
        for rows in self._batches(prompts, self.train):
            chosen, seeds = [prompts[i] for i in rows], [starts[i] for i in rows]
            plan = Sample(
                kernel,
                stochastic,
                [torch.Generator("cpu").manual_seed(noises[i]) for i in rows],
                start,
                chain.end if chain.end < self.num_steps else None,
                grad_steps=chain.grad_steps,
                jump=chain.jump,
                record=None if everything else frozenset(kept),
                keep_mean=self.keep_mean,
                critic=self._critic(chosen) if stochastic else None,
                keep_graph=keep_graph,
            )
            begin = None if x is None else x[rows]
            process = None
            if steered is None:
                pictures = self.seam.run(chosen, self.train, plan, seeds, begin, grad, decode=chain.decode)
            else:
                pictures, process = steered.run(self, chosen, plan, seeds, begin)
            count, positions = len(rows), sorted(plan.states)
            logp = torch.stack(plan.logp, 1) if plan.logp else torch.zeros(count, 0, device=self.device)
            states = torch.stack([plan.states[p] for p in positions], 1)
            trace = Trace(
                latents.to_host(states) if self.offload_states else states,
                torch.tensor(positions).expand(count, -1),
                torch.tensor(list(stochastic), dtype=torch.long).expand(count, -1),
                torch.tensor([kernel.level(s) for s in stochastic], dtype=torch.float64).expand(count, -1),
                torch.tensor(seeds),
                self.kept.keep(plan.mean) if keep_graph and plan.mean else None,
            )
            std = torch.tensor(plan.std, device=self.device).expand_as(logp)
            means = plan.mean if self.keep_mean else []
            lists = means, plan.value, plan.aim if steered else []
            mean, value, aim = (torch.stack(each, 1).detach() if each else None for each in lists)
            own = group[rows]
            samples = self._samples(chosen, pictures.float(), own) if chain.decode else Samples(chosen, group=own)
            mask = torch.ones_like(logp, dtype=torch.bool)
            parts.append(Rollout(samples, logp, mask, own, trace, mean, value, std=std, process=process, aim=aim))
            order += rows
        return Rollout.cat(parts)[torch.tensor(order).argsort()]

    def _samples(self, prompts: Sequence[Prompt], pictures: Tensor, group: Tensor) -> Samples:
        kind = {3: "audios", 4: "images", 5: "videos"}[pictures.ndim]
        rate = self.seam.sample_rate if kind == "audios" else None
        rates = None if rate is None else torch.full((len(prompts),), rate)
        return Samples(list(prompts), group=group, sample_rate=rates, **{kind: pictures})
