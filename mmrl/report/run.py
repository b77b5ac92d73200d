"""A run folder, read back: metrics, evaluations with their pictures, summary and configuration."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mmrl.errors import UserError
from mmrl.metrics import METRICS_FILE, read_metrics

Points = list[tuple[int, float | None]]

DIVERSITY = ("eval/diversity", "eval/diversity/mean")


@dataclass
class Sample:
    """One output of an evaluation with its scores.

    Attributes:
        file: the picture that was made; None where there is none inside the run folder.
        text: what was written, and ``picture`` what it was written about.
        marks: boxes and points found in the picture, see :meth:`mmrl.scoring.Scorer.marks`.
    """

    file: Path | None
    prompt: str
    prompt_id: str
    seed: Any
    scores: dict[str, float | None]
    total: float | None
    text: str | None = None
    picture: Path | None = None
    marks: list[dict[str, Any]] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """Equal for the same prompt and seed at different evaluations."""
        return (self.prompt_id or self.prompt, str(self.seed))


@dataclass
class Evaluation:
    """The samples kept of one evaluation."""

    step: int
    samples: list[Sample]


@dataclass
class Run:
    """Everything a report draws on; see :func:`load_run`."""

    folder: Path
    training: list[dict[str, Any]]
    scores: list[dict[str, Any]]
    evaluations: list[Evaluation] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def series(self, name: str) -> Points:
        """``(step, value)`` of a training metric, with None for null; empty if it was never logged."""
        return _points(self.training, name)

    def score_series(self, name: str) -> Points:
        """``(step, value)`` of an evaluation metric."""
        return _points(self.scores, name)

    def interval(self, name: str) -> list[tuple[float, float] | None] | None:
        """Ends of the 95% interval of an evaluation metric at each of its points; None if it is no proportion."""
        base = name.removesuffix("/mean")
        low, high = (dict(self.score_series(f"{base}/{end}")) for end in ("low", "high"))
        steps = [step for step, _ in self.score_series(name)]
        return [None if low.get(step) is None else (low[step], high[step]) for step in steps] if low else None

    @property
    def names(self) -> list[str]:
        """Training metrics in the order they first appear."""
        return _names(self.training)

    @property
    def score_names(self) -> list[str]:
        """Evaluation metrics in the order they first appear."""
        return [name for name in _names(self.scores) if name.startswith("eval/")]

    @property
    def diversity(self) -> Points:
        """``(step, diversity)`` of the evaluations; empty if it is not among their rewards."""
        return self.score_series("eval/diversity/mean") or self.score_series("eval/diversity")

    @property
    def main_score(self) -> str | None:
        """The evaluation metric that the run is judged by: the total if it was logged, else the first mean."""
        names = self.score_names
        totals = [name for name in ("eval/reward", "eval/reward/mean") if name in names]
        means = [name for name in names if name.endswith("/mean") and name not in DIVERSITY]
        return next(iter(totals + means), None)

    @property
    def steps(self) -> tuple[int, int]:
        """First and last step of any line."""
        steps = [line["step"] for line in self.training + self.scores]
        return min(steps), max(steps)

    @property
    def stages(self) -> list[tuple[str, int]]:
        """``(name, first step)`` of each stage, in order; empty if the run has no more than one."""
        found: list[tuple[str, int]] = []
        for line in self.training:
            stage = line.get("stage")
            if stage is not None and (not found or found[-1][0] != str(stage)):
                found.append((str(stage), line["step"]))
        return found if len(found) > 1 else []


def load_run(folder: str | Path) -> Run:
    """Read a run folder; everything but a non-empty ``metrics.jsonl`` is optional.

    Raises:
        UserError: the folder or its metrics are missing, empty or broken, or another file in it is broken.
    """
    folder = Path(folder)
    lines = read_metrics(folder)
    if not lines:
        raise UserError(f"'{folder / METRICS_FILE}' has no complete line yet; train at least one step before a report")
    config_path = folder / "config.yaml"
    config_text = config_path.read_text(encoding="utf-8") if config_path.is_file() else ""
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError as error:
        raise UserError(f"{config_path} is not valid YAML: {str(error).splitlines()[0]}") from error
    return Run(
        folder=folder,
        training=[line for line in lines if not _is_evaluation(line)],
        scores=[line for line in lines if _is_evaluation(line)],
        evaluations=_evaluations(folder),
        summary=_read_json(folder / "summary.json", dict) or {},
        config_text=config_text,
        config=config if isinstance(config, dict) else {},
    )


def _is_evaluation(line: dict[str, Any]) -> bool:
    return any(key.startswith("eval/") for key in line)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _points(lines: list[dict[str, Any]], name: str) -> Points:
    return [(line["step"], _number(line[name])) for line in lines if name in line]


def _names(lines: list[dict[str, Any]]) -> list[str]:
    return [key for key in dict.fromkeys(key for line in lines for key in line) if key not in {"step", "stage"}]


def _read_json(path: Path, kind: type) -> Any:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} should hold a JSON {'object' if kind is dict else 'list'}")
    return value


def _evaluations(folder: Path) -> list[Evaluation]:
    found = []
    for path in folder.glob("eval/step-*/scores.json"):
        match = re.fullmatch(r"step-(\d+)", path.parent.name)
        if match:
            rows = _read_json(path, list)
            found.append(Evaluation(int(match[1]), [_sample(path, row) for row in rows]))
    return sorted((e for e in found if e.samples), key=lambda evaluation: evaluation.step)


def _sample(path: Path, row: Any) -> Sample:
    if not isinstance(row, dict):
        raise UserError(f"{path}: every entry should be an object with 'file', 'prompt' and 'scores', not {row!r}")
    scores = row.get("scores")
    return Sample(
        file=_inside(path.parent, row.get("file")),
        prompt=str(row.get("prompt") or ""),
        prompt_id=str(row.get("prompt_id") if row.get("prompt_id") is not None else ""),
        seed=row.get("seed"),
        scores={str(k): _number(v) for k, v in scores.items()} if isinstance(scores, dict) else {},
        total=_number(row.get("total")),
        text=row["text"] if isinstance(row.get("text"), str) else None,
        picture=_inside(path.parent, row.get("picture")),
        marks=[mark for mark in row.get("marks") or () if isinstance(mark, dict)],
    )


def _inside(folder: Path, name: Any) -> Path | None:
    """The named file if it exists in ``folder``: a page to be passed around must not embed files from elsewhere."""
    if not isinstance(name, str) or not name:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) and path.is_file() else None
