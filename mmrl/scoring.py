"""From samples to rewards: calls the reward functions, checks what they return and combines it.

A wrong score silently trains a wrong model, so nothing is repaired here: a reward that raises, takes too long or
returns something that is not a finite number per sample stops the run with the sample named.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from mmrl.dialogue import said
from mmrl.errors import UserError
from mmrl.types import Samples


class Reward(Protocol):
    """Scores samples. Any callable will do; the attributes are optional.

    Attributes:
        name: under which it is reported; default the name of the function or class.
        differentiable: gradients flow from the scores to ``samples.images``; default False.
        partial: NaN in a returned tensor means "does not apply to this sample"; default False, where NaN is an error.
            In a returned list ``None`` always means that, and NaN is always an error.
    """

    name: str
    differentiable: bool
    partial: bool

    def __call__(self, samples: Samples) -> Tensor | Sequence[float | None]:
        """One score per sample ``[N]``, higher is better."""


class RewardError(UserError):
    """A reward failed; says which, on which sample and why."""


class _OutOfTime(Exception):
    """Not the built-in TimeoutError, which a reward may raise for reasons of its own."""


@dataclass(frozen=True)
class LinearWeight:
    """A weight that moves from ``start`` to ``end`` in ``steps`` training steps and stays there.

    Attributes:
        start: weight at step 0.
        end: weight at step ``steps`` and after.
        steps: positive.
    """

    start: float
    end: float
    steps: Annotated[int, Field(gt=0)]

    def at(self, step: int) -> float:
        """The weight at training step ``step``; a function of nothing else, so there is no state to checkpoint."""
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


def at_step(weight: float | LinearWeight, step: int) -> float:
    """The weight at training step ``step``."""
    return weight.at(step) if isinstance(weight, LinearWeight) else weight


@dataclass(frozen=True)
class Term:
    """One reward of a sum and how it enters: ``value = clamp(scale * score + offset, *clip)``, times ``weight``.

    Attributes:
        reward: the callable.
        name: for reports; default the reward's own name. Two uses of one reward need different names.
        weight: of the value in the sum; a number or a :class:`LinearWeight`. 0 only reports it.
        scale, offset: bring a score to the range of the others, e.g. ``scale=1 / 26`` for PickScore.
        clip: lowest and highest value.
        gate: the *score* (before scale) that a sample must exceed. One that does not gets value 0 for every reward
            that applies to it, so its total is 0: use it with rewards that are never negative.
        timeout: seconds one call may take; None is no limit.
        tasks: only for samples whose prompt has one of these as its ``task``; to others the reward does not apply, and
            it is not shown them. None is all.
    """

    reward: Callable[[Samples], Any]
    name: str = ""
    weight: float | LinearWeight = 1.0
    scale: float = 1.0
    offset: float = 0.0
    clip: tuple[float, float] | None = None
    gate: float | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    tasks: list[str] | None = None


@dataclass(eq=False)
class Scores:
    """What :class:`Scorer` returns; every tensor is float32 on the device of the images.

    Attributes:
        total: ``[N]`` weighted sum; NaN for a sample to which no reward of the sum applies.
        values: ``[N, K]`` per reward after scale, clip and gates; NaN where it does not apply.
        weights: ``[K]`` at this step.
        each: name to the raw scores ``[N]``.
        seconds: name to the time its call took.
    """

    total: Tensor
    values: Tensor
    weights: Tensor
    each: dict[str, Tensor]
    seconds: dict[str, float]

    def metrics(self, prefix: str = "reward") -> dict[str, float]:
        """``prefix/mean`` and ``prefix/std`` of the total, and ``prefix/<name>/mean|std|seconds`` of each raw reward.

        Taken over the samples to which the reward applies; the spread is the population standard deviation. A reward
        that applies to none is left out, one that applies to some also reports ``prefix/<name>/share``.
        """
        out = spread(prefix, self.total.detach())
        for name, scores in self.each.items():
            scores = scores.detach()
            out |= spread(f"{prefix}/{name}", scores)
            missing = scores.isnan()
            if missing.any():
                out[f"{prefix}/{name}/share"] = 1 - missing.float().mean().item()
            out[f"{prefix}/{name}/seconds"] = self.seconds[name]
        return out


def _check_media(samples: Samples) -> None:
    """A broken picture must not get a score: as a black one it would, say, compress well."""
    for kind, media in (("picture", samples.images), ("video", samples.videos)):
        if media is None:
            continue
        # One broken pixel breaks the sum, which is cheaper than a look at each.
        broken = ~media.detach().flatten(1).sum(1, dtype=torch.float32).isfinite()
        if broken.any():
            where = describe_sample(samples, int(broken.nonzero()[0]))
            raise RewardError(
                f"the {kind} of {where} holds NaN or infinite values ({int(broken.sum())} of {len(samples)} do), so no "
                "reward can score it: the model has diverged or its number type overflows"
            )


def _detach(media: Tensor | None) -> Tensor | None:
    return None if media is None else media.detach()


def spread(prefix: str, scores: Tensor) -> dict[str, float]:
    """``prefix/mean`` and ``prefix/std`` (of the population) of the scores that are not NaN; nothing if all are."""
    scores = scores[~scores.isnan()].double()
    if not len(scores):
        return {}
    return {f"{prefix}/mean": scores.mean().item(), f"{prefix}/std": scores.std(correction=0).item()}


class Scorer:
    """A weighted sum of rewards.

    Args:
        terms: the rewards, at least one. A bare callable is a term of weight 1.

    Raises:
        UserError: no terms, two of the same name, a clip range that is upside down, or an empty list of tasks.
    """

    def __init__(self, terms: Iterable[Term | Callable[[Samples], Any]]):
        self.terms = {}
        for term in terms:
            term = term if isinstance(term, Term) else Term(term)
            name = term.name or reward_name(term.reward)
            if name in self.terms:
                raise UserError(f"two rewards are called '{name}': give one of them another name (name: ...)")
            if term.clip is not None and term.clip[0] > term.clip[1]:
                raise UserError(f"reward '{name}': clip is {list(term.clip)}, the first number must be the smaller")
            if term.tasks is not None and not term.tasks:
                raise UserError(f"reward '{name}': tasks is an empty list; leave it out for all tasks")
            self.terms[name] = term
        if not self.terms:
            raise UserError("rewards: the list is empty, give at least one reward")

    def check_differentiable(self, known: Iterable[str] = ()) -> None:
        """Raise ``UserError`` unless gradients flow through every reward of the sum (those of weight 0 need not).

        Args:
            known: names of differentiable rewards to suggest.
        """
        able = {name: is_differentiable(term.reward) for name, term in self.terms.items()}
        refused = [name for name, term in self.terms.items() if not able[name] and term.weight != 0]
        if not refused:
            return
        good = [name for name in able if able[name]]
        known = sorted(known)
        raise UserError(
            f"gradients do not flow through reward {_quoted(refused)}; of the configured ones they do through "
            f"{_quoted(good) if good else 'none'}" + (f" (differentiable rewards: {', '.join(known)})" if known else "")
        )

    def __call__(self, samples: Samples, step: int = 0, grad: bool = False) -> Scores:
        """Score ``samples`` as of training step ``step``.

        Args:
            grad: keep the graph from ``total`` to the samples; otherwise nothing is recorded.

        Raises:
            RewardError: a picture is not finite; or a reward raised, ran out of time or returned something that is not
                one finite number a sample.
            UserError: ``grad`` with a reward that is not differentiable.
        """
        if grad:
            self.check_differentiable()
        device = next((x.device for x in (samples.images, samples.videos) if x is not None), torch.device("cpu"))
        _check_media(samples)
        # Rewards without a gradient need not know that the pictures have one.
        detached = replace(samples, images=_detach(samples.images), videos=_detach(samples.videos))
        each, seconds = {}, {}
        for name, term in self.terms.items():
            start = time.perf_counter()
            flows = grad and is_differentiable(term.reward)
            with torch.set_grad_enabled(flows):
                each[name] = _scores(name, term, samples if flows else detached).to(device)
            seconds[name] = time.perf_counter() - start
        return self._combine(each, seconds, step)

    def compare(self, a: Samples, b: Samples, step: int = 0) -> Tensor:
        """Weighted mean ``[N]`` of the rewards' comparisons, row by row: 1 where a is better, 0 where b is.

        A reward that can compare has ``compare(a, b)``; one of negative weight counts the other way round. NaN where no
        reward applies.

        Raises:
            UserError: a reward of the sum cannot.
            RewardError: not one number from 0 to 1 for each row.
        """
        total, weights = torch.zeros(len(a)), torch.zeros(len(a))
        for name, term in self.terms.items():
            weight, rows = at_step(term.weight, step), _rows_of(term, a)
            if weight == 0 or not rows:
                continue
            if not hasattr(term.reward, "compare"):
                raise UserError(f"reward '{name}' cannot compare two samples; judge_pair can")
            found = as_scores(name, term.reward.compare(a[rows], b[rows]), a[rows]).cpu()
            if ((found < 0) | (found > 1)).any():
                raise RewardError(f"reward '{name}' gave {found.tolist()}, but a comparison is a number from 0 to 1")
            total[rows] += abs(weight) * (found if weight > 0 else 1 - found)
            weights[rows] += abs(weight)
        return total / weights

    def turns(self, samples: Samples, step: int = 0) -> list[list[float]] | None:
        """What each turn of the model earned of its sample's total; None where no reward says so.

        Turns are those of a dialogue or of an episode. A reward may have ``turns(samples)``: per sample one number for
        each turn of the model, the part of its score that this turn earned. They are weighted and scaled like the
        score; what they leave of the total belongs to the last turn.

        Raises:
            RewardError: not one finite number for each turn.
        """
        terms = {name: term for name, term in self.terms.items() if hasattr(term.reward, "turns") and term.weight != 0}
        if not terms or (samples.transcripts is None and samples.episodes is None):
            return None
        if samples.episodes is not None:
            counts = [episode.turns for episode in samples.episodes]
        else:
            counts = [len(said(transcript)) for transcript in samples.transcripts]
        out = [[0.0] * count for count in counts]
        for name, term in terms.items():
            weight = at_step(term.weight, step)
            rows = _rows_of(term, samples)
            for row, parts in zip(rows, term.reward.turns(samples[rows]) if rows else (), strict=True):
                if len(parts) != counts[row] or not all(math.isfinite(part) for part in parts):
                    raise RewardError(
                        f"reward '{name}' gave {list(parts)} for the {counts[row]} turns of "
                        f"{describe_sample(samples, row)}; it should be one finite number a turn"
                    )
                out[row] = [a + weight * term.scale * b for a, b in zip(out[row], parts, strict=True)]
        return out

    def marks(self, samples: Samples) -> list[list[dict[str, Any]]]:
        """What rewards found in the pictures that samples answer about, for people to look at.

        A reward may have ``marks(samples)``: per sample a list of ``{"label": "predicted" | "true", "box": [x0, y0, x1,
        y1]}`` or ``{"label": ..., "point": [x, y]}``, in fractions of the picture's width and height.
        """
        out: list[list[dict[str, Any]]] = [[] for _ in range(len(samples))]
        for term in self.terms.values():
            find = getattr(term.reward, "marks", None)
            rows = _rows_of(term, samples)
            if find is not None and rows:
                for row, marks in zip(rows, find(samples[rows]), strict=True):
                    out[row] += [mark for mark in marks if mark not in out[row]]
        return out

    def _combine(self, each: Mapping[str, Tensor], seconds: dict[str, float], step: int) -> Scores:
        columns, weights = [], []
        keep = torch.ones_like(next(iter(each.values())), dtype=torch.bool)
        for name, term in self.terms.items():
            value = term.scale * each[name] + term.offset
            columns.append(value if term.clip is None else value.clamp(*term.clip))
            weights.append(at_step(term.weight, step))
            if term.gate is not None:
                keep = keep & ~(each[name] <= term.gate)
        values = torch.stack(columns, dim=1)
        applies = ~values.isnan()
        values = torch.where(keep[:, None] | ~applies, values, 0.0)
        weights = torch.tensor(weights, dtype=torch.float32, device=values.device)
        total = (torch.where(applies, values, 0.0) * weights).sum(1)
        # A reward that only reports (weight 0) does not make a sample count as scored, but a closed gate does.
        trains = torch.tensor([term.weight != 0 for term in self.terms.values()], device=values.device)
        counted = (applies & trains).any(1) | ~keep
        total = torch.where(counted, total, torch.nan)
        return Scores(total, values, weights, dict(each), seconds)


def reward_name(reward: Callable) -> str:
    """The reward's ``name``, or that of its function or class."""
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__


def is_differentiable(reward: Callable) -> bool:
    """Whether it says that gradients flow through it."""
    return bool(getattr(reward, "differentiable", False))


def describe_sample(samples: Samples, row: int) -> str:
    """``"sample 3 (prompt 'prompts.txt:4': a red circle)"``, for error messages."""
    prompt = samples.prompts[row]
    text = prompt.text if len(prompt.text) <= 80 else prompt.text[:77] + "..."
    return f"sample {row} (prompt {prompt.id!r}: {text})" if prompt.id else f"sample {row} (prompt: {text})"


def as_scores(name: str, found: Any, samples: Samples, partial: bool = False) -> Tensor:
    """What a reward returned as float32 ``[N]``, NaN where it does not apply.

    Args:
        name: of the reward, for messages.
        found: tensor, array or sequence of numbers and None.
        partial: whether NaN in a tensor or array means "does not apply".

    Raises:
        RewardError: wrong type, length or shape, or a number that is not finite; names the first such sample.
    """
    if isinstance(found, (list, tuple)):
        return _from_list(name, found, samples)
    if not isinstance(found, Tensor):
        if not hasattr(found, "__array__"):
            kind = type(found).__name__
            raise RewardError(f"reward '{name}' returned {kind}, not a tensor or list of {len(samples)} scores")
        found = torch.as_tensor(found)
    return _finite(name, found.float(), samples, partial)


def _from_list(name: str, found: Sequence[Any], samples: Samples) -> Tensor:
    if len(found) != len(samples):
        raise RewardError(f"reward '{name}' returned {len(found)} scores for {len(samples)} samples")
    tensors = [isinstance(score, Tensor) for score in found]
    for row, score in enumerate(found):
        if score is None or (tensors[row] and score.numel() == 1):
            continue
        if not hasattr(score, "__float__") or tensors[row]:
            raise RewardError(
                f"reward '{name}' returned {type(score).__name__} {_brief(score)} for "
                f"{describe_sample(samples, row)}; a score is a number or None"
            )
    empty = [score is None for score in found]
    if any(tensors):
        # Stacked rather than read out, so that gradients live on.
        device = next(score.device for score in found if isinstance(score, Tensor))
        parts = [torch.as_tensor(0.0 if s is None else s, device=device).float().reshape(()) for s in found]
        scores = torch.stack(parts)
    else:
        scores = torch.tensor([0.0 if score is None else float(score) for score in found])
    scores = _finite(name, scores, samples, partial=False)
    return torch.where(torch.tensor(empty, device=scores.device), torch.nan, scores) if any(empty) else scores


def _finite(name: str, scores: Tensor, samples: Samples, partial: bool) -> Tensor:
    if scores.shape != (len(samples),):
        raise RewardError(
            f"reward '{name}' returned shape {list(scores.shape)} for {len(samples)} samples; "
            f"it must be [{len(samples)}], one score a sample"
        )
    bad = ~scores.detach().isfinite()
    if partial:
        bad &= ~scores.detach().isnan()
    if bad.any():
        row = int(bad.nonzero()[0])
        also = f" (and for {int(bad.sum()) - 1} more)" if bad.sum() > 1 else ""
        raise RewardError(
            f"reward '{name}' returned {scores[row].item()} for {describe_sample(samples, row)}{also}; "
            "return None for a sample that it does not apply to"
        )
    return scores


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _quoted(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


def _rows_of(term: Term, samples: Samples) -> list[int]:
    """The samples that a reward is for."""
    return [row for row, prompt in enumerate(samples.prompts) if term.tasks is None or prompt.task in term.tasks]


def _scores(name: str, term: Term, samples: Samples) -> Tensor:
    """The raw scores ``[N]`` of one reward, NaN where it does not apply or its ``tasks`` leave the sample out."""
    partial = getattr(term.reward, "partial", False)
    if term.tasks is None:
        return as_scores(name, _call(name, term, samples), samples, partial)
    rows = _rows_of(term, samples)
    everywhere = torch.full((len(samples),), torch.nan)
    if not rows:
        return everywhere
    chosen = samples[rows]
    scores = as_scores(name, _call(name, term, chosen), chosen, partial)
    return everywhere.to(scores.device).index_put((torch.tensor(rows, device=scores.device),), scores)


def _call(name: str, term: Term, samples: Samples) -> Any:
    """Call the reward; on failure find the sample to blame by scoring one at a time."""
    try:
        return _within(term.timeout, term.reward, samples)
    except UserError:
        raise
    except _OutOfTime as error:
        raise RewardError(_slow_sample(name, term, samples)) from error
    except Exception as error:
        _blame_sample(name, term, samples)
        raise RewardError(
            f"reward '{name}' failed on a batch of {len(samples)} samples, though on none of them alone: {_said(error)}"
        ) from error


def _within(timeout: float | None, reward: Callable, samples: Samples) -> Any:
    """The reward's result, or ``_OutOfTime``. Python cannot stop a thread: one that is late runs on unheard."""
    if timeout is None:
        return reward(samples)
    outcome = in_daemon_thread(lambda: reward(samples))
    if not wait([outcome], timeout).done:
        raise _OutOfTime
    return outcome.result()


def in_daemon_thread(work: Callable[[], Any]) -> Future:
    """The result to come of ``work``, in a thread that cannot keep the process from ending when it hangs."""
    grad = torch.is_grad_enabled()
    outcome = Future()

    def run() -> None:
        try:
            # Gradient mode belongs to a thread, so the worker's has to be set.
            with torch.set_grad_enabled(grad):
                outcome.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to the thread that waits
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="reward").start()
    return outcome


def _blame_sample(name: str, term: Term, samples: Samples) -> None:
    """Raise the error of the first sample that fails alone; return if none does."""
    for row in range(len(samples)):
        try:
            _within(term.timeout, term.reward, samples[row : row + 1])
        except _OutOfTime as error:
            raise RewardError(_late(name, term, samples, row)) from error
        except Exception as error:
            raise RewardError(f"reward '{name}' failed on {describe_sample(samples, row)}: {_said(error)}") from error


def _slow_sample(name: str, term: Term, samples: Samples) -> str:
    """The sentence for a call that ran out of time. Looking for the culprit takes at most the timeout once more."""
    took = []
    end = time.perf_counter() + term.timeout
    for row in range(len(samples)):
        start = time.perf_counter()
        try:
            _within(max(end - start, 0.001), term.reward, samples[row : row + 1])
        except _OutOfTime:
            return _late(name, term, samples, row)
        took.append(time.perf_counter() - start)
    slowest = max(range(len(took)), key=took.__getitem__)
    return (
        f"reward '{name}' took longer than its timeout of {term.timeout:g} s for {len(samples)} samples; one at a time "
        f"the slowest was {describe_sample(samples, slowest)} with {took[slowest]:.2f} s"
    )


def _late(name: str, term: Term, samples: Samples, row: int) -> str:
    return (
        f"reward '{name}' took longer than its timeout of {term.timeout:g} s; scored one at a time it got as far as "
        f"{describe_sample(samples, row)}"
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
