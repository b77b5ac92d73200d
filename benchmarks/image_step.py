"""Times a Flow-GRPO training step of mmrl against the bare network work it needs, and against a plain loop.

    OMP_NUM_THREADS=1 python benchmarks/image_step.py

One process runs these in turn, over and over, on one random StableDiffusion3 pipeline with one set of LoRA
adapters:

* ``bare``: the networks alone, at the same batch shapes. Text encoders once per distinct prompt; T denoiser forwards a
  batch without gradient; per trained step a forward without adapters (reference), a forward and a backward through CFG;
  VAE decodes; clipping and the optimiser's step. No scheduler, no log-probs, no loss, no bookkeeping.
* ``mmrl``: the trainer's own step on a ``DiffusionPolicy``: rollout, reward, advantages, losses, statistics, optimiser.
* ``mmrl, kept``: the same with ``keep_graph``: the update carries the rollout's forwards on and runs none again.
* ``plain``: :mod:`plain_loop`, the same step as a straightforward script writes it.

``networks`` is bare without text encoders, decodes and optimiser: what only the denoiser's calls cost. Ratios are of
CPU time, since other work on the machine disturbs the clock on the wall; that is shown beside it.

Every step has prompts that were not seen before, so mmrl's memory of encoded text helps within a step only.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from medium_pipeline import SIZES, build_pipeline
from meter import OTHER, Meter
from plain_loop import PlainLoop
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmrl import Prompt
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.config import TrainerOptions
from mmrl.data import PromptSampler
from mmrl.scoring import Scorer
from mmrl.seeding import generator
from mmrl.trainer import Stage, Trainer
from mmrl.types import Samples
from pipelines import DiffusionPolicy
from pipelines.adapters import LoRA
from pipelines.kept_graph import KeptGraph

DENOISER = ("rollout", "reference", "update: forward", "update: backward")
KEPT = "mmrl, kept"
PAIRS = (("mmrl", "bare"), ("plain", "mmrl"), (KEPT, "bare"), ("plain", KEPT))
NOISE_LEVEL, GUIDANCE, KL_COEF, CLIP_RANGE, LR = 0.7, 4.5, 0.04, 1e-4, 1e-5


@dataclass
class Work:
    """Sizes of one training step."""

    prompts: int
    group: int
    batch: int
    steps: int
    tokens: int
    latent: int

    @property
    def batches(self) -> list[int]:
        """Rows of each batch of samples."""
        rows = self.prompts * self.group
        return [min(self.batch, rows - start) for start in range(0, rows, self.batch)]


def brightness(images: Tensor) -> Tensor:
    """A cheap reward ``[N]`` that differs between samples."""
    return images.float().mean(dim=(1, 2, 3))


def brightness_of(samples: Samples) -> Tensor:
    return brightness(samples.images)


class BareNetworks:
    """The network calls of one step, on inputs of the right shapes."""

    def __init__(self, pipe: Any, optimizer: torch.optim.Optimizer, work: Work):
        self.pipe, self.optimizer, self.work = pipe, optimizer, work
        self.timesteps = torch.linspace(1000, 100, work.steps)

    def step(self, texts: list[str]) -> None:
        pipe, work = self.pipe, self.work
        channels, side = pipe.transformer.config.in_channels, work.latent
        with torch.no_grad():
            for text in texts:
                embeds, _, pooled, _ = pipe.encode_prompt(
                    [text], None, None, do_classifier_free_guidance=False, max_sequence_length=work.tokens
                )
            inputs = [
                {
                    "hidden_states": torch.randn(2 * rows, channels, side, side),
                    "encoder_hidden_states": embeds.repeat(2 * rows, 1, 1),
                    "pooled_projections": pooled.repeat(2 * rows, 1),
                }
                for rows in work.batches
            ]
            for batch in inputs:
                for t in self.timesteps:
                    self._denoise(batch, t)
                pipe.vae.decode(batch["hidden_states"].chunk(2)[0], return_dict=False)
            pipe.transformer.disable_adapters()
            for batch in inputs:
                for t in self.timesteps[:-1]:
                    self._denoise(batch, t)
            pipe.transformer.enable_adapters()
        for batch in inputs:
            for t in self.timesteps[:-1]:
                negative, positive = self._denoise(batch, t).chunk(2)
                (negative + GUIDANCE * (positive - negative)).square().mean().backward()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _denoise(self, batch: dict[str, Tensor], t: Tensor) -> Tensor:
        timestep = t.expand(len(batch["hidden_states"]))
        return self.pipe.transformer(**batch, timestep=timestep, return_dict=False)[0]


def fresh_prompts(count: int) -> list[Prompt]:
    """Distinct texts, as many as asked for."""
    colours, shapes = ["red", "green", "blue", "yellow", "white"], ["circle", "square", "triangle", "ring"]
    texts = [f"a photo of a {c} {s} number {i}" for i in range(count) for c in colours for s in shapes]
    return [Prompt(text=text, id=text) for text in texts[:count]]


def build(work: Work, size: str, rank: int) -> tuple[Meter, dict[str, Callable[[int], None]], DiffusionPolicy]:
    """The contestants as functions of the number of the step."""
    pipe = build_pipeline(SIZES[size])
    side = 8 * work.latent
    policy = DiffusionPolicy(
        pipe,
        num_steps=work.steps,
        noise_level=NOISE_LEVEL,
        call={"height": side, "width": side, "guidance_scale": GUIDANCE, "max_sequence_length": work.tokens},
        lora=LoRA(rank=rank),
        batch_size=work.batch,
    )
    # Away from zero, where the adapters' gradients and the KL would be.
    for number, parameter in enumerate(policy.parameters):
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator(0, "adapters", number))
    meter = Meter(pipe)

    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.AdamW(list(policy.parameters), lr=LR)

    prompts = fresh_prompts(400)
    sampler = PromptSampler(prompts, work.prompts, shuffle=False)
    options = TrainerOptions(steps=1000, lr=LR, max_grad_norm=1.0)
    algorithm = PolicyGradient(group_size=work.group, clip_range=CLIP_RANGE, kl_coef=KL_COEF)
    stage = Stage("benchmark", algorithm, sampler, Scorer([brightness_of]), None, options, seed=0)
    trainer = Trainer(policy, [stage], Path(), None, None)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    common = {
        "num_steps": work.steps,
        "noise_level": NOISE_LEVEL,
        "guidance": GUIDANCE,
        "side": work.latent,
        "batch_size": work.batch,
        "group_size": work.group,
        "clip_range": CLIP_RANGE,
        "kl_coef": KL_COEF,
        "max_sequence_length": work.tokens,
    }
    bare = BareNetworks(pipe, optimizer(), work)
    plain = PlainLoop(pipe, optimizer(), brightness, meter.phase, **common)
    mine = optimizer()

    def texts(step: int) -> list[str]:
        return [prompt.text for prompt in sampler.batch(step)]

    def kept(step: int) -> None:
        policy.kept = KeptGraph(policy.parameters)
        trainer._step(stage, mine, scaler, step + 100)  # texts that the other has not had encoded
        policy.kept = None

    steps = {
        "bare": lambda step: bare.step(texts(step)),
        "mmrl": lambda step: trainer._step(stage, mine, scaler, step),
        KEPT: kept,
        "plain": lambda step: plain.step(texts(step), step),
    }
    return meter, steps, policy


def measure(meter: Meter, steps: dict[str, Callable[[int], None]], warmup: int, repeats: int, report: Callable) -> dict:
    """Per contestant the list of its repetitions: wall, cpu, seconds, calls and rows by kind."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in steps}
    for repeat in range(-warmup, repeats):
        report(f"repetition {repeat + 1} of {repeats}" if repeat >= 0 else "warming up")
        names = list(steps)
        # A different order each time, so that none always follows the same one.
        turn = repeat % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            with meter.running():
                steps[name](repeat + warmup)
            if repeat >= 0:
                found[name].append(
                    {
                        "wall": meter.wall,
                        "cpu": meter.cpu,
                        "seconds": dict(meter.seconds),
                        "calls": dict(meter.calls),
                        "rows": dict(meter.rows),
                    }
                )
    return found


def median(runs: list[dict[str, Any]], key: str, kind: str | None = None) -> float:
    return statistics.median(run[key] if kind is None else run[key].get(kind, 0.0) for run in runs)


def ratio(found: dict, name: str, other: str, key: str = "cpu") -> float:
    """Median over repetitions of ``name / other``, each pair taken close together in time."""
    return statistics.median(a[key] / b[key] for a, b in runs_of(found, name, other))


def runs_of(found: dict, name: str, other: str) -> list[tuple[dict, dict]]:
    """Repetitions of two contestants side by side."""
    return list(zip(found[name], found[other], strict=True))


def tables(found: dict, console: Console) -> None:
    kinds = ["text", "rollout", "decode", "old log-probs", "reference", "update: forward", "update: backward", OTHER]
    seconds = Table(title="CPU seconds of a step (median), by where they go")
    work = Table(title="calls of a step (rows in brackets)")
    for table in (seconds, work):
        table.add_column("")
        for name in found:
            table.add_column(name, justify="right")
    for kind in kinds:
        seconds.add_row(kind, *(f"{median(runs, 'seconds', kind):.3f}" for runs in found.values()))
        if kind not in (OTHER, "update: backward"):
            cells = [(runs[-1]["calls"].get(kind, 0), runs[-1]["rows"].get(kind, 0)) for runs in found.values()]
            work.add_row(kind, *(f"{calls} ({rows})" for calls, rows in cells))
    for key, label in (("cpu", "CPU time"), ("wall", "wall")):
        seconds.add_row(f"[bold]{label}", *(f"[bold]{median(runs, key):.3f}" for runs in found.values()))
        seconds.add_row(f"{label} / bare", *(f"{ratio(found, name, 'bare', key):.3f}" for name in found))
        seconds.add_row(f"{label} / mmrl", *(f"{ratio(found, name, 'mmrl', key):.3f}" for name in found))
    console.print(seconds)
    console.print(work)


def main(
    size: Annotated[str, typer.Option(help=f"of the networks: {', '.join(SIZES)}")] = "medium",
    prompts: Annotated[int, typer.Option(min=1, help="distinct prompts of a step")] = 1,
    group: Annotated[int, typer.Option(min=2, help="samples of a prompt")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="samples of a pipeline call; the denoiser sees twice as many")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="sampling steps T; all but the last train")] = 10,
    rank: Annotated[int, typer.Option(min=1, help="of the LoRA adapters")] = 32,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    warmup: Annotated[int, typer.Option(min=1)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    output: Annotated[Path | None, typer.Option(help="JSON file for the result")] = None,
) -> None:
    """Print the comparison, and write it as JSON when asked to."""
    import diffusers
    import transformers

    # The small tokenizers cut long prompts and say so every time.
    diffusers.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    console = Console(width=110)
    if size not in SIZES:
        raise typer.BadParameter(f"'{size}' is none of {', '.join(SIZES)}", param_hint="--size")
    work = Work(prompts, group, batch, steps, SIZES[size].tokens, SIZES[size].latent)
    meter, contestants, policy = build(work, size, rank)
    found = measure(meter, contestants, warmup, repeats, console.print)
    forward = median(found["bare"], "seconds", "rollout") / found["bare"][0]["calls"]["rollout"]
    parameters = sum(p.numel() for p in policy.pipe.transformer.parameters())
    console.print(
        f"{size}: denoiser of {parameters / 1e6:.1f} M parameters, {policy.parameters.count / 1e6:.2f} M of them "
        f"adapters; one forward of {2 * work.batch} rows takes {1000 * forward:.0f} ms; {threads} thread(s) of "
        f"{os.cpu_count()} cores; torch {torch.__version__}"
    )
    tables(found, console)
    overhead = {key: ratio(found, "mmrl", "bare", key) for key in ("cpu", "wall")}
    overhead["cpu, networks"] = statistics.median(
        mine["cpu"] / sum(bare["seconds"][kind] for kind in DENOISER) for mine, bare in runs_of(found, "mmrl", "bare")
    )
    faster = {key: ratio(found, "plain", "mmrl", key) for key in ("cpu", "wall")}
    faster["cpu, old log-probs kept"] = statistics.median(
        (plain["cpu"] - plain["seconds"]["old log-probs"]) / mine["cpu"]
        for plain, mine in runs_of(found, "plain", "mmrl")
    )
    faster["cpu, without any overhead"] = ratio(found, "plain", "bare")
    for label, ratios, target in (
        ("mmrl / bare", overhead, "at most 1.10"),
        ("plain / mmrl", faster, "at least 1.30"),
        (f"plain / {KEPT}", {key: ratio(found, "plain", KEPT, key) for key in ("cpu", "wall")}, "at least 1.30"),
    ):
        console.print(f"{label} ({target} asked for): " + "; ".join(f"{k} {v:.3f}" for k, v in ratios.items()))
    spread = {f"{a} / {b}": [x["cpu"] / y["cpu"] for x, y in runs_of(found, a, b)] for a, b in PAIRS}
    for label, values in spread.items():
        console.print(f"{label} of each repetition, CPU time: " + ", ".join(f"{value:.3f}" for value in values))
    if output is not None:
        summary = {
            "settings": {"size": size, "rank": rank, "threads": threads, "repeats": repeats, **vars(work)},
            "forward_seconds": forward,
            "overhead": overhead,
            "faster_than_plain": faster,
            "runs": found,
        }
        output.write_text(json.dumps(summary, indent=1), encoding="utf-8")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
