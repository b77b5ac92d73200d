"""The HTML page of a report, put together from the run, the verdict, the charts and the pictures."""

from __future__ import annotations

import os
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from mmrl.display import duration
from mmrl.report.charts import number
from mmrl.report.curves import curves
from mmrl.report.pictures import before_and_after, best_and_worst, through_training
from mmrl.report.run import Run, load_run
from mmrl.report.verdict import Verdict, finite, judge, signed

REPORT_FILE = "report.html"


def write_report(run_dir: str | Path) -> Path:
    """Write ``run_dir/report.html``, a page that needs nothing but itself, and return its path.

    It can be written at any time while a run goes on, and again later; the old page is replaced at once.

    Raises:
        UserError: the folder does not exist, has no metrics, or a file in it is broken.
    """
    run = load_run(run_dir)
    path = run.folder / REPORT_FILE
    temporary = path.with_name(REPORT_FILE + ".tmp")
    temporary.write_text(render(run), encoding="utf-8")
    os.replace(temporary, path)
    return path


def render(run: Run) -> str:
    """The page as text."""
    name = run.folder.resolve().name
    sections = [
        _header(run, name),
        _verdict(judge(run)),
        _tiles(run),
        before_and_after(run),
        curves(run),
        through_training(run),
        best_and_worst(run),
        _config(run),
        f"<footer>Written by mmrl from {escape(name)}/metrics.jsonl. It needs no network and no scripts.</footer>",
    ]
    template = Template(files("mmrl.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(f"{name} · mmrl report"), body="\n".join(filter(None, sections)))


def _header(run: Run, name: str) -> str:
    about = " · ".join(escape(part) for part in _about(run.config))
    sub = f'<p class="sub">{about}</p>' if about else ""
    return f'<p class="over">mmrl training report</p><h1>{escape(name)}</h1>{sub}'


def _about(config: Mapping[str, Any]) -> list[str]:
    """The algorithm, the model and the rewards, as far as the configuration names them."""
    parts = []
    stages = config.get("stages")
    blocks = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
    algorithms = [_label(block.get("algorithm")) for block in blocks] or [_label(config.get("algorithm"))]
    if any(algorithms):
        parts.append(" then ".join(filter(None, algorithms)))
    if model := _label(config.get("pipeline")):
        parts.append(f"model {model}")
    rewards = config.get("rewards")
    labels = [label for reward in rewards if (label := _label(reward))] if isinstance(rewards, list) else []
    if labels:
        parts.append(f"reward {' + '.join(labels)}")
    if "seed" in config:
        parts.append(f"seed {config['seed']}")
    return parts


def _label(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        for key in ("name", "type", "path", "model"):
            if isinstance(value.get(key), str):
                return value[key]
    return ""


def _verdict(verdict: Verdict) -> str:
    findings = "".join(f'<li class="{f.level}">{escape(f.text)}</li>' for f in verdict.findings)
    advice = "".join(f'<li class="next">{escape(text)}</li>' for text in verdict.advice)
    columns = [
        f"<div><h3>{title}</h3><ul>{items}</ul></div>"
        for title, items in (("What the numbers say", findings), ("What to try next", advice))
        if items
    ]
    why = f'<div class="why">{"".join(columns)}</div>' if columns else ""
    return (
        f'<section class="verdict {verdict.level}" aria-label="Verdict">'
        f'<span class="chip">{escape(verdict.label)}</span>'
        f'<p class="headline">{escape(verdict.headline)}</p>{why}</section>'
    )


def _tiles(run: Run) -> str:
    tiles: list[tuple[str, str, str]] = []
    scores = finite(run.score_series(run.main_score)) if run.main_score else []
    intervals = (run.main_score and run.interval(run.main_score)) or [None]
    first, last = (f" · 95%: {number(at[0])} to {number(at[1])}" if at else "" for at in (intervals[0], intervals[-1]))
    if scores:
        tiles.append(("Held-out before", number(scores[0][1]), f"step {scores[0][0]}{first}"))
    if len(scores) > 1:
        change = scores[-1][1] - scores[0][1]
        kind = "up" if change > 0 else "down" if change < 0 else ""
        tiles.append(("Held-out after", number(scores[-1][1]), f'<span class="{kind}">{signed(change)}</span>{last}'))
        best = max(scores, key=lambda point: point[1])
        tiles.append(("Best evaluation", number(best[1]), f"step {best[0]}"))
    reward = finite(run.series("reward/mean"))
    if reward and not scores:
        tiles.append(("Training reward", number(reward[-1][1]), f"first step {number(reward[0][1])}"))
    diversity = finite(run.diversity)
    if len(diversity) > 1 and diversity[0][1] > 0:
        kept = f"{diversity[-1][1] / diversity[0][1]:.0%}"
        tiles.append(("Diversity kept", kept, f"{number(diversity[0][1])} to {number(diversity[-1][1])}"))
    steps = run.summary.get("steps", max((line["step"] for line in run.training), default=0))
    per_step = finite(run.series("time/step"))
    seconds = run.summary.get("seconds")
    if not isinstance(seconds, (int, float)):
        seconds = sum(value for _, value in per_step) or None
    tiles.append(("Steps", number(steps) if isinstance(steps, (int, float)) else escape(str(steps)), ""))
    if seconds:
        median = sorted(value for _, value in per_step)[len(per_step) // 2] if per_step else None
        tiles.append(("Time", duration(float(seconds)), f"{duration(median)} a step" if median is not None else ""))
    body = "".join(
        f'<div class="tile"><dt>{title}</dt><dd>{value}{f"<small>{note}</small>" if note else ""}</dd></div>'
        for title, value, note in tiles
    )
    html = f'<dl class="tiles">{body}</dl>'
    for key in ("checkpoint", "model"):
        if run.summary.get(key):
            place = escape(str(run.summary[key]))
            html += f'<dl class="tiles"><div class="tile wide"><dt>{key.capitalize()}</dt><dd>{place}</dd></div></dl>'
    return html


def _config(run: Run) -> str:
    if not run.config_text.strip():
        return ""
    return (
        "<h2>Configuration</h2><p>Everything that is needed to run this again.</p>"
        f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"
    )
