"""Where the time of a piece of training goes: which network, with or without gradient, and everything else."""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

OTHER = "everything else"


class Meter:
    """Times every call of a pipeline's networks and every backward while it is :meth:`running`.

    A denoiser forward without gradient is a ``reference`` one when its adapters are off and a ``rollout`` one
    otherwise, unless it runs within :meth:`phase`, whose name it then takes. The denoiser must have its adapters
    already. Times are CPU seconds of this process, which a busy machine disturbs less than the clock on the wall.
    """

    def __init__(self, pipe: Any):
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.pipe = pipe
        self._adapter = next(module for module in pipe.transformer.modules() if isinstance(module, BaseTunerLayer))
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter = Counter()
        self.rows: Counter = Counter()
        self._phase: str | None = None

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Denoiser forwards without gradient count as ``name`` inside."""
        outer, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = outer

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Count and time what happens inside, from zero; afterwards ``wall``, ``cpu`` and ``seconds`` are set."""
        self.seconds.clear()
        self.calls.clear()
        self.rows.clear()
        pipe = self.pipe
        encoders = [value for name, value in pipe.components.items() if name.startswith("text_encoder") and value]
        with contextlib.ExitStack() as stack:
            timed = [(pipe.transformer, "forward", self._forward_kind), (torch.Tensor, "backward", "update: backward")]
            timed += [(pipe.vae, "decode", "decode")] + [(encoder, "forward", "text") for encoder in encoders]
            for owner, name, kind in timed:
                stack.enter_context(mock.patch.object(owner, name, self._timed(getattr(owner, name), kind)))
            wall, cpu = time.perf_counter(), time.process_time()
            yield
            self.wall, self.cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.seconds[OTHER] = self.cpu - sum(self.seconds.values())

    def _forward_kind(self) -> str:
        if torch.is_grad_enabled():
            return "update: forward"
        return self._phase or ("reference" if self._adapter.disable_adapters else "rollout")

    def _timed(self, function: Any, kind: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            name = kind() if callable(kind) else kind
            start = time.process_time()
            result = function(*args, **kwargs)
            self.seconds[name] += time.process_time() - start
            self.calls[name] += 1
            batch = next((v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)), None)
            self.rows[name] += len(batch) if batch is not None and batch.ndim else 0
            return result

        return timed
