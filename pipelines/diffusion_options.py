"""Options of a diffusion policy before there is a model: whether they fit together, and what they cost."""

from __future__ import annotations

from typing import Any

from mmrl.errors import UserError
from pipelines import loading
from pipelines.branching import Branching
from pipelines.seam import Seam
from pipelines.steering import Steering
from pipelines.step_kernel import StepKind
from pipelines.windows import noise_levels, window_steps


def check_options(
    num_steps: int,
    step: StepKind,
    window: Any,
    same_noise: bool,
    shared_prefix: bool,
    model: str | None = None,
    noise_level: float | list[float] = 0.7,
    branching: Branching | None = None,
    value_head: bool = False,
    steering: Steering | None = None,
    keep_graph: bool = False,
    **others: Any,
) -> None:
    """Check what needs no model in memory; raises ``UserError``. ``others`` are options that are not looked at."""
    if model is not None:
        loading.resolve(model)
    stochastic = () if step == "ode" else window_steps(window, num_steps)
    noise_levels(noise_level, stochastic)
    if branching is not None:
        if step == "ode" or shared_prefix:
            raise UserError("branching needs stochastic steps, and shares the steps before them without shared_prefix")
        if value_head:
            raise UserError("value_head values the steps of samples that share none: leave out branching")
        branching.splits(stochastic)
    if steering is not None:
        if step == "ode" or branching is not None:
            raise UserError("steering bends stochastic steps, which step: ode has not, and goes without branching")
        steering.components()
    if keep_graph and (step == "ode" or branching is not None or value_head or steering is not None):
        raise UserError("keep_graph keeps stochastic steps: no step: ode, branching, value_head or steering beside it")
    if shared_prefix and not same_noise:
        raise UserError("shared_prefix needs same_noise: true, since members of a group share their first steps")


def forwards_per_sample(
    num_steps: int, step: StepKind, window: Any, keep_graph: bool = False, **others: Any
) -> dict[str, int]:
    """Network rows that one sample costs per verb, at the first training step, without counting guidance.

    Branches are counted as if they shared nothing.
    """
    steps = () if step == "ode" else window_steps(window, num_steps)
    return {
        "rollout": num_steps,
        "decisions": len(steps),
        "kept": len(steps) if keep_graph else 0,
        "complete": sum(num_steps - s for s in steps),
        "fit": 1,
        "generate": num_steps,
    }


def check_step(step: StepKind, noise_level: float | list[float], seam: Seam) -> StepKind:
    """The step for this kind of pipeline; raises ``UserError`` for one that it cannot take."""
    if step == "ode":
        return step
    if not seam.is_flow and step == "flow_sde":
        step = "ddim"
    if step == "ddim" if seam.is_flow else step not in ("ddim", "cps"):
        right = "flow_sde, dance, cps, wan or ode" if seam.is_flow else "ddim, cps or ode"
        raise UserError(f"step '{step}' does not fit {seam.name}: use {right}")
    levels = noise_level if isinstance(noise_level, list) else [noise_level]
    if min(levels) <= 0:
        raise UserError(f"noise_level {noise_level} leaves no noise to explore with: use a positive one, or step: ode")
    if step in ("cps", "ddim") and max(levels) > 1:
        raise UserError(f"noise_level {noise_level} is too large for step '{step}': use at most 1")
    return step
