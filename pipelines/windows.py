"""Which denoising steps are stochastic and trained, as a pure function of the training step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mmrl.errors import UserError, nearest
from mmrl.seeding import generator

WindowSpec = str | Sequence[int] | Mapping[str, Any]

_OPTIONS = {
    "first": set(),
    "last": set(),
    "random": {"within", "contiguous"},
    "progressive": {"every", "stride", "rollback"},
    "backward": {"every", "stride", "until"},
}


def window_steps(spec: WindowSpec, num_steps: int, step: int = 0, seed: int = 0) -> tuple[int, ...]:
    """Indices of the stochastic steps of a rollout, ascending, out of ``0 .. num_steps - 2``.

    The last step is never among them: it is deterministic, because noise added there stays in the picture and its tiny
    std would dominate the gradient.

    Args:
        spec: one of

            * ``"all"``: every step but the last;
            * ``{"first": n}``, ``{"last": n}``;
            * ``{"random": n, "within": [lo, hi], "contiguous": true}``: n adjacent steps (or any n) out of
              ``lo .. hi-1``, drawn from ``(seed, step)`` (Flow-GRPO-Fast);
            * ``{"progressive": n, "every": N, "stride": k, "rollback": true}``: a window that starts at step 0 and
              moves by ``stride`` (default 1; ``stride: n`` is without overlap) every ``N`` (default 25) training
              steps; past the end it starts again, or stays there with ``rollback: false`` (MixGRPO, arXiv:2507.21802);
            * ``{"backward": n, "every": N, "stride": k, "until": m}``: the last n steps; every ``N`` (default 25)
              training steps ``stride`` (default 1) earlier ones more, until there are m (default all) (B2-DiffuRL,
              arXiv:2503.11240);
            * a list of step indices.
        num_steps: steps of the sampler.
        step: number of the training step.
        seed: of the run or rollout; used by ``random`` only.

    Raises:
        UserError: the window does not lie inside the steps, or an option is unknown.
    """
    usable = num_steps - 1
    if isinstance(spec, str):
        if spec != "all":
            raise UserError(f"window '{spec}' is unknown{nearest(spec, ['all', *_OPTIONS])}")
        return tuple(range(usable))
    if isinstance(spec, Mapping):
        kind, count = _parse(spec)
        if not 1 <= count <= usable:
            raise UserError(
                f"window {dict(spec)} asks for {count} steps, but {num_steps} sampling steps have {usable} stochastic "
                f"ones (the last is deterministic): use 1 to {usable}"
            )
        if kind == "first":
            return tuple(range(count))
        if kind == "last":
            return tuple(range(usable - count, usable))
        if kind == "random":
            return _random(spec, count, usable, step, seed)
        return (_backward if kind == "backward" else _progressive)(spec, count, usable, step)
    steps = list(spec)
    for index in steps:
        if not _is_int(index) or not 0 <= index < usable:
            raise UserError(
                f"window {steps} has step {index!r}, which is not one of the stochastic steps 0 to {usable - 1} "
                f"of {num_steps} sampling steps (the last is deterministic)"
            )
    if len(set(steps)) != len(steps) or not steps:
        raise UserError(f"window {steps} must name at least one step, each once")
    return tuple(sorted(steps))


def noise_levels(
    noise_level: float | list[float],
    steps: Sequence[int],
    scale: Sequence[float] | None = None,
    limit: float = math.inf,
) -> dict[int, float]:
    """The noise level of each stochastic step: one number for all, or a list with one for each, in order.

    Args:
        scale: factor for each; the product is at most ``limit``.

    Raises:
        UserError: the list or the factors are of another number than the steps.
    """
    if scale is not None:
        if len(scale) != len(steps):
            raise UserError(
                f"noise was calibrated for {len(scale)} decisions, but now there are {len(steps)} stochastic steps: "
                "calibrate_noise needs samples that all take the steps of a window of one length"
            )
        levels = noise_levels(noise_level, steps)
        return {step: min(levels[step] * factor, limit) for step, factor in zip(steps, scale, strict=True)}
    if not isinstance(noise_level, list):
        return dict.fromkeys(steps, noise_level)
    if len(noise_level) != len(steps):
        raise UserError(
            f"noise_level has {len(noise_level)} numbers, but the window has the {len(steps)} steps {list(steps)}"
        )
    return dict(zip(steps, noise_level, strict=True))


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _parse(spec: Mapping[str, Any]) -> tuple[str, int]:
    kinds = [key for key in spec if key in _OPTIONS]
    if len(kinds) != 1:
        wrong = next((key for key in spec if key not in _OPTIONS), "")
        raise UserError(f"window {dict(spec)} must have one of {', '.join(_OPTIONS)}{nearest(wrong, _OPTIONS)}")
    kind = kinds[0]
    for key in spec.keys() - {kind}:
        if key not in _OPTIONS[kind]:
            raise UserError(f"window {dict(spec)} has an unknown key '{key}'{nearest(key, _OPTIONS[kind])}")
    if not _is_int(spec[kind]):
        raise UserError(f"window {dict(spec)}: '{kind}' must be a whole number of steps, not {spec[kind]!r}")
    return kind, spec[kind]


def _random(spec: Mapping[str, Any], count: int, usable: int, step: int, seed: int) -> tuple[int, ...]:
    within = spec.get("within", (0, usable))
    if not (isinstance(within, Sequence) and len(within) == 2 and all(_is_int(i) for i in within)):
        raise UserError(f"window {dict(spec)}: 'within' must be two whole numbers [lo, hi], not {within!r}")
    lo, hi = within
    if not 0 <= lo < hi <= usable or hi - lo < count:
        raise UserError(
            f"window {dict(spec)}: 'within' [{lo}, {hi}] must lie in [0, {usable}] and hold at least {count} steps"
        )
    draw = generator(seed, "window", step)
    if spec.get("contiguous", True):
        start = lo + int(torch.randint(hi - lo - count + 1, (), generator=draw))
        return tuple(range(start, start + count))
    return tuple(sorted((lo + torch.randperm(hi - lo, generator=draw)[:count]).tolist()))


def _pace(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Training steps between moves, and sampling steps by which a window moves or grows."""
    every, stride = spec.get("every", 25), spec.get("stride", 1)
    for key, value in (("every", every), ("stride", stride)):
        if not _is_int(value) or value < 1:
            raise UserError(f"window {dict(spec)}: '{key}' must be a whole number of at least 1, not {value!r}")
    return every, stride


def _progressive(spec: Mapping[str, Any], count: int, usable: int, step: int) -> tuple[int, ...]:
    every, stride = _pace(spec)
    last = usable - count
    move = step // every
    start = stride * (move % (last // stride + 1)) if spec.get("rollback", True) else min(stride * move, last)
    return tuple(range(start, start + count))


def _backward(spec: Mapping[str, Any], count: int, usable: int, step: int) -> tuple[int, ...]:
    every, stride = _pace(spec)
    until = spec.get("until", usable)
    if not _is_int(until) or not count <= until <= usable:
        raise UserError(f"window {dict(spec)}: 'until' must be a number from {count} to {usable}, not {until!r}")
    return tuple(range(usable - min(count + stride * (step // every), until), usable))
