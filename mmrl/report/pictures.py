"""The pictures of a report: before and after, through training, the best and the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mmrl.errors import UserError
from mmrl.media import data_uri, film_uri, sound_uri
from mmrl.report.charts import number
from mmrl.report.run import Evaluation, Run, Sample
from mmrl.report.verdict import signed

PAIRS = 12
FILM_ROWS = 4
FILM_COLUMNS = 7
EXTREMES = 6
# Keeps a page of about sixty pictures below three megabytes.
MAX_SIDE = 256
MAX_BYTES = 24_000
MAX_SOUND_BYTES = 160_000
TINY = 160


def before_and_after(run: Run) -> str:
    """The first and last evaluation side by side, same prompts and seeds, chosen by their order alone."""
    if len(run.evaluations) < 2:
        return ""
    first, last = run.evaluations[0], run.evaluations[-1]
    pairs = _pairs(first, last)
    if not pairs:
        return ""
    cards = []
    for before, after in pairs[:PAIRS]:
        change = ""
        if before.total is not None and after.total is not None:
            difference = after.total - before.total
            kind = "up" if difference > 0 else "down"
            change = f' <span class="{kind}">{signed(difference)}</span>' if difference else " (same)"
        parts = _parts(before, after)
        foot = f'<p class="foot">{parts}</p>' if parts else ""
        cards.append(
            f'<article class="card pair"><p class="prompt">{escape(after.prompt or "(no prompt)")}</p><div class="two">'
            f"{_figure(before, f'before (step {first.step})', f'before <b>{number(before.total)}</b>')}"
            f"{_figure(after, f'after (step {last.step})', f'after <b>{number(after.total)}</b>{change}')}"
            f"</div>{foot}</article>"
        )
    written = any(sample.text is not None for sample in last.samples)
    note = "Same prompt, same seed" + ("" if written else ", same starting noise")
    note += f"; {len(cards)} of {len(pairs)} in order, not picked." if len(cards) < len(pairs) else "."
    if any(sample.marks for sample in last.samples):
        note += " Solid: the answer; dashed: the truth."
    return f'<h2>Before and after</h2><p>{note}</p><div class="pairs">{"".join(cards)}</div>'


def through_training(run: Run) -> str:
    """A strip per prompt: one picture per evaluation; only where there are more than two evaluations."""
    if len(run.evaluations) < 3:
        return ""
    count = len(run.evaluations)
    columns = min(FILM_COLUMNS, count)
    chosen = [run.evaluations[round(i * (count - 1) / (columns - 1))] for i in range(columns)]
    by_step = [{sample.key: sample for sample in evaluation.samples} for evaluation in chosen]
    rows = []
    for sample in _one_per_prompt(_shown(chosen[-1].samples))[:FILM_ROWS]:
        cells = []
        for evaluation, samples in zip(chosen, by_step, strict=True):
            found = samples.get(sample.key)
            figure = _figure(found, f"step {evaluation.step}", f"<b>{number(found.total)}</b>") if found else ""
            cells.append(f"<td>{figure}</td>")
        rows.append(f'<tr><th scope="row">{escape(sample.prompt)}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col">step {evaluation.step}</th>' for evaluation in chosen)
    return (
        "<h2>Through training</h2><p>The same prompt and seed at each evaluation.</p>"
        f'<div class="film"><table><thead><tr><td class="names"></td>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def best_and_worst(run: Run) -> str:
    """Highest and lowest totals of the last evaluation: where a reward is fooled, it shows here."""
    if not run.evaluations:
        return ""
    last = run.evaluations[-1]
    ranked = sorted(
        (s for s in _shown(last.samples) if s.total is not None), key=lambda s: s.total or 0.0, reverse=True
    )
    if len(ranked) < 2:
        return ""
    count = min(EXTREMES, len(ranked) // 2)
    html = ""
    for title, note, samples in (
        ("Best samples", "Would you score them as high? If not, the reward can be fooled.", ranked[:count]),
        ("Worst samples", "What the model still gets wrong.", ranked[::-1][:count]),
    ):
        figures = "".join(_figure(s, f"step {last.step}", _caption(s)) for s in samples)
        html += f'<h2>{title}</h2><p>Step {last.step}. {note}</p><div class="shots">{figures}</div>'
    return html


def _pairs(first: Evaluation, last: Evaluation) -> list[tuple[Sample, Sample]]:
    before = {sample.key: sample for sample in first.samples}
    return [(before[s.key], s) for s in _one_per_prompt(_shown(last.samples)) if s.key in before]


def _shown(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Those with something to look at: of episodes only the first are filmed."""
    return [sample for sample in samples if sample.file or sample.text is not None] or samples


def _one_per_prompt(samples: Sequence[Sample]) -> list[Sample]:
    """All samples, reordered: the first of every prompt, then the second of every prompt, and so on."""
    seen: dict[str, int] = {}
    rounds = []
    for sample in samples:
        turn = seen[sample.key[0]] = seen.get(sample.key[0], -1) + 1
        rounds.append(turn)
    order = sorted(range(len(samples)), key=lambda index: (rounds[index], index))
    return [samples[index] for index in order]


def _parts(before: Sample, after: Sample) -> str:
    """Change of each reward that applies, where there is more than one."""
    changes = {name: (before.scores.get(name), value) for name, value in after.scores.items()}
    changes = {name: pair for name, pair in changes.items() if pair != (None, None)}
    if len(changes) < 2:
        return ""
    return " · ".join(f"{escape(name)} {number(old)} → {number(new)}" for name, (old, new) in changes.items())


def _caption(sample: Sample) -> str:
    scores = {name: value for name, value in sample.scores.items() if value is not None}
    parts = " · ".join(f"{escape(name)} {number(value)}" for name, value in scores.items())
    detail = f"<br>{parts}" if len(scores) > 1 else ""
    return f"<b>{number(sample.total)}</b> {escape(sample.prompt)}{detail}"


def _figure(sample: Sample, when: str, caption: str) -> str:
    return f"<figure>{_picture(sample, when)}<figcaption>{caption}</figcaption></figure>"


def _picture(sample: Sample, when: str) -> str:
    """The picture that was made; or the one that was asked about, marked, and what was written."""
    file = sample.file or sample.picture
    if file is None and sample.text is None:
        return '<div class="missing">no picture</div>'
    html = ""
    if file is not None:
        html = _element(file, escape(f"{sample.prompt or 'sample'}, {when}, score {number(sample.total)}", quote=True))
        html = f'<div class="marked">{html}{_drawn(sample.marks)}</div>' if sample.marks else html
    if sample.text is not None:
        html += f'<p class="written">{escape(sample.text) or "<i>(nothing)</i>"}</p>'
    return html


def _drawn(marks: Sequence[Mapping[str, Any]]) -> str:
    """Boxes and points over a picture; those of the ground truth are dashed."""
    shapes = []
    for mark in marks:
        kind = "true" if mark.get("label") == "true" else "predicted"
        if box := _fractions(mark.get("box"), 4):
            (left, right), (top, bottom) = sorted(box[::2]), sorted(box[1::2])
            size = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
            shapes.append(f'<rect class="{kind}" {size}/>')
        elif point := _fractions(mark.get("point"), 2):
            shapes.append(f'<circle class="{kind}" cx="{point[0]}" cy="{point[1]}" r="2.5"/>')
    return f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{"".join(shapes)}</svg>'


def _fractions(values: Any, count: int) -> list[float] | None:
    """Per cent of the picture, kept within it; None for anything but ``count`` finite numbers."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return None
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        return None
    return [round(100 * min(max(float(v), 0.0), 1.0), 2) for v in values]


def _element(path: Path, label: str) -> str:
    """What shows a picture, plays a film over and over, or has a button to play a sound."""
    if path.suffix == ".wav":
        return f'<audio controls src="{sound_uri(path, MAX_SOUND_BYTES)}" aria-label="{label}"></audio>'
    source, tiny = (film_uri(path, MAX_BYTES * 2), False) if path.suffix == ".mp4" else _embed(path)
    if source.startswith("data:video"):
        return f'<video autoplay loop muted playsinline src="{source}" aria-label="{label}"></video>'
    return f'<img src="{source}" alt="{label}"{" class=tiny" if tiny else ""}>'


def _embed(path: Path) -> tuple[str, bool]:
    """``src`` of the picture and whether it is so small that it should be enlarged without blur."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            picture.load()
            tiny = max(picture.size) <= TINY
            if getattr(picture, "n_frames", 1) > 1:
                return film_uri(path, MAX_BYTES * 2), tiny
            return data_uri(picture, MAX_SIDE, MAX_BYTES), tiny
    except (UnidentifiedImageError, OSError) as error:
        raise UserError(f"{path} is not a readable picture: {error}") from error
