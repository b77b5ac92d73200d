"""The command line. Heavy imports happen inside the commands, so that ``mmrl --help`` answers at once."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmrl.errors import UserError

if TYPE_CHECKING:
    from mmrl.config import Config

app = typer.Typer(
    name="mmrl",
    help="Reinforcement-learning fine-tuning for multimodal models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, e.g. trainer.lr=1e-4 or rewards.0.weight=2."),
]
ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A YAML config.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder of a run.")]

SMALL_MODEL_BYTES = 500e6


def main() -> None:
    """Entry point. Modules beside the user's config, named as ``module:function``, can be imported."""
    sys.path.append(os.getcwd())
    app(prog_name="mmrl")


def _command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command: bad input is one line on standard error and status 2, Ctrl-C is status 130."""

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            function(*args, **kwargs)
        except UserError as error:
            sentence = " ".join(str(error).split())
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(sentence)}", highlight=False)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            Console(stderr=True).print("stopped")
            raise typer.Exit(130) from error

    return app.command(name=function.__name__.rstrip("_"))(guarded)


@_command
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train as a config says; the results go to its run_dir."""
    from mmrl import run
    from mmrl.config import load_config

    loaded = load_config(config, overrides or [])
    with _saying_how_to_resume(loaded):
        run.train(loaded)
    _report(Path(loaded.run_dir))


@_command
def resume(run_dir: RunFolder, overrides: Overrides = None) -> None:
    """Continue a run from its latest checkpoint."""
    from mmrl import run

    with _saying_how_to_resume(run.run_config(run_dir, overrides or [])):
        run.resume(run_dir, overrides or [])
    _report(run_dir)


@contextlib.contextmanager
def _saying_how_to_resume(config: Config) -> Iterator[None]:
    """After Ctrl-C. ``run_dir`` is read late: training may have taken another than the config named."""
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True, soft_wrap=True).print(f"continue with: mmrl resume {config.run_dir}", highlight=False)
        raise


def _report(run_dir: Path) -> None:
    """Write the report, on the main process."""
    from mmrl import distributed
    from mmrl.report import write_report

    if distributed.rank() == 0:
        Console(soft_wrap=True).print(f"report: {write_report(run_dir)}", highlight=False)


@_command
def eval_(
    source: Annotated[Path, typer.Argument(metavar="RUN_DIR|CONFIG", help="A run, or a config of an untrained model.")],
    overrides: Overrides = None,
) -> None:
    """Score the evaluation prompts with the latest checkpoint of a run, or with a config's model as it is."""
    from mmrl import distributed, run
    from mmrl.config import load_config
    from mmrl.display import Display

    if source.is_dir():
        config, checkpoint = run.run_config(source, overrides or []), run.latest_checkpoint(source)
        step = int(checkpoint.name.removeprefix("step-"))
    else:
        config, checkpoint, step = load_config(source, overrides or []), None, 0
    found = run.evaluate(config, checkpoint)
    Display(rank=distributed.rank()).evaluation(step, found)


@_command
def sample(
    run_dir: RunFolder,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to draw; may be given several times.")],
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="Picture to ask about or edit.")] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Samples per prompt.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="Of the samples' noise.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to; RUN_DIR/samples when not given.")] = None,
) -> None:
    """Draw samples with the latest checkpoint of a run: pictures, clips and sounds as files, text on the terminal."""
    from mmrl import run
    from mmrl.data import check_picture
    from mmrl.media import save_samples
    from mmrl.seeding import derive_seed
    from mmrl.types import Prompt

    if not all(text.strip() for text in prompt):
        raise UserError("--prompt is empty")
    images = [str(path) for path in image or []]
    for path in images:
        check_picture(Path(path), "--image")
    config, checkpoint = run.run_config(run_dir), run.latest_checkpoint(run_dir)
    numbers = [(p, k) for p in range(len(prompt)) for k in range(n)]
    asked = [Prompt(text=text, id=f"prompt {p}", images=images) for p, text in enumerate(prompt)]
    prompts = [asked[p] for p, _ in numbers]
    samples = run.sample(config, prompts, [derive_seed(seed, "sample", *number) for number in numbers], checkpoint)
    folder, names = out or run_dir / "samples", [f"{p:03d}-{k}" for p, k in numbers]
    if samples.texts is not None:
        for text in samples.texts:
            typer.echo(text)
        return
    paths = save_samples(samples, folder, names)
    if not paths:
        raise UserError(f"pipeline '{config.pipeline.type}' makes neither pictures nor clips nor sounds nor text")
    for path in paths:
        Console(soft_wrap=True).print(str(path), highlight=False)


@_command
def report(run_dir: RunFolder) -> None:
    """Write the report of a run, RUN_DIR/report.html."""
    from mmrl.report import write_report

    Console(soft_wrap=True).print(str(write_report(run_dir)), highlight=False)


@_command
def check(
    config: ConfigFile,
    overrides: Overrides = None,
    load: Annotated[
        bool | None,
        typer.Option(help="Load the model to count the parameters that train; by default only a small local one is."),
    ] = None,
) -> None:
    """Validate a config without training; print it resolved, what trains, and the forwards per step."""
    from mmrl.checks import check as check_config
    from mmrl.config import load_config
    from mmrl.plan import step_cost

    loaded = load_config(config, overrides or [])
    found = check_config(loaded)
    console = Console(soft_wrap=True)
    console.print(loaded.to_yaml(), highlight=False, markup=False)
    table = Table("stage", "", "", title="One training step", title_justify="left", show_header=False)
    for stage, prompts in zip(loaded.stages, found, strict=True):
        table.add_row(stage.name, "training prompts", str(len(prompts.train)))
        table.add_row("", "evaluation prompts", str(len(prompts.eval)))
        for name, value in step_cost(loaded, stage).items():
            table.add_row("", name, f"{value:,}")
        table.add_section()
    console.print(table)
    if load is None:
        load = _is_small(loaded.pipeline.options.get("model"))
    if load:
        from mmrl.components import build_policy

        policy = build_policy(loaded.pipeline)
        console.print(f"parameters that train: {policy.parameters.count:,}", highlight=False)
        for name, line in policy.overview().items() if hasattr(policy, "overview") else ():
            console.print(f"{name}: {line}", highlight=False)
    else:
        console.print("parameters that train: known once the model is loaded (mmrl check --load)", highlight=False)


@_command
def list_() -> None:
    """List pipelines, algorithms and rewards."""
    from mmrl.registry import entries

    # Without a terminal, lines are not cut to 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=160)
    for kind in ("pipeline", "algorithm", "reward"):
        table = Table(title=f"{kind}s", title_justify="left", title_style="bold", show_header=False, box=None)
        for name, entry in sorted(entries(kind).items()):
            table.add_row(f"  [bold]{name}[/]", entry.description)
        console.print(table)


@_command
def schema() -> None:
    """Print the JSON schema of configs, for editors."""
    from mmrl.schema import config_schema

    typer.echo(json.dumps(config_schema(), indent=1))


def _is_small(model: Any) -> bool:
    """Whether loading takes seconds: what ships with the package, or a local folder with little in it."""
    if not isinstance(model, str):
        return False
    if model.startswith("builtin:"):
        return True
    folder = Path(model)
    return folder.is_dir() and sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < SMALL_MODEL_BYTES
