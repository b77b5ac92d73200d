"""How a run went, in plain words: the judgement at the top of the report."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass, field
from typing import Literal

from mmrl.report.charts import number
from mmrl.report.run import DIVERSITY, Evaluation, Points, Run

Level = Literal["good", "info", "warn", "bad"]

# Below this share of the first evaluation's diversity a run counts as collapsing.
DIVERSITY_KEPT = 0.7
# Rounding in bfloat16 moves a replayed ratio by less than this; a larger deviation is a fault.
RATIO_TOLERANCE = 0.02
CLIP_FRACTION_HIGH = 0.5
MAX_ADVICE = 4


@dataclass
class Finding:
    """One sentence about the run."""

    level: Level
    text: str


@dataclass
class Verdict:
    """The overall judgement, the findings behind it and what to try next."""

    level: Level
    label: str
    headline: str
    findings: list[Finding] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def add(self, level: Level, text: str, advice: str | None = None) -> None:
        """Append a finding and, where it calls for something, a piece of advice."""
        self.findings.append(Finding(level, text))
        if advice:
            self.advice.append(advice)


@dataclass
class Paired:
    """Change of the total score between two evaluations on the same prompts and seeds.

    Attributes:
        change: mean change per prompt.
        margin: half-width of its 95% interval over prompts; None for fewer than four prompts.
        better, worse, count: samples that rose, fell, and all that were compared.
    """

    change: float
    margin: float | None
    better: int
    worse: int
    count: int


def finite(points: Points) -> list[tuple[int, float]]:
    """The points that have a value."""
    return [(step, value) for step, value in points if value is not None]


def ends(points: Points) -> tuple[float, float] | None:
    """Means of the first and of the last tenth of a curve; None for fewer than four finite points."""
    values = [value for _, value in finite(points)]
    if len(values) < 4:
        return None
    part = max(2, len(values) // 10)
    return statistics.fmean(values[:part]), statistics.fmean(values[-part:])


def paired_change(first: Evaluation, last: Evaluation) -> Paired | None:
    """Compare two evaluations sample by sample; None if they share none with a total."""
    before = {sample.key: sample.total for sample in first.samples}
    by_prompt: dict[str, list[float]] = {}
    for sample in last.samples:
        start = before.get(sample.key)
        if start is not None and sample.total is not None:
            by_prompt.setdefault(sample.key[0], []).append(sample.total - start)
    if not by_prompt:
        return None
    # Seeds of one prompt are not independent of each other; prompts are.
    means = [statistics.fmean(changes) for changes in by_prompt.values()]
    changes = [change for group in by_prompt.values() for change in group]
    margin = 1.96 * statistics.stdev(means) / math.sqrt(len(means)) if len(means) >= 4 else None
    return Paired(
        change=statistics.fmean(means),
        margin=margin,
        better=sum(change > 1e-9 for change in changes),
        worse=sum(change < -1e-9 for change in changes),
        count=len(changes),
    )


def judge(run: Run) -> Verdict:
    """Weigh the held-out scores, signs of reward hacking and the health of the optimisation."""
    scores = finite(run.score_series(run.main_score)) if run.main_score else []
    reward = ends(_last_stage(run, "reward/mean"))
    verdict = _held_out(run, scores, reward)
    rose = verdict.label == "Improved"
    hacked = False
    if len(scores) >= 2:
        _steadiness(verdict, scores, rose)
        hacked = _hacking(run, verdict, reward, rose)
    _health(run, verdict)
    if hacked:
        verdict.level, verdict.label = "bad", "Reward hacking suspected"
    elif any(finding.level in {"warn", "bad"} for finding in verdict.findings) and verdict.level != "bad":
        verdict.level = "warn"
        verdict.label += ", with a warning" if rose else ""
    _closing_advice(verdict, scores, rose)
    verdict.advice = list(dict.fromkeys(verdict.advice))[:MAX_ADVICE]
    return verdict


def _held_out(run: Run, scores: list[tuple[int, float]], reward: tuple[float, float] | None) -> Verdict:
    if len(scores) < 2:
        if scores:
            step, value = scores[0]
            headline = f"One evaluation so far: the held-out score was {number(value)} at step {step}."
        else:
            headline = "There is no held-out evaluation in this run yet."
        if reward is not None:
            headline += f" The training reward went from {number(reward[0])} to {number(reward[1])}."
        advice = (
            "Evaluate at the start and every so often (trainer.eval_every): only held-out prompts tell improvement."
        )
        return Verdict("info", "Not judged yet", headline, advice=[advice])
    (_, before), (last_step, after) = scores[0], scores[-1]
    change = after - before
    paired = paired_change(run.evaluations[0], run.evaluations[-1]) if len(run.evaluations) > 1 else None
    margin = paired.margin if paired and paired.margin is not None else 0.02 * max(abs(before), abs(after))
    numbers = f"from {number(before)} to {number(after)} ({signed(change)})"
    if change > margin:
        verdict = Verdict("good", "Improved", f"The held-out score rose {numbers} in {last_step} steps.")
    elif change < -margin:
        verdict = Verdict("bad", "Got worse", f"The held-out score fell {numbers} in {last_step} steps.")
    else:
        verdict = Verdict("info", "No clear change", f"The held-out score did not clearly change: {numbers}.")
    if paired:
        spread = f" ± {number(paired.margin)} (95%)" if paired.margin is not None else ""
        verdict.add(
            "info",
            f"On the {paired.count} kept samples with the same prompts and seeds the score changed by "
            f"{signed(paired.change)}{spread}: {paired.better} rose, {paired.worse} fell, "
            f"{paired.count - paired.better - paired.worse} stayed.",
        )
    return verdict


def _steadiness(verdict: Verdict, scores: list[tuple[int, float]], rose: bool) -> None:
    if len(scores) < 3:
        return
    values = [value for _, value in scores]
    best_step, best = max(scores, key=lambda point: point[1])
    gain = best - values[0]
    if gain > 0 and best - values[-1] > max(0.2 * gain, 0.02 * abs(best)):
        verdict.add(
            "warn",
            f"The best evaluation was at step {best_step} ({number(best)}); by the end "
            f"{number((best - values[-1]) / gain * 100)}% of the gain was lost.",
            f"Use the checkpoint nearest to step {best_step}, and train again with a smaller trainer.lr.",
        )
    elif rose:
        falls = sum(b < a - 0.25 * gain for a, b in itertools.pairwise(values))
        rises = sum(b > a for a, b in itertools.pairwise(values))
        if falls == 0:
            verdict.add(
                "good", f"The rise was steady: {rises} of {len(values) - 1} evaluations were above the one before."
            )
        else:
            verdict.add("info", f"The rise was uneven: {falls} of {len(values) - 1} evaluations fell clearly back.")


def _hacking(run: Run, verdict: Verdict, reward: tuple[float, float] | None, rose: bool) -> bool:
    """Add what points to a reward that is satisfied without the task; True if training and held-out scores part."""
    clean, hacked = True, False
    if reward is not None:
        spreads = [value for _, value in finite(run.series("reward/std"))]
        # The trend of batch means is clear when it exceeds a tenth of the spread inside a batch.
        scale = 0.1 * statistics.fmean(spreads) if spreads else 0.0
        gain = reward[1] - reward[0]
        if gain > max(scale, 0.02 * abs(reward[0])) and not rose:
            clean, hacked = False, True
            verdict.add(
                "bad",
                f"Sign of reward hacking: the training reward rose ({signed(gain)}) while the held-out score "
                f"{'fell' if verdict.label == 'Got worse' else 'did not'}.",
                "Look at the best-scored samples below: do they deserve it? Raise algorithm.kl_coef or add a second "
                "reward that the trick does not satisfy, and train on more prompts.",
            )
    diversity = finite(run.diversity)
    if len(diversity) >= 2 and diversity[0][1] > 0:
        kept = diversity[-1][1] / diversity[0][1]
        if kept < DIVERSITY_KEPT:
            clean = False
            verdict.add(
                "bad" if kept < 0.5 else "warn",
                f"Diversity fell to {kept:.0%} of the start: outputs for one prompt are becoming alike, a sign of "
                "collapse or reward hacking.",
                "Keep diversity with a smaller trainer.lr, fewer steps or a larger algorithm.kl_coef.",
            )
        else:
            verdict.add("good", f"Diversity is at {kept:.0%} of the start.")
    for name in run.score_names:
        points = finite(run.score_series(name))
        if name in {run.main_score, *DIVERSITY} or not name.endswith("/mean") or len(points) < 2:
            continue
        spread = finite(run.score_series(name.removesuffix("/mean") + "/std"))
        scale = 0.25 * spread[0][1] if spread else 0.05 * abs(points[0][1])
        if rose and points[-1][1] < points[0][1] - scale:
            clean = False
            verdict.add(
                "warn",
                f"The total rose but its part '{_plain(name)}' fell from {number(points[0][1])} to "
                f"{number(points[-1][1])}.",
                f"Raise the weight of '{_plain(name)}', or normalise each reward by itself.",
            )
    if clean and rose and reward is not None:
        verdict.add("good", "No sign of reward hacking: training and held-out scores moved together.")
    return hacked


def _health(run: Run, verdict: Verdict) -> None:
    troubled = False
    for name in ("loss", "grad_norm", "reward/mean"):
        gaps = [step for step, value in run.series(name) if value is None]
        if gaps:
            troubled = True
            verdict.add(
                "bad",
                f"{name} was not finite in {len(gaps)} step{'s' if len(gaps) > 1 else ''} (first at step {gaps[0]}).",
                "Non-finite numbers: train in float32 or bf16 instead of fp16, and lower trainer.lr.",
            )
    ratio = [value for _, value in finite(run.series("ratio/max_abs_dev"))]
    if ratio and max(ratio) > RATIO_TOLERANCE:
        troubled = True
        verdict.add(
            "warn",
            f"Replayed rollouts do not reproduce their probabilities: the ratio of the first update is up to "
            f"{number(max(ratio))} away from 1, where 0 is exact.",
            "Check the replay: same precision and batch size in rollout and update, no dropout, no other randomness.",
        )
    clip = ends(run.series("ratio/clip_fraction"))
    if clip and clip[1] > CLIP_FRACTION_HIGH:
        troubled = True
        verdict.add(
            "warn",
            f"{clip[1]:.0%} of the decisions are clipped at the end: the updates outgrow the clip range.",
            "Lower trainer.lr or take fewer updates per rollout.",
        )
    norms = [value for _, value in finite(run.series("grad_norm"))]
    if len(norms) >= 8:
        median = statistics.median(norms)
        spikes = sum(value > 10 * median for value in norms) if median > 0 else 0
        if spikes:
            troubled = True
            verdict.add(
                "info" if spikes < 3 else "warn",
                f"The gradient norm spiked above ten times its median in {spikes} step{'s' if spikes > 1 else ''}.",
                "Lower trainer.max_grad_norm, so that a single step cannot undo many." if spikes >= 3 else None,
            )
    spread = ends(run.series("reward/std"))
    if spread and spread[1] < max(1e-6, 0.02 * spread[0]):
        troubled = True
        verdict.add(
            "warn",
            "Rewards have almost no spread any more, so there is next to nothing left to learn from.",
            "Use harder prompts or a finer reward: samples of one prompt must differ in score.",
        )
    if not troubled and ratio and norms:
        exact = "exactly 0" if max(ratio) == 0 else f"at most {number(max(ratio))}"
        clipped = f", {clip[1]:.1%} of decisions clipped" if clip else ""
        verdict.add("good", f"The optimisation looks healthy: replay deviation {exact}{clipped}, no gradient spikes.")


def _closing_advice(verdict: Verdict, scores: list[tuple[int, float]], rose: bool) -> None:
    if len(scores) < 2:
        return
    values = [value for _, value in scores]
    if rose and not verdict.advice:
        if len(values) >= 3 and values[-1] == max(values) and values[-1] - values[-2] > 0.1 * (values[-1] - values[0]):
            verdict.advice.append("The score was still rising at the end: more trainer.steps should help.")
        else:
            verdict.advice.append("The score has levelled off: try harder prompts, or keep this checkpoint.")
        verdict.advice.append("Repeat with another seed before trusting a small difference.")
    if verdict.label == "No clear change":
        verdict.advice.append(
            "Try a trainer.lr three times larger, a larger group_size, or more steps; and check that samples of one "
            "prompt get different rewards."
        )
    if verdict.label == "Got worse":
        verdict.advice.append("Train again with a trainer.lr three times smaller, and compare the pictures below.")


def _last_stage(run: Run, name: str) -> Points:
    """The metric within the last stage that logged it: means of different stages must not be compared."""
    lines = [line for line in run.training if name in line]
    stage = lines[-1].get("stage") if lines else None
    steps = {line["step"] for line in lines if line.get("stage") == stage}
    return [point for point in run.series(name) if point[0] in steps]


def _plain(name: str) -> str:
    return name.removeprefix("eval/").removesuffix("/mean")


def signed(value: float) -> str:
    """A change with its sign, as ``+0.12`` or ``-0.12`` with a real minus."""
    return f"+{number(value)}" if value > 0 else number(value).replace("-", "\u2212", 1)
