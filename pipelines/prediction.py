"""What a pipeline's network predicts at any noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrl.types import Prompt
from pipelines.scheduler_seam import Velocity
from pipelines.seam import Call, Seam


class Prediction:
    """The network's predictions for rows that share a pipeline call, one noise level a row.

    Some pipelines take one time a call; that is found out at the first rows of different times.
    """

    def __init__(self, seam: Seam):
        self.seam = seam
        self._times_per_row: bool | None = None

    def __call__(self, prompts: Sequence[Prompt], x: Tensor, time: Tensor, call: Call) -> Tensor:
        """Prediction for rows that share a pipeline call."""
        distinct = time.unique()
        if len(distinct) == 1:
            return self._predict(prompts, x, distinct[0], call)
        if self._times_per_row is None:
            self._times_per_row = self._try_times_per_row(prompts, x, time, call)
        if self._times_per_row:
            return self._predict(prompts, x, time, call)
        rows = [(time == t).nonzero().flatten().tolist() for t in distinct]
        parts = [
            self._predict([prompts[i] for i in part], x[part], t, call) for part, t in zip(rows, distinct, strict=True)
        ]
        order = torch.tensor([i for part in rows for i in part])
        return torch.cat(parts)[order.argsort().to(x.device)]

    def _predict(self, prompts: Sequence[Prompt], x: Tensor, time: Tensor, call: Call) -> Tensor:
        plan = Velocity(time)
        self.seam.run(prompts, call, plan, [0] * len(prompts), x, torch.is_grad_enabled())
        return plan.output

    @torch.no_grad()
    def _try_times_per_row(self, prompts: Sequence[Prompt], x: Tensor, time: Tensor, call: Call) -> bool:
        """Whether this pipeline's code passes a timestep per row through to its network, found out once."""
        try:
            together = self._predict(prompts, x, time, call)
        except (RuntimeError, TypeError, ValueError):
            return False
        alone = torch.cat([self._predict(prompts[i : i + 1], x[i : i + 1], time[i], call) for i in range(len(x))])
        return bool((together - alone).abs().max() <= 1e-2 * alone.abs().max())
