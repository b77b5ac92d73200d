"""Which algorithm runs on which modality: what the one needs, in verbs, against what the other offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from mmrl.components import algorithm_component, build_algorithm
from mmrl.errors import UserError
from mmrl.policy import VERB_HELP
from mmrl.registry import ALGORITHMS, resolve

MODALITIES = {
    "image": ("diffusion",),
    "video": ("diffusion",),
    "VLM": ("vlm",),
    "robot": ("robot", "residual_robot"),
}
"""The pipelines of each modality, the usual one first."""

Gains = Mapping[str, Mapping[str, Sequence[float]]]
"""For algorithms and modalities the mean reward of a tiny model before training and after it, over the same seeds, and
the standard error of the gain over several trainings."""


def place(algorithm: str, modality: str) -> tuple[str, str | None]:
    """The first pipeline of a modality that an algorithm is defined on, and None; the usual one and why not if none."""
    found = [(pipeline, refusal(algorithm, pipeline)) for pipeline in MODALITIES[modality]]
    return next((pair for pair in found if pair[1] is None), found[0])


def refusal(algorithm: str, pipeline: str) -> str | None:
    """Why an algorithm is not defined on a pipeline, whatever the options of the pipeline; None if it is."""
    offered = resolve("pipeline", pipeline).verbs
    verbs, built = _needs(algorithm)
    missing = sorted(verbs - offered)
    if missing:
        return VERB_HELP.get(missing[0], f"the pipeline does not offer '{missing[0]}'")
    if hasattr(built, "defaults_for"):
        try:
            built.defaults_for(offered)
        except UserError as error:
            return str(error)
    return None


@cache
def _needs(algorithm: str) -> tuple[frozenset[str], Any]:
    """The verbs that an algorithm needs; and the algorithm as its defaults make it, where they depend on options."""
    kind = resolve("algorithm", algorithm)
    if isinstance(getattr(kind, "verbs", None), frozenset):
        return kind.verbs, None
    built = build_algorithm(algorithm_component({"type": algorithm}, where="algorithm", path="algorithm"))
    return built.verbs, built


def risen(before: float, after: float, error: float) -> bool:
    """Whether a reward rose by more than two standard errors of the gain."""
    return after - before > 2 * error


def defined(gains: Gains) -> dict[str, dict[str, bool]]:
    """For each algorithm and the modalities that it is defined on whether it was seen to run there."""
    return {
        name: {
            modality: modality in gains.get(name, {}) and risen(*gains[name][modality])
            for modality in MODALITIES
            if place(name, modality)[1] is None
        }
        for name in ALGORITHMS
    }


def numbers(gains: Gains) -> str:
    """A Markdown table of rewards before and after; below it, why an algorithm is not defined where it is not."""
    seen = defined(gains)
    notes: dict[str, int] = {}

    def cell(name: str, modality: str) -> str:
        pipeline, reason = place(name, modality)
        if reason is not None:
            return f"not defined ({notes.setdefault(reason, len(notes) + 1)})"
        if not seen[name][modality]:
            return "missing"
        before, after, _ = gains[name][modality]
        where = "" if pipeline == MODALITIES[modality][0] else f" (`{pipeline}`)"
        return f"{before:.3f} → {after:.3f}{where}"

    rows = _table(cell)
    return "\n".join([rows, "", *(f"{number}. {note}" for note, number in notes.items())])


def marks(gains: Gains) -> str:
    """A Markdown table that says only whether an algorithm runs (✓), is not defined (–) or is missing."""
    seen = defined(gains)
    return _table(lambda name, modality: {None: "–", True: "✓", False: "missing"}[seen[name].get(modality)])


def _table(cell: Callable[[str, str], str]) -> str:
    lines = [f"| algorithm | {' | '.join(MODALITIES)} |", f"|---|{'---|' * len(MODALITIES)}"]
    lines += [f"| `{name}` | {' | '.join(cell(name, modality) for modality in MODALITIES)} |" for name in ALGORITHMS]
    return "\n".join(lines)
