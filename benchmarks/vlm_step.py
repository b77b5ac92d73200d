"""Times a GRPO step on a vision-language model: mmrl's Trainer and VLMPolicy against TRL's GRPOTrainer.

    pip install --target ../trl --no-deps trl datasets
    OMP_NUM_THREADS=1 PYTHONPATH=../trl python benchmarks/vlm_step.py --setting A

Both train the same saved weights (a random Qwen2.5-VL of 0.2 M parameters) on the same rows (a PNG and a question
each) with the same reward, in one process and in turn: after every step of TRL comes one of mmrl. A step is all of
it: reading rows and pictures, sampling, rewards, advantages, loss, backward, clipping, optimiser. Both sample at
temperature 1, update once per rollout with all rows in one micro-batch, take no reference and keep no log. Lengths are
fixed: neither samples the end token, nor the ids that mmrl never samples (place holders and marks of pictures, unused
rows of the embedding).

Ratios are of CPU time of the process, which runs one thread, since other work on the machine disturbs the clock on the
wall; that is shown beside it. Counts come from a warm-up step, so that counting costs nothing in the timed ones.

``--check`` gives both the same completions, of unequal lengths, and compares rewards, advantages, loss and gradient.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import trl_loop
import typer
from rich.console import Console
from rich.table import Table
from vlm_rows import Work, load_model, save_model, score, write_rows

from mmrl import Prompt
from mmrl.algorithms.base import Context
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.config import TrainerOptions
from mmrl.data import PromptSampler
from mmrl.scoring import Scorer
from mmrl.seeding import generator
from mmrl.tally import Clock, Tally
from mmrl.trainer import Stage, Trainer
from mmrl.types import Samples
from pipelines import VLMPolicy

LR, CLIP_RANGE = 1e-5, 0.2
ROWS = 32
COUNTED = 1
"""The warm-up step whose work is counted."""

PARTS = (
    "rows and pictures",
    "prompts",
    "tokens one by one",
    "update: forward",
    "update: backward",
    "everything else",
)


@dataclass(frozen=True)
class Setting:
    """Sizes of a step: distinct prompts, completions of each, pixels of a picture's side, tokens of a completion."""

    prompts: int
    group: int
    side: int
    tokens: int
    target: float


SETTINGS = {"A": Setting(2, 4, 224, 32, 1.7), "B": Setting(4, 8, 224, 64, 2.0), "C": Setting(2, 8, 896, 32, 4.0)}


@dataclass
class Runs:
    """Timed steps of a contestant: seconds on the wall and of CPU, CPU seconds of parts, and the work of a step."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    work: dict[str, int] = field(default_factory=dict)

    def add(self, lap: tuple[float, float], parts: dict[str, float]) -> None:
        self.wall.append(lap[0])
        self.cpu.append(lap[1])
        self.parts.append(parts)


class Stopwatch:
    """Seconds on the wall and of CPU between :meth:`start` and :meth:`stop`."""

    def start(self) -> None:
        gc.collect()
        self._began = (time.perf_counter(), time.process_time())

    def stop(self) -> tuple[float, float]:
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]


class Mine:
    """mmrl's step.

    Args:
        model, processor: trained in place.
        rows: of :func:`vlm_rows.write_rows`.
        setting: sizes.
        fixed_length: do not sample the end token.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        rows: list[dict],
        setting: Setting,
        fixed_length: bool = True,
        ban: bool = True,
    ):
        rows_a_step = setting.prompts * setting.group
        self.policy = VLMPolicy(model, processor, max_new_tokens=setting.tokens, batch_size=rows_a_step)
        if fixed_length:
            self.policy.banned = torch.cat([self.policy.banned, self.policy.eos]).unique()
            self.policy.decoder.banned = self.policy.banned
        self.prompts = [Prompt(text=row["text"], images=[row["image"]], id=row["image"]) for row in rows]
        self.sampler = PromptSampler(self.prompts, setting.prompts, shuffle=False)
        self.scorer = Scorer([reward])
        self.algorithm = PolicyGradient(group_size=setting.group, clip_range=CLIP_RANGE)
        options = TrainerOptions(steps=1000, lr=LR, max_grad_norm=1.0, micro_batch_size=rows_a_step)
        self.stage = Stage("benchmark", self.algorithm, self.sampler, self.scorer, None, options, seed=0)
        self.trainer = Trainer(self.policy, [self.stage], Path(), None, None)
        self.optimizer = torch.optim.AdamW(list(self.policy.parameters), lr=LR)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(self, number: int) -> dict[str, float]:
        """One step of the trainer; the CPU seconds of its parts."""
        policy, seconds = self.policy, dict.fromkeys(PARTS, 0.0)

        def timed(function: Callable, part: str) -> Callable:
            def run(*args: Any, **kwargs: Any) -> Any:
                start = time.process_time()
                result = function(*args, **kwargs)
                seconds[part] += time.process_time() - start
                return result

            return run

        with contextlib.ExitStack() as stack:
            for owner, name, part in (
                (policy.reader, "read", "rows and pictures"),
                (policy, "decoder", "tokens one by one"),
                (policy, "rollout", "prompts"),
                (self.algorithm, "loss", "update: forward"),
                (torch.Tensor, "backward", "update: backward"),
            ):
                stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), part)))
            start = time.process_time()
            self.trainer._step(self.stage, self.optimizer, self.scaler, number)
            seconds["everything else"] = (
                time.process_time()
                - start
                - sum(seconds[part] for part in ("prompts", "update: forward", "update: backward"))
            )
        seconds["prompts"] -= seconds["rows and pictures"] + seconds["tokens one by one"]
        return seconds


def reward(samples: Samples) -> list[float]:
    """:func:`vlm_rows.score` of every completion."""
    return [score(text) for text in samples.texts]


def sizes_for_trl(setting: Setting) -> dict[str, Any]:
    """The keywords of :func:`trl_loop.build_trainer` that both have in common."""
    return {
        "prompts": setting.prompts,
        "group_size": setting.group,
        "max_new_tokens": setting.tokens,
        "lr": LR,
        "clip_range": CLIP_RANGE,
    }


def measure(setting: Setting, warmup: int, repeats: int, folder: Path) -> dict[str, Runs]:
    """Steps of both in turn, ``warmup`` of each before ``repeats`` that are timed."""
    save_model(folder / "model")
    rows = write_rows(folder / "rows", ROWS, setting.side)
    theirs, processor = load_model(folder / "model")
    mine = Mine(*load_model(folder / "model"), rows, setting)
    trainer = trl_loop.build_trainer(
        folder / "trl",
        theirs,
        processor,
        rows,
        **sizes_for_trl(setting),
        suppressed=mine.policy.banned.tolist(),
        steps=warmup + repeats,
    )
    found = {"TRL": Runs(), "mmrl": Runs()}
    clock, work, watched = Stopwatch(), Work(), contextlib.ExitStack()

    def begin(step: int) -> None:
        if step == COUNTED:
            watched.enter_context(work.watching(theirs, processor))
        clock.start()

    def end(step: int) -> None:
        lap = clock.stop()
        if step == COUNTED:
            watched.close()
            found["TRL"].work = dict(work.counts)
            with work.watching(mine.policy.model, mine.policy.processor):
                mine.step(step)
            found["mmrl"].work = dict(work.counts)
            return
        clock.start()
        parts = mine.step(step)
        if step >= warmup:
            found["TRL"].add(lap, {})
            found["mmrl"].add(clock.stop(), parts)

    trl_loop.train(trainer, begin, end)
    return found


def show(setting: Setting, found: dict[str, Runs], console: Console) -> dict[str, float]:
    """Print the tables; returns the ratios."""
    table = Table(title="seconds of a step")
    for name in ("", "min CPU", "median CPU", "min wall", "median wall"):
        table.add_column(name, justify="right" if name else "left")
    ratios: dict[str, list[float]] = {}
    for name, runs in found.items():
        cells = [function(values) for values in (runs.cpu, runs.wall) for function in (min, statistics.median)]
        table.add_row(name, *(f"{value:.4f}" for value in cells))
        ratios[name] = cells
    kinds = ("min CPU", "median CPU", "min wall", "median wall")
    ratio = {kind: a / b for kind, a, b in zip(kinds, ratios["TRL"], ratios["mmrl"], strict=True)}
    pairs = [a / b for a, b in zip(found["TRL"].cpu, found["mmrl"].cpu, strict=True)]
    ratio["median of pairs, CPU"] = statistics.median(pairs)
    table.add_row("[bold]TRL / mmrl", *(f"[bold]{ratio[kind]:.2f}" for kind in kinds))
    console.print(table)
    parts = Table(title="mmrl's step, median CPU seconds")
    for part in PARTS:
        parts.add_column(part, justify="right")
    parts.add_row(*(f"{statistics.median(run[part] for run in found['mmrl'].parts):.4f}" for part in PARTS))
    console.print(parts)
    work = Table(title="work of a step")
    for name in ("", *found):
        work.add_column(name, justify="right" if name else "left")
    for kind in dict.fromkeys(kind for runs in found.values() for kind in runs.work):
        work.add_row(kind, *(str(runs.work.get(kind, 0)) for runs in found.values()))
    console.print(work)
    console.print(
        f"TRL / mmrl, CPU time, median of {len(pairs)} pairs of steps: {statistics.median(pairs):.2f} "
        f"({min(pairs):.2f} to {max(pairs):.2f}; at least {setting.target} asked)"
    )
    return ratio


def check(setting: Setting, folder: Path, console: Console) -> None:
    """Loss and gradient of both on the same completions and rewards, on-policy and after the weights have moved."""
    save_model(folder / "model")
    rows = write_rows(folder / "rows", ROWS, setting.side)
    mine = Mine(*load_model(folder / "model"), rows, setting, fixed_length=False)
    # More tokens at which a completion ends, so that lengths differ.
    mine.policy.decoder.eos = torch.cat([mine.policy.eos, torch.arange(300, 320)])
    context = Context(mine.policy, mine.scorer, 0, setting.prompts * setting.group, Clock(), Tally())
    experience = mine.algorithm.collect(context, mine.sampler.batch(0), 0)
    rollout = experience.rollout
    # TRL scores under the whole distribution, also where some ids are not sampled.
    mine.policy.banned = None
    rollout.logp = mine.policy.decisions(rollout).logp.detach()
    completions = [row[:n].tolist() for row, n in zip(rollout.trace.tokens, rollout.trace.lengths, strict=True)]
    named = mine.policy.parameters.named
    shifts = {name: 0.01 * torch.randn(p.shape, generator=generator(0, name)) for name, p in named.items()}
    lengths = f"{min(map(len, completions))} to {max(map(len, completions))} tokens"
    table = Table(title=f"the same {len(completions)} completions of {lengths}")
    for column in ("", "TRL", "mmrl", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for moved in (False, True):
        if moved:
            move(mine.policy.model, shifts)
        for aggregation, loss_type in (("sequence", "grpo"), ("token", "dapo"), ("constant", "dr_grpo")):
            model, processor = load_model(folder / "model")
            trainer = trl_loop.build_trainer(
                folder / "trl", model, processor, rows, loss_type=loss_type, **sizes_for_trl(setting)
            )
            if moved:
                move(model, shifts)
            data = [trainer.train_dataset[i] for i in rollout.group.tolist()]
            old_logp = rollout.logp.clone() if moved else None
            loss, norm, inputs = trl_loop.losses(trainer, data, completions, old_logp)

            algorithm = PolicyGradient(
                setting.group, clip_range=CLIP_RANGE, aggregation=aggregation, max_decisions=setting.tokens
            )
            update = next(algorithm.updates(context, experience, 0))
            own_loss = sum(backward(algorithm.loss(context, batch)) for batch in update.micro_batches)
            own_norm = torch.nn.utils.clip_grad_norm_(named.values(), float("inf")).item()
            theirs = dict(model.named_parameters())
            gaps = [(p.grad - theirs[name].grad).norm() for name, p in named.items() if p.grad is not None]
            mine.optimizer.zero_grad(set_to_none=True)

            case = f"{loss_type}, {'weights moved' if moved else 'on-policy'}"
            gap = torch.stack(gaps).norm().item() / norm
            table.add_row(f"{case}: loss", f"{loss:.7f}", f"{own_loss:.7f}", f"{abs(loss - own_loss):.1e}")
            table.add_row("  gradient norm", f"{norm:.7f}", f"{own_norm:.7f}", f"{abs(norm - own_norm):.1e}")
            table.add_row("  gradient, norm of the difference over norm", "", "", f"{gap:.1e}")
    # One number a row, the same for all its tokens.
    gap = (inputs["advantages"] - experience.advantage[:, 0]).abs().max().item()
    table.add_row("advantages, largest difference", "", "", f"{gap:.1e}")
    console.print(table)


def move(model: Any, shifts: dict[str, torch.Tensor]) -> None:
    """Add ``shifts`` to the weights."""
    named = dict(model.named_parameters())
    for name, shift in shifts.items():
        named[name].data += shift


def backward(loss: torch.Tensor) -> float:
    loss.backward()
    return loss.item()


def main(
    setting: Annotated[list[str] | None, typer.Option(help=f"of {', '.join(SETTINGS)}; default all")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 20,
    warmup: Annotated[int, typer.Option(min=2)] = 3,
    check_only: Annotated[bool, typer.Option("--check", help="compare loss and gradient instead of times")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result")] = None,
) -> None:
    """Print the comparison, and write it as JSON when asked to."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    console = Console(width=110)
    versions = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    console.print(f"{versions}; {os.cpu_count()} cores, one thread")
    summary = {}
    for name in setting or SETTINGS:
        if name not in SETTINGS:
            raise typer.BadParameter(f"'{name}' is none of {', '.join(SETTINGS)}", param_hint="--setting")
        sizes = SETTINGS[name]
        console.rule(f"{name}: {sizes.prompts} prompts, group {sizes.group}, {sizes.side} px, {sizes.tokens} tokens")
        with tempfile.TemporaryDirectory() as folder:
            if check_only:
                check(sizes, Path(folder), console)
                continue
            found = measure(sizes, warmup, repeats, Path(folder))
        summary[name] = {"ratios": show(sizes, found, console), "runs": {k: vars(v) for k, v in found.items()}}
    if output is not None:
        output.write_text(json.dumps(summary, indent=1), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
