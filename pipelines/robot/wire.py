"""Messages between a run and its environment workers: one of JSON and one of arrays, nothing pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from safetensors.numpy import load, save


def send(pipe: Connection, words: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Send what JSON can hold, and arrays by name."""
    pipe.send_bytes(json.dumps(words).encode())
    pipe.send_bytes(save({name: np.ascontiguousarray(value) for name, value in (arrays or {}).items()}))


def receive(pipe: Connection) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Wait for a message.

    Raises:
        EOFError, OSError: the other side is gone.
    """
    words = json.loads(pipe.recv_bytes())
    return words, load(pipe.recv_bytes())
