"""Rollouts whose samples share their first steps: trees of denoising paths.

A step that a path splits at calls the network once for all its branches, and so does its replay: the samples of a tree
are rows of a rollout like any others, with ``Rollout.branch`` to say which of them took a step together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.seeding import derive_seed, generator, prompt_keys
from mmrl.types import Prompt, Rollout, Samples
from pipelines.scheduler_seam import Kernel, Sample
from pipelines.step_kernel import step_mean
from pipelines.trace import Trace

if TYPE_CHECKING:
    from pipelines.diffusion import DiffusionPolicy


@dataclass(frozen=True)
class Branching:
    """How the samples of a prompt share their first steps.

    Attributes:
        shape: in a ``tree`` every path splits at certain steps, and all stochastic steps are noisy (BranchGRPO,
            arXiv:2509.06040; Dynamic-TreeRPO, arXiv:2509.23352). A ``fan`` is one path without noise, which samples
            leave with one noisy step, equally many at each stochastic step, and go on without noise; those that leave
            together are a group of their own (trajectory branching of TempFlow-GRPO, arXiv:2508.04324).
        width: paths that one splits into, in a tree.
        at: where a tree splits: at ``all`` stochastic steps, the ``first`` of them, or the steps of a list.
    """

    shape: Literal["tree", "fan"] = "tree"
    width: Annotated[int, Field(ge=2)] = 2
    at: Literal["all", "first"] | list[int] = "all"

    def splits(self, stochastic: Sequence[int]) -> tuple[int, ...]:
        """The steps at which paths split or are left.

        Raises:
            UserError: a step of the list is not stochastic.
        """
        if self.shape == "fan" or self.at == "all":
            return tuple(stochastic)
        if self.at == "first":
            return tuple(stochastic[:1])
        if wrong := sorted(set(self.at) - set(stochastic)):
            raise UserError(f"branching.at has step {wrong[0]}, but the stochastic steps are {list(stochastic)}")
        return tuple(sorted(set(self.at)))

    def samples(self, stochastic: Sequence[int]) -> int:
        """A group size must be a multiple of this."""
        steps = len(self.splits(stochastic))
        return steps if self.shape == "fan" else self.width**steps


@dataclass
class Split(Sample):
    """Sampling that, at some steps, also draws several next states for each row; the row itself goes on as it would.

    Attributes:
        drawn: for each of these steps the generators of what is drawn, equally many for each row, rows in order.
        children: what came of it.
    """

    drawn: Mapping[int, Sequence[torch.Generator]] = field(default_factory=dict)
    children: dict[int, Children] = field(default_factory=dict)

    def take(self, index: int, x: Tensor, output: Tensor, dtype: torch.dtype) -> Tensor:
        if index in self.drawn:
            c = self.grid.coefficients(index, self.kernel, stochastic=True)
            copies = len(self.drawn[index]) // len(x)
            mean = step_mean(*self.grid.endpoints(index, x, output), c).repeat_interleave(copies, 0)
            after, logp = self.kernel.draw(mean, c, self.drawn[index], dtype)
            self.children[index] = Children(x.repeat_interleave(copies, 0), after, logp, mean, c.C)
        return super().take(index, x, output, dtype)


@dataclass
class Children:
    """Next states ``[M, ...]`` drawn at one step, the states before it, their log-probs ``[M]``, means and one std."""

    before: Tensor
    after: Tensor
    logp: Tensor
    mean: Tensor
    std: float


def branched_rollout(
    policy: DiffusionPolicy,
    branching: Branching,
    prompts: Sequence[Prompt],
    group_size: int,
    seed: int,
    stochastic: Sequence[int],
    kernel: Kernel,
) -> Rollout:
    """``group_size`` samples per prompt that share steps; see :meth:`pipelines.diffusion.DiffusionPolicy.rollout`.

    All noise is a function of ``seed``, prompt and the place in the tree. A replay has the rollout's batch shapes, and
    so equals it bit for bit, when ``batch_size`` is a multiple of the samples of a tree, or at most those of a fan.

    Raises:
        UserError: the group size does not fit the branching.
    """
    each = branching.samples(stochastic)
    if group_size % each:
        what = f"a {branching.shape} here has {each} samples, or a multiple"
        raise UserError(f"group_size {group_size} does not fit pipeline.branching: {what}")
    if branching.shape == "fan":
        return _fan(policy, prompts, group_size // each, seed, stochastic, kernel)
    keys = list(prompt_keys(prompts))
    roots = [(g, k) for g in range(len(prompts)) for k in range(group_size // each)]
    many = max(1, policy.batch_size // each)
    parts = []
    for some in (roots[begin : begin + many] for begin in range(0, len(roots), many)):
        starts = [derive_seed(seed, "start", *keys[g], 0 if policy.same_noise else k) for g, k in some]
        names = [derive_seed(seed, "root", *keys[g], k) for g, k in some]
        root = _roots([prompts[g] for g, _ in some], torch.tensor([g for g, _ in some]), starts)
        parts.append(_tree(policy, root, names, stochastic, branching, kernel))
    return Rollout.cat(parts)


def _tree(
    policy: DiffusionPolicy,
    root: Rollout,
    names: Sequence[int],
    stochastic: Sequence[int],
    branching: Branching,
    kernel: Kernel,
) -> Rollout:
    path, begin = root, 0
    for split in branching.splits(stochastic):
        inner = [step for step in stochastic if begin <= step < split]
        found = _draw(policy, path, names, kernel, inner, begin, (split,), branching.width)[split]
        again = torch.arange(len(path)).repeat_interleave(branching.width)
        path, begin = _joined(path[again], found), split + 1
        names = path.branch[:, -1].tolist()
    prompts, starts = path.samples.prompts, path.trace.seeds.tolist()
    noises = [derive_seed(name, "onwards") for name in names]
    later = [step for step in stochastic if step >= begin]
    leaves = policy._sample(prompts, path.group, starts, noises, later, begin, path.trace.states[:, -1], kernel=kernel)
    branch = torch.tensor(names)[:, None].expand(-1, len(later))
    return _joined(path, replace(leaves, branch=branch))


def _fan(
    policy: DiffusionPolicy,
    prompts: Sequence[Prompt],
    copies: int,
    seed: int,
    steps: Sequence[int],
    kernel: Kernel,
) -> Rollout:
    drawn: list[dict[int, Rollout]] = []
    for g, key in enumerate(prompt_keys(prompts)):
        # One at a time, as a replay of one group runs it.
        root = _roots([prompts[g]], torch.tensor([g]), [derive_seed(seed, "start", *key, 0)])
        drawn.append(_draw(policy, root, [derive_seed(seed, "root", *key, 0)], kernel, (), 0, steps, copies))
    found = []
    for place, step in enumerate(steps):
        path = Rollout.cat([rollouts[step] for rollouts in drawn])
        group, starts = path.group * len(steps) + place, path.trace.seeds.tolist()
        x = path.trace.states[:, -1]
        ends = policy._sample(path.samples.prompts, group, starts, starts, (), step + 1, x, kernel=kernel)
        found.append(_joined(path, replace(ends, branch=torch.zeros(len(ends), 0, dtype=torch.long))))
    everything = Rollout.cat(found)
    return everything[everything.group.argsort(stable=True)]


def _roots(prompts: list[Prompt], group: Tensor, starts: Sequence[int]) -> Rollout:
    """Paths that have not begun."""
    none = torch.zeros(len(prompts), 0)
    trace = Trace(none, none.long(), none.long(), none.double(), torch.tensor(starts))
    samples = Samples(prompts, group=group)
    return Rollout(samples, none, none.bool(), group, trace, std=none, branch=none.long())


def _draw(
    policy: DiffusionPolicy,
    paths: Rollout,
    names: Sequence[int],
    kernel: Kernel,
    inner: Sequence[int],
    begin: int,
    steps: Sequence[int],
    copies: int,
) -> dict[int, Rollout]:
    """Run each path on from ``begin``, and draw ``copies`` next states at each of ``steps``.

    Args:
        paths: M rows.
        names: of the paths; their noise is a function of these.
        inner: steps before that add noise to the paths themselves.

    Returns:
        For each step the decisions since ``begin`` of ``M * copies`` rows, without pictures.
    """
    prompts, starts = paths.samples.prompts, paths.trace.seeds.tolist()
    found: dict[int, list[Rollout]] = {step: [] for step in steps}
    order: list[int] = []
    everything = policy.keep_states == "all"
    around = {position for step in inner for position in (step, step + 1)}
    for rows in policy._batches(prompts, policy.train):
        children = {s: [derive_seed(names[i], s, k) for i in rows for k in range(copies)] for s in steps}
        plan = Split(
            kernel,
            inner,
            [generator(names[i], "onwards") for i in rows],
            begin,
            steps[-1] + 1,
            record=None if everything else frozenset(around),
            keep_mean=policy.keep_mean,
            drawn={s: [torch.Generator().manual_seed(name) for name in children[s]] for s in steps},
        )
        x = None if begin == 0 else paths.trace.states[rows, -1]
        policy.seam.run([prompts[i] for i in rows], policy.train, plan, [starts[i] for i in rows], x)
        again = torch.arange(len(rows)).repeat_interleave(copies)
        for step in steps:
            mine = paths[torch.tensor(rows)[again]]
            parents = [[names[rows[i]]] * len(inner) for i in again.tolist()]
            branch = [[*before, name] for before, name in zip(parents, children[step], strict=True)]
            kept = range(begin, step) if everything else sorted(around - {step})
            found[step].append(_decided(plan, mine, again, kept, inner, step, torch.tensor(branch)))
        order += [i * copies + k for i in rows for k in range(copies)]
    back = torch.tensor(order).argsort()
    return {step: Rollout.cat(parts)[back] for step, parts in found.items()}


def _decided(
    plan: Split, paths: Rollout, again: Tensor, kept: Sequence[int], inner: Sequence[int], step: int, branch: Tensor
) -> Rollout:
    """The decisions that led to what was drawn at ``step``; row k came of the plan's row ``again[k]``.

    ``kept`` are the positions before ``step`` whose states stay in the trace.
    """
    drawn, rows = plan.children[step], again.to(plan.children[step].logp.device)
    logp = torch.stack([*(logp[rows] for logp in plan.logp), drawn.logp], 1)
    mean = torch.stack([*(mean[rows] for mean in plan.mean), drawn.mean], 1) if plan.keep_mean else None
    std = torch.tensor([*plan.std, drawn.std], device=logp.device).expand_as(logp)
    steps = [*inner, step]
    trace = Trace(
        torch.stack([*(plan.states[position][rows] for position in kept), drawn.before, drawn.after], 1),
        torch.tensor([*kept, step, step + 1]).expand(len(again), -1),
        torch.tensor(steps).expand(len(again), -1),
        torch.tensor([plan.kernel.level(s) for s in steps], dtype=torch.float64).expand(len(again), -1),
        paths.trace.seeds,
    )
    mask = torch.ones_like(logp, dtype=torch.bool)
    return Rollout(paths.samples, logp, mask, paths.group, trace, mean, std=std, branch=branch)


def _joined(path: Rollout, then: Rollout) -> Rollout:
    """The same rows with the decisions of ``then`` after those of ``path``."""
    if not path.logp.shape[1]:
        return then
    first, second = path.trace, then.trace
    # What one ends with, the other may begin with.
    kept = first.positions.shape[1] - int(first.positions[0, -1] == second.positions[0, 0])
    trace = replace(
        second,
        states=torch.cat([first.states[:, :kept].to(second.states.device), second.states], 1),
        positions=torch.cat([first.positions[:, :kept], second.positions], 1),
        steps=torch.cat([first.steps, second.steps], 1),
        noise=torch.cat([first.noise, second.noise], 1),
    )
    columns = {}
    for name in ("logp", "mask", "mean", "std", "branch"):
        parts = [part for part in (getattr(path, name), getattr(then, name)) if part is not None]
        columns[name] = torch.cat(parts, 1) if parts else None
    return replace(then, trace=trace, **columns)
