"""Running statistics and timings of one training step."""

from __future__ import annotations

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from mmrl.distributed import exchange_device, gather_values, world_size


class Tally:
    """Collects weighted means and maxima by name over micro-batches, then over processes.

    Tensors stay on their device until :meth:`result`, so that a GPU is not made to wait.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}
        self._maxima: dict[str, Tensor] = {}

    def mean(self, name: str, values: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add ``values`` with ``weight`` (same shape, or one number for all)."""
        values = values.detach().double()
        weight = torch.as_tensor(weight, device=values.device).double().expand_as(values)
        total, count = (values * weight).sum(), weight.sum()
        if name in self._sums:
            total, count = total + self._sums[name][0], count + self._sums[name][1]
        self._sums[name] = (total, count)

    def spread(self, name: str, values: Tensor) -> None:
        """Add ``values`` (NaN ones left out) to ``name/mean`` and ``name/std``, the population standard deviation."""
        values = values.detach().double()
        known = (~values.isnan()).double()
        values = values.nan_to_num(nan=0.0)
        self.mean(f"{name}/mean", values, known)
        self.mean(f"{name}/mean_square", values.square(), known)

    def max(self, name: str, values: Tensor) -> None:
        """Keep the largest of ``values``."""
        value = values.detach().double().max()
        self._maxima[name] = torch.maximum(value, self._maxima[name]) if name in self._maxima else value

    def result(self) -> dict[str, float]:
        """Name to mean or maximum over everything added, in all processes.

        Processes may have added to different names: one all of whose groups are silent computes no loss. A name whose
        weights add up to nothing is left out.
        """
        sums, maxima = self._sums, self._maxima
        if world_size() > 1:
            sums, maxima = self._over_processes()
        out = {name: (total / count).item() for name, (total, count) in sums.items() if count > 0}
        out |= {name: value.item() for name, value in maxima.items()}
        for name in [name for name in out if name.endswith("/mean_square")]:
            base = name.removesuffix("/mean_square")
            out[f"{base}/std"] = math.sqrt(max(out.pop(name) - out[f"{base}/mean"] ** 2, 0.0))
        return out

    def _over_processes(self) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
        """The sums and maxima of all processes, in one exchange each."""
        everyone = gather_values((list(self._sums), list(self._maxima)))
        means, tops = (list(dict.fromkeys(name for part in everyone for name in part[kind])) for kind in (0, 1))
        device = exchange_device()
        zero, lowest = torch.zeros((), dtype=torch.float64), torch.tensor(-math.inf, dtype=torch.float64)
        sums = [torch.stack([part.to(device) for part in self._sums.get(name, (zero, zero))]) for name in means]
        maxima = [self._maxima.get(name, lowest).to(device) for name in tops]
        if sums:
            table = torch.stack(sums)
            dist.all_reduce(table)
            sums = list(table)
        if maxima:
            row = torch.stack(maxima)
            dist.all_reduce(row, dist.ReduceOp.MAX)
            maxima = list(row)
        return dict(zip(means, [(pair[0], pair[1]) for pair in sums], strict=True)), dict(
            zip(tops, maxima, strict=True)
        )


class Clock:
    """Seconds spent in named phases; phases may nest, an inner one's time is taken from the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = _now()
        self._open.append(phase)
        try:
            yield
        finally:
            spent = _now() - start
            self._open.pop()
            self.seconds[phase] += spent
            if self._open:
                self.seconds[self._open[-1]] -= spent

    def take(self) -> dict[str, float]:
        """``{"time/<phase>": seconds}`` since the last call, and start anew."""
        out = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        self.seconds.clear()
        return out


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
