"""Finding weight files: on the disk, or in a repository of the Hugging Face hub."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmrl.errors import UserError, nearest

BUILTIN = Path(__file__).parent / "quickstart"
# The models that the quickstarts train lie beside their policies, but serve as judges too.
_SHIPPED = (BUILTIN, Path(__file__).parents[1] / "pipelines" / "quickstart")

# What the two readers raise for a file that is not theirs; the weights-only one trips anywhere in the bytes.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AssertionError)


def find_model(place: str) -> str:
    """``builtin:NAME`` as the folder of the model shipped with this package; anything else as it is.

    Raises:
        UserError: there is no such folder.
    """
    if not place.startswith("builtin:"):
        return place
    name = place.removeprefix("builtin:")
    shipped = {path.parent.name: path.parent for folder in _SHIPPED for path in sorted(folder.glob("*/config.json"))}
    if name not in shipped:
        raise UserError(f"model '{place}' is not shipped with this package{nearest(name, shipped)}")
    return str(shipped[name])


def find_file(place: str, option: str) -> Path:
    """The file that ``place`` names: a path, or ``"owner/repository:file"`` on the hub (kept in the hub's cache).

    Args:
        option: what the user calls it, for messages, e.g. ``"aesthetic: head"``.

    Raises:
        UserError: there is no such file.
    """
    if Path(place).expanduser().is_file():
        return Path(place).expanduser()
    repository, _, name = place.partition(":")
    if not name or repository.count("/") != 1:
        raise UserError(f"{option} is '{place}': there is no such file (or give 'owner/repository:file' on the hub)")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(hf_hub_download(repository, name))
    # Not found and not reachable are both kinds of OSError there.
    except (OSError, HFValidationError) as error:
        raise UserError(f"{option} is '{place}', which could not be had from the hub: {first_line(error)}") from error


def load_tensors(path: Path, option: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file read as weights only.

    Raises:
        UserError: the file is neither.
    """
    from safetensors.torch import load_file

    try:
        found = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except _UNREADABLE as error:
        raise UserError(f"{option}: '{path}' is not a file of weights: {first_line(error)}") from error
    if isinstance(found, dict):
        found = found.get("state_dict", found)
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UserError(f"{option}: '{path}' does not hold a table of tensors")
    return found


def first_line(error: BaseException) -> str:
    """The first line of an error's message: the rest of a library's would drown ours."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
