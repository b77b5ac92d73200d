"""Numbers of a run: one JSON object per line in ``metrics.jsonl``, mirrored to TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmrl.errors import UserError

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends metrics to a run folder. Make one, on the main process only.

    Args:
        run_dir: the run's folder; made if missing. A half-written last line of an earlier, killed run is removed.
        tensorboard: also write event files to ``run_dir/tensorboard``.
        wandb_project: also log to this Weights & Biases project; the key comes from the environment only.
        config: the resolved configuration, shown by Weights & Biases.

    Raises:
        UserError: Weights & Biases is asked for but not installed or without a key.
    """

    def __init__(
        self,
        run_dir: str | Path,
        tensorboard: bool = False,
        wandb_project: str | None = None,
        config: dict | None = None,
    ):
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.path = self.run_dir / METRICS_FILE
        self.tensorboard = tensorboard
        self._events: Any = None
        self._purge_step: int | None = None
        self._wandb = _start_wandb(wandb_project, self.run_dir, config or {}) if wandb_project else None
        if self.path.exists():
            self._keep_up_to(math.inf)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line ``{"step": step, **values}``; it is on the disk when this returns.

        Non-finite numbers are written as null, so that a gap is visible and the line stays valid JSON. Strings
        (such as the name of a stage) are kept in the file and not sent to the mirrors.
        """
        clean = {key: _jsonable(value) for key, value in values.items()}
        line = json.dumps({"step": int(step), **clean}, allow_nan=False, ensure_ascii=False)
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        numbers = {key: value for key, value in clean.items() if isinstance(value, (int, float))}
        if self.tensorboard:
            self._write_events(int(step), numbers)
        if self._wandb is not None:
            self._wandb.log({**numbers, "step": int(step)})

    def rewind(self, step: int) -> None:
        """Drop every line with a larger step, as if the run had just finished ``step``. Call before resuming."""
        self._file.close()
        self._keep_up_to(step)
        self._file = self.path.open("a", encoding="utf-8")
        if self._events is not None:
            self._events.close()
            self._events = None
        self._purge_step = step + 1

    def close(self) -> None:
        """Close the file and the mirrors."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep_up_to(self, step: float) -> None:
        before = self.path.read_bytes()
        kept = b"".join(
            line
            for number, line in enumerate(before.splitlines(keepends=True), 1)
            if line.endswith(b"\n") and _parse(self.path, line, number)["step"] <= step
        )
        if kept == before:
            return
        temporary = self.path.with_name(METRICS_FILE + ".tmp")
        with temporary.open("wb") as file:
            file.write(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)

    def _write_events(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._events is None:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step tells TensorBoard to hide what a killed run logged after the step we resume from.
            self._events = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._purge_step)
        for key, value in numbers.items():
            self._events.add_scalar(key, value, step)
        self._events.flush()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All lines of a run in the order written; nulls are ``None``; a half-written last line is left out.

    Raises:
        UserError: there is no such folder or file, or a line before the last is not a JSON object with a step.
    """
    path = Path(run_dir) / METRICS_FILE
    if not Path(run_dir).is_dir():
        raise UserError(f"run folder '{run_dir}' does not exist")
    if not path.is_file():
        raise UserError(f"'{run_dir}' is not a run folder: it has no {METRICS_FILE}")
    lines = path.read_bytes().splitlines(keepends=True)
    return [_parse(path, line, number) for number, line in enumerate(lines, 1) if line.endswith(b"\n") and line.strip()]


def _parse(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not valid JSON ({error})") from error
    if not isinstance(value, dict) or not isinstance(value.get("step"), int):
        raise UserError(f"{path}, line {number}: expected a JSON object with an integer 'step'")
    return value


def _jsonable(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _start_wandb(project: str, run_dir: Path, config: dict) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logging to Weights & Biases was asked for but its package is missing: pip install 'mmrl[wandb]'"
        ) from error
    if not os.environ.get("WANDB_API_KEY") and os.environ.get("WANDB_MODE") not in {"offline", "disabled"}:
        raise UserError("Weights & Biases needs the environment variable WANDB_API_KEY (or WANDB_MODE=offline)")
    # The id is kept beside the run, so that a resumed run continues the same curves.
    id_file = run_dir / "wandb_id.txt"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run = wandb.init(
        project=project,
        name=run_dir.name,
        id=id_file.read_text(encoding="utf-8").strip(),
        resume="allow",
        dir=str(run_dir),
        config=config,
    )
    # Our own step axis: after a resume, steps that a killed run had already sent are simply sent again.
    run.define_metric("*", step_metric="step")
    return run
