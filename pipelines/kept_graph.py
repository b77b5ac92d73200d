"""Sampling that keeps what the backward pass needs, so that the first update on a rollout costs no second forward.

While nothing has changed since the rollout, the forwards of its stochastic steps are those that the update would run
again. The loss is computed on copies of the recorded means; the gradient of the copies is then carried on through the
kept graphs, once for each call of the pipeline and step, however the loss was cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn


class KeptGraph:
    """The means of the latest rollout's decisions, with their graphs.

    Args:
        parameters: what trains; once a value has changed, nothing that was kept is used any more.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        self._first = self._next = 0
        self.forget()

    def forget(self) -> None:
        """Let go of what was kept: a new rollout begins."""
        self._calls: list[Sequence[Tensor]] = []
        self._copies: list[Tensor] = []
        self._first = self._next
        self._state = self._parameter_state()

    def keep(self, means: Sequence[Tensor]) -> Tensor:
        """Keep the means ``[n, ...]`` of all decisions of a pipeline call; returns numbers ``[n]`` for its rows."""
        numbers = self._next + torch.arange(len(means[0]))
        self._next += len(means[0])
        self._calls.append(means)
        return numbers

    def means(self, numbers: Tensor, columns: Sequence[int]) -> list[Tensor] | None:
        """Means ``[n, ...]`` of decisions ``columns`` of rows; None where the network must be asked again."""
        if int(numbers.min()) < self._first or self._state != self._parameter_state():
            return None
        if not self._copies:
            self._copies = [torch.cat(column).detach().requires_grad_() for column in zip(*self._calls, strict=True)]
        rows = (numbers - self._first).to(self._copies[0].device)
        return [self._copies[column][rows] for column in columns]

    def backward(self) -> None:
        """Carry the gradient of the copies on to the parameters, and let go of everything."""
        calls, copies = self._calls, self._copies
        self.forget()
        if not copies:
            return
        first = 0
        for means in calls:
            rows = slice(first, first + len(means[0]))
            for mean, copy in zip(means, copies, strict=True):
                # Calls whose groups are all without signal have nothing to carry on.
                if copy.grad is not None and copy.grad[rows].any():
                    mean.backward(copy.grad[rows])
            first = rows.stop

    def _parameter_state(self) -> list[tuple[int, int]]:
        return [(parameter.data_ptr(), parameter._version) for parameter in self.parameters]
