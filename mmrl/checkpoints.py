"""Checkpoints that are whole or not there: written under a temporary name, flushed, then renamed.

A checkpoint folder holds ``policy.safetensors`` (what trains), one ``snapshot-NAME.safetensors`` per named copy
(reference, average), ``optimizer.safetensors`` and ``state.json``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.policy import Parameters

FORMAT = 1


@dataclass
class TrainingState:
    """Where a run is: everything a resume needs besides tensors. All randomness derives from seed and step.

    Attributes:
        stage: index of the stage the run is in.
        step: training steps done over all stages.
        updates: optimiser steps done in this stage.
        seconds: training time so far.
        scaler: state of the fp16 gradient scaler, if there is one.
        algorithm: what the stage's algorithm carries from step to step, if anything.
    """

    stage: int = 0
    step: int = 0
    updates: int = 0
    seconds: float = 0.0
    scaler: dict[str, Any] | None = None
    algorithm: dict[str, Any] | None = None


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:06d}"


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def save(
    run_dir: Path,
    parameters: Parameters,
    optimizer: torch.optim.Optimizer,
    state: TrainingState,
    keep: int | None = None,
) -> Path:
    """Write ``checkpoints/step-NNNNNN`` and drop all but the newest ``keep``. A kill at any moment loses nothing old.

    A checkpoint of this step that is there already is left as it is: equal steps have equal states.
    """
    from safetensors.torch import save_file

    final = checkpoint_path(run_dir, state.step)
    partial = final.with_name(f".partial-{final.name}")
    discard_partial(run_dir)
    if final.exists():
        return final
    partial.mkdir(parents=True)

    save_file(_contiguous(parameters.state()), partial / "policy.safetensors")
    for name, copy in parameters.snapshots.items():
        save_file(_contiguous(copy), partial / f"snapshot-{name}.safetensors")
    tensors, plain = _split_optimizer(optimizer.state_dict())
    save_file(tensors, partial / "optimizer.safetensors")
    meta = {"format": FORMAT, "training": vars(state), "optimizer": plain}
    (partial / "state.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        _flush(path)
    _flush(partial)
    partial.rename(final)
    _flush(final.parent)
    if keep is not None:
        for old in checkpoints(run_dir)[:-keep]:
            _remove(old)
    return final


def load(path: Path, parameters: Parameters, optimizer: torch.optim.Optimizer | None = None) -> TrainingState:
    """Restore what :func:`save` wrote, in place.

    Raises:
        UserError: a file is missing or does not fit this policy.
    """
    from safetensors.torch import load_file

    for name in ("state.json", "policy.safetensors", "optimizer.safetensors"):
        if not (path / name).is_file():
            raise UserError(f"checkpoint {path} has no file {name}")
    try:
        meta = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {meta['format']}, this version reads {FORMAT}")
        parameters.load(load_file(path / "policy.safetensors"))
        parameters.snapshots = {
            file.stem.removeprefix("snapshot-"): _onto(load_file(file), parameters)
            for file in sorted(path.glob("snapshot-*.safetensors"))
        }
        if optimizer is not None:
            tensors = load_file(path / "optimizer.safetensors")
            optimizer.load_state_dict(_join_optimizer(tensors, meta["optimizer"]))
    except ValueError as error:
        raise UserError(f"checkpoint {path} does not fit this configuration: {error}") from error
    return TrainingState(**meta["training"])


def read_state(path: Path) -> TrainingState:
    """The training state of a checkpoint, without its tensors."""
    return TrainingState(**json.loads((path / "state.json").read_text(encoding="utf-8"))["training"])


def discard_partial(run_dir: Path) -> None:
    """Remove what a killed process left behind while writing or deleting."""
    for path in (run_dir / "checkpoints").glob(".partial-*"):
        shutil.rmtree(path)


def _onto(copy: dict[str, Tensor], parameters: Parameters) -> dict[str, Tensor]:
    return {key: tensor.to(parameters.named[key].device) for key, tensor in copy.items()}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    # Tied or viewed tensors must not share storage in a safetensors file.
    return {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}


def _split_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as flat tensors ``"parameter.entry"`` and the JSON-able rest."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for key, value in entries.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{key}"] = value
    return _contiguous(tensors), {"numbers": numbers, "param_groups": state["param_groups"]}


def _join_optimizer(tensors: dict[str, Tensor], plain: dict[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {}
    for name, value in [*tensors.items(), *plain["numbers"].items()]:
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    return {"state": state, "param_groups": plain["param_groups"]}


def _remove(path: Path) -> None:
    """Delete a folder so that a half-deleted one never bears a checkpoint's name."""
    doomed = path.with_name(f".partial-removing-{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
