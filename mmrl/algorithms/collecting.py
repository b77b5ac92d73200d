"""Rolling out, scoring and splitting, as the online algorithms share it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmrl import distributed
from mmrl.advantages import AdvantageMethod, group_advantages
from mmrl.algorithms.base import Context
from mmrl.scoring import Scores
from mmrl.seeding import derive_seed
from mmrl.tally import Tally
from mmrl.types import Prompt, Rollout


def roll_out(context: Context, prompts: Sequence[Prompt], group_size: int, step: int, attempt: int = 0) -> Rollout:
    """``group_size`` samples per prompt; the seed depends on the stage's seed, the step and the attempt alone."""
    with context.clock("rollout"):
        seed = derive_seed(context.seed, "rollout", step, *([attempt] if attempt else []))
        return context.policy.rollout(prompts, group_size, seed, step)


def score(context: Context, rollout: Rollout, step: int, tally: bool = True) -> Scores:
    """Scores of a rollout; their statistics go to the tally."""
    with context.clock("reward"):
        scores = context.scorer(rollout.samples, step=step)
    if tally:
        tally_scores(context.tally, scores)
    return scores


def score_greedy(context: Context, rollout: Rollout, step: int) -> Tensor:
    """Total score ``[N]`` of the deterministic sampler's output for each row's prompt, made once per group."""
    group = rollout.group.cpu()
    firsts = [int((group == name).nonzero()[0]) for name in range(int(group.max()) + 1)]
    prompts = [rollout.samples.prompts[row] for row in firsts]
    with context.clock("rollout"):
        rows = numbers_of(slice(0, len(prompts)), len(prompts))
        samples = context.policy.generate(prompts, [derive_seed(context.seed, "greedy", step, row) for row in rows])
    with context.clock("reward"):
        total = context.scorer(samples, step=step).total.cpu()
    context.tally.spread("reward/greedy", total)
    return total[group]


def sample_advantages(scores: Tensor, group: Tensor, method: AdvantageMethod) -> Tensor:
    """Advantages ``[n]`` of this process's samples; statistics are those of all processes.

    Args:
        scores: ``[n]``; NaN where no reward applies, whose advantage is 0.
        group: long ``[n]``, numbered from 0.
        method: see :func:`mmrl.advantages.group_advantages`.
    """
    rank, groups, rows = distributed.rank(), int(group.max()) + 1, len(group)
    everyone = distributed.gather_rows(group + rank * groups)
    table = distributed.gather_rows(scores)
    return group_advantages(table, everyone.to(table.device), method)[rank * rows : (rank + 1) * rows]


def tally_scores(tally: Tally, scores: Scores) -> None:
    """Mean and spread of the total and of each reward, the share of samples it applies to and the seconds it took."""
    tally.spread("reward", scores.total)
    for name, values in scores.each.items():
        tally.spread(f"reward/{name}", values)
        tally.mean(f"reward/{name}/share", (~values.isnan()).float())
        tally.mean(f"reward/{name}/seconds", torch.tensor(scores.seconds[name]))


def row_chunks(rows: int, size: int) -> list[slice]:
    """``rows`` cut into contiguous slices of ``size``; the last may be shorter."""
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def numbers_of(rows: slice, count: int) -> range:
    """Numbers of some of this process's ``count`` rows within the batch of all processes; seeds are made from them."""
    first = distributed.rank() * count
    return range(first + rows.start, first + rows.stop)


def split_groups(group: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """Row indices of at most ``parts`` nearly equal sets of whole groups, in order."""
    names = group.unique_consecutive()
    return [torch.isin(group, part).nonzero().flatten() for part in names.tensor_split(parts)]
