"""The training loop: prompts, experience, updates, log, evaluation, checkpoint.

Read ``train_stage`` from top to bottom; what an algorithm does inside a step is in ``mmrl/algorithms``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmrl import checkpoints, distributed
from mmrl.algorithms.base import Algorithm, Context
from mmrl.checkpoints import TrainingState
from mmrl.data import PromptSampler
from mmrl.display import Display
from mmrl.errors import UserError
from mmrl.evaluation import Evaluation
from mmrl.metrics import MetricsWriter, read_metrics
from mmrl.optim import average_decay, build_optimizer, learning_rate
from mmrl.policy import Policy
from mmrl.scoring import Scorer
from mmrl.seeding import derive_seed
from mmrl.tally import Clock, Tally

AVERAGE = "average"
REFERENCE = "reference"


@dataclass
class Stage:
    """Everything one stage needs, built and validated. ``options`` are the config's ``trainer`` section."""

    name: str
    algorithm: Algorithm
    prompts: PromptSampler
    scorer: Scorer | None
    evaluation: Evaluation | None
    options: Any
    seed: int


class Trainer:
    """Trains one policy through stages, in a run folder.

    Args:
        policy: on its device.
        stages: in order.
        run_dir: gets ``metrics.jsonl``, ``checkpoints/``, ``eval/``, ``summary.json``.
        writer: of metrics; on the main process only, else None.
        display: what the terminal shows.
    """

    def __init__(
        self, policy: Policy, stages: list[Stage], run_dir: Path, writer: MetricsWriter | None, display: Display
    ):
        self.policy = policy
        self.stages = stages
        self.run_dir = run_dir
        self.writer = writer
        self.display = display
        self.state = TrainingState()
        self._first_evaluation: dict[str, float] | None = None

    def run(self, resume: bool = False) -> dict[str, Any]:
        """Train all stages, from the latest checkpoint with ``resume``; returns (and writes) the summary."""
        latest = (checkpoints.checkpoints(self.run_dir) or [None])[-1] if resume else None
        if latest is not None:
            self.state = checkpoints.read_state(latest)
        if resume and self.writer is not None:
            # Without a checkpoint the run starts over, and so do its metrics.
            self.writer.rewind(self.state.step if latest is not None else -1)
        with self._stop_signals() as stopping:
            start = 0
            for number, stage in enumerate(self.stages):
                end = start + stage.options.steps
                if number >= self.state.stage:
                    self._train_stage(number, stage, start, end, latest, stopping)
                    latest = None
                start = end
        return self._finish()

    def _train_stage(
        self, number: int, stage: Stage, start: int, end: int, latest: Path | None, stopping: list[int]
    ) -> None:
        policy, options = self.policy, stage.options
        optimizer = build_optimizer(
            options.optimizer, policy.parameters.groups(), options.lr, options.optimizer_options
        )
        scaler = torch.amp.GradScaler(_device_type(policy), enabled=options.mixed_precision == "fp16")
        if latest is not None:
            self.state = checkpoints.load(latest, policy.parameters, optimizer)
            if self.state.scaler:
                scaler.load_state_dict(self.state.scaler)
            if self.state.algorithm:
                stage.algorithm.load_state(self.state.algorithm)
        else:
            self._begin_stage(number, stage)
        self.display.stage(stage.name, start, end, self.state.step)
        if self.state.step == 0:
            self._evaluate(stage)

        while self.state.step < end:
            began = time.perf_counter()
            metrics = self._step(stage, optimizer, scaler, self.state.step - start)
            self.state.step += 1
            self.state.seconds += time.perf_counter() - began
            self._log(stage, metrics)
            last = self.state.step == end
            if last or (options.eval_every and (self.state.step - start) % options.eval_every == 0):
                self._evaluate(stage)
            stop = distributed.any_rank(bool(stopping))
            if last or stop or (options.save_every and (self.state.step - start) % options.save_every == 0):
                self._save(stage, optimizer, scaler)
            if stop and not (last and number + 1 == len(self.stages)):
                raise KeyboardInterrupt

    def _begin_stage(self, number: int, stage: Stage) -> None:
        """A stage starts with a fresh optimiser; its reference is the policy as it is now."""
        self.state.stage, self.state.updates, self.state.scaler, self.state.algorithm = number, 0, None, None
        parameters = self.policy.parameters
        parameters.snapshots.clear()
        if stage.algorithm.needs_reference and (number > 0 or not self.policy.has_frozen_base):
            parameters.take_snapshot(REFERENCE)
        if stage.options.ema is not None:
            parameters.take_snapshot(AVERAGE)
        if hasattr(self.policy, "begin_stage"):
            self.policy.begin_stage(stage.prompts.prompts)

    def _step(
        self, stage: Stage, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, step: int
    ) -> dict[str, float]:
        """One training step: collect experience, then take the algorithm's updates on it."""
        began = time.perf_counter()
        # Our own draws derive from seed and step; this makes draws inside libraries, such as dropout, do so as well.
        torch.manual_seed(derive_seed(stage.seed, "step", step, distributed.rank()))
        options, algorithm = stage.options, stage.algorithm
        lr = learning_rate(options.lr, options.schedule, options.warmup, step, options.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("scale", 1.0)
        context = Context(
            policy=self.policy,
            scorer=stage.scorer,
            seed=stage.seed,
            micro_batch_size=options.micro_batch_size or self.policy.batch_size,
            clock=Clock(),
            tally=Tally(),
            prompts=stage.prompts,
        )
        grad_norms = []
        prompts = stage.prompts.batch(step)
        with self._autocast(options), torch.no_grad():
            experience = algorithm.collect(context, prompts, step)
        with context.clock("update"):
            for update in algorithm.updates(context, experience, step):
                if update.size == 0:
                    continue
                for micro_batch in update.micro_batches:
                    with self._autocast(options):
                        loss = algorithm.loss(context, micro_batch)
                    scaler.scale(loss).backward()
                if hasattr(self.policy, "finish_backward"):
                    self.policy.finish_backward()
                grad_norms.append(self._apply(optimizer, scaler, options))
                self._update_average(options)
        metrics = context.tally.result()
        if grad_norms:
            metrics["grad_norm"] = sum(grad_norms) / len(grad_norms)
        if hasattr(self.policy, "report"):
            metrics |= self.policy.report()
        times = {"time/rollout": 0.0, "time/reward": 0.0, "time/update": 0.0} | context.clock.take()
        return metrics | {"lr": lr, "updates": len(grad_norms)} | times | {"time/step": time.perf_counter() - began}

    def _apply(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, options: Any) -> float:
        """One optimiser step on the accumulated gradients; returns their norm before clipping."""
        parameters = list(self.policy.parameters)
        distributed.sum_gradients(parameters)
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(parameters, options.max_grad_norm or float("inf")).item()
        if not torch.isfinite(torch.tensor(norm)) and not scaler.is_enabled():
            raise UserError(
                f"step {self.state.step + 1}: the gradient is not finite; the latest checkpoint is untouched. "
                "Lower trainer.lr, or train in float32 (trainer.mixed_precision=no)"
            )
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        self.state.updates += 1
        return norm

    def _update_average(self, options: Any) -> None:
        if options.ema is not None:
            decay = average_decay(options.ema.decay, self.state.updates - 1, options.ema.warmup)
            self.policy.parameters.update_average(AVERAGE, decay)

    def _autocast(self, options: Any) -> contextlib.AbstractContextManager:
        dtype = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.mixed_precision]
        device = _device_type(self.policy)
        return torch.autocast(device, dtype) if dtype is not None else contextlib.nullcontext()

    def _evaluate(self, stage: Stage) -> None:
        """Score the held-out prompts with the averaged weights if there are any, else the current ones."""
        if stage.evaluation is None:
            return
        parameters = self.policy.parameters
        averaged = parameters.swapped(AVERAGE) if AVERAGE in parameters.snapshots else contextlib.nullcontext()
        folder = self.run_dir / "eval" / f"step-{self.state.step:06d}"
        began = time.perf_counter()
        with averaged, self._autocast(stage.options):
            found = stage.evaluation(self.policy, self.state.step, folder)
        if self.writer is not None:
            seconds = time.perf_counter() - began
            self.writer.write(self.state.step, {"stage": stage.name, **found, "time/eval": seconds})
            self.display.evaluation(self.state.step, found, self._before(found))

    def _before(self, found: dict[str, float]) -> dict[str, float]:
        if self._first_evaluation is None:
            self._first_evaluation = next(iter(_evaluations(self.run_dir).values()), found)
        return self._first_evaluation

    def _log(self, stage: Stage, metrics: dict[str, float]) -> None:
        if self.writer is not None:
            self.writer.write(self.state.step, {"stage": stage.name, **metrics})
            self.display.step(self.state.step, metrics)

    def _save(self, stage: Stage, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
        self.state.scaler = scaler.state_dict() or None
        if hasattr(stage.algorithm, "state"):
            self.state.algorithm = stage.algorithm.state() or None
        if distributed.rank() == 0:
            checkpoints.save(
                self.run_dir, self.policy.parameters, optimizer, self.state, stage.options.keep_checkpoints
            )
        distributed.barrier()

    def _finish(self) -> dict[str, Any]:
        """Export the trained model (averaged weights if there are any) and write ``summary.json``."""
        saved = checkpoints.checkpoints(self.run_dir)
        summary: dict[str, Any] = {}
        if self.writer is not None:
            parameters = self.policy.parameters
            averaged = parameters.swapped(AVERAGE) if AVERAGE in parameters.snapshots else contextlib.nullcontext()
            with averaged:
                self.policy.export(self.run_dir / "model")
            summary = {
                "eval": self._evaluations(),
                "steps": self.state.step,
                "seconds": round(self.state.seconds, 3),
                "checkpoint": str(saved[-1]) if saved else None,
                "model": str(self.run_dir / "model"),
                "counters": dict(self.policy.counters),
            }
            (self.run_dir / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
            self.display.finish(summary)
        distributed.barrier()
        return summary

    def _evaluations(self) -> dict[str, Any]:
        """The first evaluation and the last, and of a run in stages also those at the end of each."""
        found = _evaluations(self.run_dir)
        if not found:
            return {}
        out = {"before": _named(found[min(found)]), "after": _named(found[max(found)])}
        ends = itertools.accumulate(stage.options.steps for stage in self.stages)
        ended = {stage.name: _named(found[end]) for stage, end in zip(self.stages, ends, strict=True) if end in found}
        return out | {"stages": ended} if len(self.stages) > 1 else out

    @contextlib.contextmanager
    def _stop_signals(self) -> Iterator[list[int]]:
        """The signals received; the loop ends after the step at hand, with a checkpoint. A second one ends at once."""
        received: list[int] = []

        def handle(number: int, frame: Any) -> None:
            if received:
                raise KeyboardInterrupt
            received.append(number)
            self.display.message("stopping after this step and its checkpoint; once more to stop at once")

        previous = {}
        # Python lets only the main thread set handlers.
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        try:
            for number in numbers:
                previous[number] = signal.signal(number, handle)
            yield received
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.display.stop()


def _evaluations(run_dir: Path) -> dict[int, dict[str, float]]:
    """The evaluations of a run by step, oldest first, as ``{"reward": ..., ...}``."""
    return {
        line["step"]: {key.removeprefix("eval/"): value for key, value in line.items() if key.startswith("eval/")}
        for line in read_metrics(run_dir)
        if any(key.startswith("eval/") for key in line)
    }


def _named(evaluation: dict[str, float]) -> dict[str, float]:
    """With each reward's mean also under the plain name of the reward."""
    means = {key.removesuffix("/mean"): value for key, value in evaluation.items() if key.endswith("/mean")}
    return means | evaluation


def _device_type(policy: Policy) -> str:
    return next(iter(policy.parameters)).device.type
