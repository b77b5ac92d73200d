"""The curves of a report: which metrics are drawn, how, and what to look for in them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

from mmrl.report.charts import Line, line_chart, number, smooth, stacked_chart
from mmrl.report.run import DIVERSITY, Points, Run
from mmrl.report.verdict import finite

# metric: title, what to look for, smallest value on the axis
HEALTH = {
    "loss": ("Loss", "For policy-gradient methods its size says little; for supervised stages it should fall.", None),
    "kl": ("KL", "How far the model has moved from its reference. Steady growth is normal, a jump is not.", 0.0),
    "ratio/max_abs_dev": (
        "Replay deviation",
        "Largest |ratio − 1| at the first update of a rollout: 0 means that the replay is exact.",
        0.0,
    ),
    "ratio/clip_fraction": (
        "Clip fraction",
        "Share of decisions outside the clip range. Healthy well below 0.5.",
        0.0,
    ),
    "grad_norm": ("Gradient norm", "Before clipping. Look for spikes and for steady growth.", 0.0),
    "lr": ("Learning rate", "", 0.0),
}
PHASES = ("rollout", "reward", "update")
PALETTE = 7


def curves(run: Run) -> str:
    """The section of curves; metrics this project does not know are drawn too, folded away."""
    shown = [
        *_scores(run),
        *_rewards(run),
        *(_metric(run, name, *HEALTH[name]) for name in HEALTH if name in run.names),
        _time(run),
    ]
    shown = [card for card in shown if card]
    known = {*HEALTH, *(f"time/{phase}" for phase in (*PHASES, "step"))}
    rest = [name for name in run.names if name not in known]
    rest = [name for name in rest if not (name.startswith("reward/") and name.endswith(("/mean", "/std")))]
    others = [card for name in rest if (card := _metric(run, name, name, "", None))]
    if not shown and not others:
        return ""
    section = (
        "<h2>Curves</h2><p>Over training steps. Thin lines are single steps, thick lines a moving average, bands one "
        "standard deviation, or the 95% interval of a held-out share of successes.</p>"
    )
    section += f'<div class="charts">{"".join(shown)}</div>'
    if others:
        section += (
            f"<details><summary>{len(others)} more metric{'s' if len(others) > 1 else ''}</summary>"
            f'<div class="charts">{"".join(others)}</div></details>'
        )
    return section


def _card(title: str, note: str, chart: str, now: str = "", legend: Sequence[Line] = ()) -> str:
    if not chart:
        return ""
    entries = "".join(f'<li class="k{line.colour}">{escape(line.label)}</li>' for line in legend)
    key = f'<ul class="legend">{entries}</ul>' if entries else ""
    return (
        f'<section class="card"><header><h3>{escape(title)}</h3><span>{escape(now)}</span></header>'
        f"{f'<p>{escape(note)}</p>' if note else ''}"
        f"{key}{chart}</section>"
    )


def _describe(title: str, points: Points) -> str:
    values = finite(points)
    if not values:
        return title
    (first_step, first), (last_step, last) = values[0], values[-1]
    return f"{title}: {number(first)} at step {first_step}, {number(last)} at step {last_step}"


def _range(points: Points) -> str:
    values = finite(points)
    if not values:
        return ""
    if len(values) == 1:
        return number(values[0][1])
    return f"{number(values[0][1])} → {number(values[-1][1])}"


def _curve(points: Points, smoothed: Points, label: str, colour: int = 0, spread: Points = ()) -> list[Line]:
    """Single steps and their moving average, with a band of the half-widths ``spread``."""
    halves = dict(spread)
    ends = [(value, halves.get(step)) for step, value in smoothed]
    band = [None if None in pair else (pair[0] - pair[1], pair[0] + pair[1]) for pair in ends] if spread else None
    if smoothed == points:
        return [Line(points, label, colour, band, dots=len(points) < 4)]
    return [Line(points, label, colour, faint=True), Line(smoothed, label, colour, band)]


def _metric(run: Run, name: str, title: str, note: str, floor: float | None) -> str:
    points = run.series(name)
    values = [value for _, value in finite(points)]
    if not values:
        return ""
    # A schedule is not noisy; an average would only blunt its corners.
    smoothed = points if name == "lr" else smooth(points)
    exact = name == "ratio/max_abs_dev" and max(values) == 0
    now = "exactly 0 at every step" if exact else _range(smoothed)
    spiky = min(values) > 0 and max(values) > 50 * statistics.median(values)
    lines = _curve(points, smoothed, title)
    if spiky:
        note = f"{note} Logarithmic axis.".strip()
    chart = line_chart(lines, _describe(title, points), run.steps, run.stages, None if spiky else floor, log=spiky)
    return _card(title, note, chart, now)


def _scores(run: Run) -> list[str]:
    cards = []
    main = run.main_score
    if main:
        points = run.score_series(main)
        parts = [n for n in run.score_names if n.endswith("/mean") and n != main and n not in DIVERSITY]
        # With a single reward its curve is the total over again.
        parts = [n for n in parts if run.score_series(n) != points]
        lines = [Line(points, "total" if parts else "held-out score", 0, run.interval(main), dots=True)]
        for index, name in enumerate(parts, 1):
            label = name.removeprefix("eval/").removesuffix("/mean")
            lines.append(Line(run.score_series(name), label, index % PALETTE, run.interval(name), dots=True))
        lines = [line for line in lines if finite(line.points)]
        chart = line_chart(lines, _describe("Held-out score", points), run.steps, run.stages)
        note = "Prompts that are never trained on, with the same seeds each time. This is the curve that counts."
        cards.append(_card("Held-out score", note, chart, _range(points), lines if len(lines) > 1 else ()))
    diversity = run.diversity
    if diversity:
        chart = line_chart(
            [Line(diversity, "diversity", 2, dots=True)], _describe("Diversity", diversity), run.steps, run.stages, 0.0
        )
        note = "How different the outputs for one prompt are. A fall below 70% of the start is a warning sign."
        cards.append(_card("Diversity", note, chart, _range(diversity)))
    return cards


def _rewards(run: Run) -> list[str]:
    total = run.series("reward/mean")
    cards = []
    if total:
        chart = line_chart(
            _curve(total, smooth(total), "reward", 0, run.series("reward/std")),
            _describe("Training reward", total),
            run.steps,
            run.stages,
        )
        note = "Mean over each step's samples. Noisy, since every step has other prompts."
        cards.append(_card("Training reward", note, chart, _range(smooth(total))))
    parts = [name for name in run.names if name.startswith("reward/") and name.endswith("/mean")]
    parts = [name for name in parts if name != "reward/mean" and run.series(name) != total]
    for index, name in enumerate(parts, 1):
        label = name.removeprefix("reward/").removesuffix("/mean")
        points = run.series(name)
        lines = _curve(points, smooth(points), label, index % PALETTE, run.series(f"reward/{label}/std"))
        chart = line_chart(lines, _describe(f"Reward {label}", points), run.steps, run.stages)
        cards.append(_card(f"Reward: {label}", "", chart, _range(smooth(points))))
    return cards


def _time(run: Run) -> str:
    total = run.series("time/step")
    steps = [step for step, _ in total] or [step for step, _ in run.series("time/rollout")]
    lines = []
    for index, phase in enumerate(PHASES):
        by_step = dict(run.series(f"time/{phase}"))
        if by_step:
            lines.append(Line([(step, by_step.get(step)) for step in steps], phase, index))
    if total and lines:
        known = [sum(line.points[row][1] or 0.0 for line in lines) for row in range(len(steps))]
        other = [max(0.0, (value or 0.0) - k) for (_, value), k in zip(total, known, strict=True)]
        lines.append(Line(list(zip(steps, other, strict=True)), "other", 3))
    sums = {line.label: sum(value or 0.0 for _, value in line.points) for line in lines}
    whole = sum(sums.values())
    if whole <= 0:
        return ""
    shares = {label: seconds / whole for label, seconds in sums.items()}
    # The legend says what each phase takes, so that nobody has to measure areas by eye.
    lines = [Line(line.points, f"{line.label} {shares[line.label]:.0%}", line.colour) for line in lines]
    chart = stacked_chart(
        lines, "Seconds per step by phase: " + ", ".join(line.label for line in lines), run.steps, run.stages
    )
    return _card("Time per step", "Seconds in each phase.", chart, f"{number(whole / len(steps))} s on average", lines)
