"""Line and area charts as inline SVG, coloured by the page's CSS variables so that they follow dark and light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 520, 220
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 12, 26
MAX_POINTS = 320

Points = Sequence[tuple[int, float | None]]
Band = Sequence[tuple[float, float] | None]


@dataclass
class Line:
    """One curve of a chart.

    Attributes:
        points: ``(step, value)``; None is a gap.
        colour: index into the page's palette.
        band: lowest and highest value of a band around each point, in the order of ``points``.
        dots: draw each point, with its value as a tooltip.
        faint: draw thin and pale, as the raw data behind a smoothed curve.
    """

    points: Points
    label: str = ""
    colour: int = 0
    band: Band | None = None
    dots: bool = False
    faint: bool = False


def number(value: float | None) -> str:
    """Three significant digits, without trailing noise: ``0.25``, ``1.2e-5``, ``1,240``."""
    if value is None:
        return "n/a"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1000:
        return f"{value:,.0f}" if size < 1e7 else f"{value:.2e}".replace("e+0", "e").replace("e+", "e")
    if size < 1e-3:
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.3g}"


def smooth(points: Points) -> list[tuple[int, float | None]]:
    """Centred moving average over about a tenth of the points, fewer near the ends; gaps and short series stay."""
    half = max(1, len(points) // 20) if len(points) >= 12 else 0
    result = []
    for index, (step, value) in enumerate(points):
        window = [v for _, v in points[max(0, index - half) : index + half + 1] if v is not None]
        result.append((step, None if value is None else sum(window) / len(window)))
    return result


def line_chart(
    lines: Sequence[Line],
    description: str,
    steps: tuple[int, int],
    stages: Sequence[tuple[str, int]] = (),
    floor: float | None = None,
    log: bool = False,
) -> str:
    """Curves over steps as ``<svg>``; ``""`` when there is not one finite value.

    Args:
        description: what a screen reader says.
        steps: first and last step of the axis, the same for all charts of a page so that they can be compared.
        stages: ``(name, first step)``, drawn as labelled boundaries.
        floor: smallest value that the axis must include.
        log: logarithmic axis, for positive values over several magnitudes; ignored if any value is not positive.
    """
    values = [v for line in lines for _, v in line.points if v is not None]
    if not values:
        return ""
    log = log and min(values) > 0
    low, high = min(values), max(values)
    for line in lines:
        # A band may widen the axis, but not so far that the curve itself becomes flat.
        room = 1.0 * (max(values) - min(values)) or None
        for ends in filter(None, line.band or ()):
            low = min(low, ends[0] if room is None else max(ends[0], min(values) - room))
            high = max(high, ends[1] if room is None else min(ends[1], max(values) + room))
    if floor is not None:
        low = min(low, floor)
    axes = _Axes(*_step_range(steps), *_value_range(low, high, log), log=log)
    body = [axes.grid(), _stage_marks(axes, stages)]
    for line in lines:
        if line.band is not None:
            body.append(_band(axes, line))
    for line in lines:
        kind = "faint" if line.faint else "line"
        body.append(f'<path class="{kind} k{line.colour}" d="{_path(axes, _thin(line.points, extremes=line.faint))}"/>')
        if line.dots:
            body.extend(
                f'<circle class="dot k{line.colour}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="3.5">'
                f"<title>{escape(line.label)} at step {step}: {number(value)}</title></circle>"
                for step, value in line.points
                if value is not None
            )
    return _svg(description, body)


def stacked_chart(
    lines: Sequence[Line], description: str, steps: tuple[int, int], stages: Sequence[tuple[str, int]] = ()
) -> str:
    """Areas on top of each other over the same steps (the curves must be aligned); gaps count as zero."""
    if not lines or not lines[0].points:
        return ""
    columns = _bins([[v or 0.0 for _, v in line.points] for line in lines])
    places = [row[0] for row in _bins([[step for step, _ in lines[0].points]])]
    if len(places) == 1:
        # One step has no width: draw it as a flat stretch.
        places, columns = [places[0] - 0.4, places[0] + 0.4], columns * 2
    axes = _Axes(*_step_range(steps), 0.0, max(sum(row) for row in columns) * 1.05 or 1.0)
    body = [axes.grid()]
    below = [0.0] * len(places)
    for index, line in enumerate(lines):
        above = [b + row[index] for b, row in zip(below, columns, strict=True)]
        edge = [f"{axes.x(s):.1f} {axes.y(v):.1f}" for s, v in zip(places, above, strict=True)]
        base = [f"{axes.x(s):.1f} {axes.y(v):.1f}" for s, v in zip(places, below, strict=True)]
        body.append(f'<path class="area k{line.colour}" d="M{"L".join(edge + base[::-1])}Z"/>')
        below = above
    body.append(_stage_marks(axes, stages))
    return _svg(description, body)


class _Axes:
    def __init__(self, x_low: float, x_high: float, y_low: float, y_high: float, log: bool = False):
        self.x_low, self.x_high, self.y_low, self.y_high, self.log = x_low, x_high, y_low, y_high, log

    def x(self, step: float) -> float:
        return LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_low, self.y_high
        value = min(max(value, low), high)
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        parts = []
        if self.log:
            exponents = range(math.ceil(math.log10(self.y_low) - 1e-9), math.floor(math.log10(self.y_high) + 1e-9) + 1)
            ticks = [10.0**e for e in exponents]
        else:
            ticks = _ticks(self.y_low, self.y_high, 5)
        for value in ticks:
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text class="y" x="{LEFT - 7}" y="{y + 3.5:.1f}">{number(value)}</text>')
        for step in _ticks(self.x_low, self.x_high, 6, whole=True):
            x = min(self.x(step), WIDTH - RIGHT - 4)
            parts.append(f'<text class="x" x="{x:.1f}" y="{HEIGHT - 8}">{number(step)}</text>')
        return "".join(parts)


def _svg(description: str, body: Sequence[str]) -> str:
    text = escape(description)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text}">{"".join(body)}</svg>'


def _ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    if whole:
        size = max(1, round(size))
    first = math.ceil(low / size - 1e-9)
    ticks = [index * size for index in range(first, math.floor(high / size + 1e-9) + 1)]
    # 0.1 * 3 is 0.30000000000000004, and -0.0 would be printed with its sign.
    return [round(tick, 12) + 0.0 if abs(tick) > 1e-9 else tick + 0.0 for tick in ticks]


def _step_range(steps: tuple[int, int]) -> tuple[float, float]:
    low, high = steps
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _value_range(low: float, high: float, log: bool) -> tuple[float, float]:
    if log:
        return low / 1.3, high * 1.3
    if 0 < low < 0.4 * high:
        low = 0.0
    if high < 0 and high > 0.4 * low:
        high = 0.0
    if low == high == 0:
        return 0.0, 1.0
    pad = (high - low) * 0.06 or abs(high) * 0.1
    # An axis that starts at an exact zero has no padding below it.
    return (low if low == 0 and high > 0 else low - pad), high + pad


def _thin(points: Points, extremes: bool) -> Points:
    """At most about MAX_POINTS points: evenly picked, or each bin's extremes, so that no spike is lost."""
    if len(points) <= MAX_POINTS:
        return points
    size = math.ceil(len(points) / (MAX_POINTS / 2 if extremes else MAX_POINTS))
    kept: list[tuple[int, float | None]] = []
    for start in range(0, len(points), size):
        part = list(points[start : start + size])
        finite = [point for point in part if point[1] is not None]
        if extremes and finite:
            pair = {min(finite, key=lambda p: p[1]), max(finite, key=lambda p: p[1])}
            kept.extend(sorted(pair, key=lambda p: p[0]))
        else:
            kept.append(part[0])
    if kept[-1][0] != points[-1][0]:
        kept.append(points[-1])
    return kept


def _bins(columns: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rows of aligned columns, averaged in bins so that at most MAX_POINTS rows are left."""
    count = len(columns[0])
    size = math.ceil(count / MAX_POINTS)
    return [[sum(c[i : i + size]) / len(c[i : i + size]) for c in columns] for i in range(0, count, size)]


def _path(axes: _Axes, points: Points) -> str:
    parts = []
    pen_down = False
    for step, value in points:
        if value is None:
            pen_down = False
            continue
        # "h0" makes a point between two gaps visible: a zero-length stroke has round ends.
        parts.append(f"{'L' if pen_down else 'M'}{axes.x(step):.1f} {axes.y(value):.1f}{'' if pen_down else 'h0'}")
        pen_down = True
    return "".join(parts)


def _band(axes: _Axes, line: Line) -> str:
    rows = [(step, ends) for (step, _), ends in zip(line.points, line.band or (), strict=True)]
    size = math.ceil(len(rows) / MAX_POINTS)
    shapes, run = [], []
    for step, ends in [*rows[::size], (0, None)]:
        if ends is not None:
            run.append((step, max(ends[0], axes.y_low), ends[1]))
            continue
        if len(run) > 1:
            upper = [f"{axes.x(s):.1f} {axes.y(high):.1f}" for s, _, high in run]
            lower = [f"{axes.x(s):.1f} {axes.y(low):.1f}" for s, low, _ in reversed(run)]
            shapes.append(f"M{'L'.join(upper + lower)}Z")
        run = []
    return f'<path class="band k{line.colour}" d="{"".join(shapes)}"/>' if shapes else ""


def _stage_marks(axes: _Axes, stages: Sequence[tuple[str, int]]) -> str:
    parts = []
    for name, step in stages:
        x = axes.x(step)
        if (name, step) != stages[0]:
            parts.append(f'<path class="stage" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        anchor = "end" if x > WIDTH - 80 else "start"
        offset = -4 if anchor == "end" else 4
        parts.append(
            f'<text class="stage" text-anchor="{anchor}" x="{x + offset:.1f}" y="{TOP + 8}">{escape(name)}</text>'
        )
    return "".join(parts)
