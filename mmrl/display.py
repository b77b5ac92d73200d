"""What a person sees in the terminal while a run trains."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

PHASES = ("rollout", "reward", "update")
DESCRIPTION_WIDTH = 10


class Display:
    """Progress bars, evaluation tables and messages; in a file or CI log, one short line every few steps instead.

    Args:
        rank: processes other than 0 show nothing.
        console: where to write; the default is standard output.
        log_every: steps between the lines where there is no terminal; by default about 40 lines a stage.
    """

    def __init__(self, rank: int = 0, console: Console | None = None, log_every: int | None = None):
        self.silent = rank != 0
        # Without a terminal rich would wrap at 80 columns, which breaks log lines that people grep.
        self.console = console or Console(quiet=self.silent)
        if not self.console.is_terminal and console is None:
            self.console = Console(quiet=self.silent, width=160)
        self.log_every = log_every
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._phase: TaskID | None = None
        self._phase_name = ""
        self._stage = ("train", 0, 0)
        self._stage_began = (0.0, 0)
        self._first_reward: float | None = None
        self._last_evaluation: dict[str, float] = {}

    def start(self, config_summary: Mapping[str, Any]) -> None:
        """Show what is about to run, one ``name: value`` a line."""
        if self.silent:
            return
        if not self.console.is_terminal:
            for name, value in config_summary.items():
                self.message(f"{name}: {value}")
            return
        table = Table.grid(padding=(0, 2))
        for name, value in config_summary.items():
            table.add_row(f"[dim]{escape(str(name))}", escape(str(value)))
        self.console.print(Panel(table, title="[bold]mmrl", title_align="left", border_style="blue", expand=False))

    def stage(self, name: str, first_step: int, last_step: int, done: int | None = None) -> None:
        """Begin the bar of a stage that covers the steps after ``first_step`` up to ``last_step``.

        ``done`` is the step a resumed run is at already. The change in reward is counted from the first step shown.
        """
        done = first_step if done is None else done
        self._stage = (name, first_step, last_step)
        self._stage_began = (time.monotonic(), done)
        self._first_reward = None
        if self.silent or not self.console.is_terminal:
            return
        if self._progress is None:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                console=self.console,
                # Steps can take minutes: forget nothing, or the remaining time would never be known.
                speed_estimate_period=24 * 3600,
            )
            self._progress.start()
        # A new stage's bar goes below the finished ones and above the line of the phase.
        self._end_phase()
        self._bar = self._progress.add_task(
            f"{escape(name):<{DESCRIPTION_WIDTH}}", total=last_step - first_step, note=""
        )
        self._progress.update(self._bar, completed=done - first_step)

    def phase(self, name: str, done: int, total: int) -> None:
        """Progress inside a step, on a second line below the bar: ``phase("rollout", 32, 128)``."""
        if self._progress is None:
            return
        description = f"[dim]{escape(name):<{DESCRIPTION_WIDTH}}"
        if self._phase is None:
            self._phase = self._progress.add_task(description, total=total, note="")
        elif self._phase_name != name:
            self._progress.reset(self._phase, description=description, total=total)
        self._phase_name = name
        self._progress.update(self._phase, total=total, completed=done)

    def step(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A training step is done; ``metrics`` is what is written to ``metrics.jsonl``."""
        if self.silent:
            return
        reward = _number(metrics.get("reward/mean"))
        if self._first_reward is None:
            self._first_reward = reward
        if self._progress is not None and self._bar is not None:
            self._phase_name = ""
            note = self._note(metrics, reward, markup=True)
            self._progress.update(self._bar, completed=step - self._stage[1], note=note)
            return
        name, first, last = self._stage
        every = self.log_every or max(1, (last - first) // 40)
        if last > first and step not in (first + 1, last) and (step - first) % every:
            return
        of = f"/{last}" if last > first else ""
        note = self._note(metrics, reward, markup=False)
        remaining = self._remaining(step)
        self.message(f"{name} step {step}{of}  {note}{f'  {remaining} left' if remaining else ''}")

    def evaluation(self, step: int, values: Mapping[str, Any], first: Mapping[str, Any] | None = None) -> None:
        """A table of the held-out scores ``eval/...`` beside those of the previous and of the first evaluation.

        ``first`` is None (or ``values`` themselves) at the first evaluation.
        """
        now, intervals = _evaluation_rows(values), _intervals(values)
        before = _evaluation_rows(first) if first is not None and first is not values else {}
        last, self._last_evaluation = self._last_evaluation, now
        if self.silent:
            return
        if not self.console.is_terminal:
            cells = [
                f"{name} {_score(value)}{intervals.get(name, '')}"
                + (f" ({_change(value - before[name])})" if name in before else "")
                for name, value in now.items()
            ]
            self.message(f"evaluation at step {step}: " + ", ".join(cells))
            return
        table = Table(title=f"Held-out evaluation, step {step}", title_justify="left", title_style="bold")
        table.add_column("score")
        for column in ("before", "last", "now", "change"):
            table.add_column(column, justify="right")
        if intervals:
            table.add_column("95% interval")
        for name, value in now.items():
            change = ""
            if name in before:
                difference = value - before[name]
                colour = "green" if difference > 0 else "red" if difference < 0 else "dim"
                change = f"[{colour}]{_change(difference)}[/]"
            cells = [_score(rows[name]) if name in rows else "" for rows in (before, last)]
            cells += [f"[bold]{_score(value)}", change]
            if intervals:
                cells.append(escape(intervals.get(name, "").strip()))
            table.add_row(escape(name), *cells)
        self.console.print(table)

    def message(self, text: str) -> None:
        """One line of text, above the bars."""
        if not self.silent:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the bars and say how the run went; ``summary`` is what is written to ``summary.json``."""
        self.stop()
        if self.silent:
            return
        evaluations = summary.get("eval") or {}
        before, after = (_evaluation_rows(evaluations.get(key) or {}) for key in ("before", "after"))
        intervals = _intervals(evaluations.get("after") or {})
        between = [(stage, _evaluation_rows(values)) for stage, values in (evaluations.get("stages") or {}).items()][
            :-1
        ]
        for name, value in after.items():
            if name in before:
                path = [_score(before[name]), *(f"{_score(rows[name])} ({s})" for s, rows in between if name in rows)]
                path.append(f"{_score(value)}{intervals.get(name, '')}")
                self.message(f"{name}: {' -> '.join(path)} ({_change(value - before[name])})")
        if "steps" in summary and "seconds" in summary:
            self.message(f"{summary['steps']} steps in {duration(float(summary['seconds']))}")
        if summary.get("checkpoint"):
            self.message(f"checkpoint: {summary['checkpoint']}")

    def stop(self) -> None:
        """End the bars, also after an error or Ctrl-C, so that the terminal is left clean. Safe to call twice."""
        if self._progress is not None:
            self._end_phase()
            self._progress.stop()
        self._progress = self._bar = self._phase = None

    def _end_phase(self) -> None:
        if self._progress is not None and self._phase is not None:
            self._progress.remove_task(self._phase)
        self._phase = None

    def _note(self, metrics: Mapping[str, Any], reward: float | None, markup: bool) -> str:
        bold, dim, end = ("[bold]", "[dim]", "[/]") if markup else ("", "", "")
        parts = []
        if reward is not None:
            change = f" ({reward - self._first_reward:+.3f})" if self._first_reward is not None else ""
            parts.append(f"reward {bold}{_score(reward)}{end}{change}")
        elif (loss := _number(metrics.get("loss"))) is not None:
            parts.append(f"loss {bold}{_score(loss)}{end}")
        seconds = {name: _number(metrics.get(f"time/{name}")) for name in PHASES}
        phases = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if value is not None)
        total = _number(metrics.get("time/step"))
        if total is not None:
            parts.append(f"{dim}{total:.1f} s{f' ({phases})' if phases else ''}{end}")
        return "  ".join(parts)

    def _remaining(self, step: int) -> str:
        began, done = self._stage_began
        left = self._stage[2] - step
        if step <= done or left <= 0:
            return ""
        return duration((time.monotonic() - began) / (step - done) * left)


def duration(seconds: float) -> str:
    """Seconds as people say them: ``"42 s"``, ``"3 min 5 s"``, ``"2 h 10 min"``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, str):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _score(value: float) -> str:
    return f"{value:.3f}" if 1e-2 <= abs(value) < 1000 or value == 0 else f"{value:.3g}"


def _change(value: float) -> str:
    return f"{'+' if value >= 0 else ''}{_score(value)}"


def _evaluation_rows(values: Mapping[str, Any]) -> dict[str, float]:
    """Readable name to value of ``eval/...`` entries: totals first, no ``/mean``, spreads, ends or full shares."""
    rows = {}
    for key, value in values.items():
        number = _number(value)
        name = key.removeprefix("eval/").removesuffix("/mean")
        if name.endswith("/share") and number == 1:
            continue
        hidden = name == "step" or name.startswith("time/") or name.endswith(("/std", "/low", "/high", "/count"))
        if number is not None and not hidden:
            rows[name] = number
    return dict(sorted(rows.items(), key=lambda row: {"reward": 0, "diversity": 2}.get(row[0], 1)))


def _intervals(values: Mapping[str, Any]) -> dict[str, str]:
    """Readable name to ``" [0.423, 0.484] of 1000"`` of those ``eval/...`` entries that are proportions."""
    out = {}
    for key in values:
        if key.endswith("/low"):
            base = key.removesuffix("/low")
            low, high, count = (float(values[f"{base}/{end}"]) for end in ("low", "high", "count"))
            out[base.removeprefix("eval/")] = f" [{low:.3f}, {high:.3f}] of {count:.0f}"
    return out
