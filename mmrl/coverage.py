"""Which algorithm runs on which modality: what the one needs, in verbs, against what the other offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmrl.components import algorithm_component, build_algorithm
from mmrl.errors import UserError
from mmrl.policy import VERB_HELP
from mmrl.registry import ALGORITHMS, resolve

MODALITIES = {"image": "diffusion", "video": "diffusion", "VLM": "vlm", "robot": "robot"}
"""The pipeline of each modality."""


def refusals() -> dict[str, dict[str, str | None]]:
    """For each algorithm and modality why it is not defined there; None where it is."""
    return {name: {modality: refusal(name, modality) for modality in MODALITIES} for name in ALGORITHMS}


def refusal(algorithm: str, modality: str) -> str | None:
    """Why an algorithm is not defined on a modality, whatever the options of the pipeline; None if it is."""
    offered = resolve("pipeline", MODALITIES[modality]).verbs
    kind = resolve("algorithm", algorithm)
    if isinstance(getattr(kind, "verbs", None), frozenset):
        verbs, built = kind.verbs, None
    else:
        built = build_algorithm(algorithm_component({"type": algorithm}, where="algorithm", path="algorithm"))
        verbs = built.verbs
    missing = sorted(verbs - offered)
    if missing:
        return VERB_HELP.get(missing[0], f"the pipeline does not offer '{missing[0]}'")
    if hasattr(built, "defaults_for"):
        try:
            built.defaults_for(offered)
        except UserError as error:
            return str(error)
    return None


def table(gains: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A Markdown table of all algorithms and modalities.

    Args:
        gains: for each algorithm and modality the mean reward of a tiny model before and after some training steps. A
            pair that is defined but not in here, or whose reward did not rise, is "missing".
    """
    notes: dict[str, int] = {}
    lines = [f"| algorithm | {' | '.join(MODALITIES)} |", f"|---|{'---|' * len(MODALITIES)}"]
    for name, why in refusals().items():
        cells = []
        for modality, reason in why.items():
            before, after = gains.get(name, {}).get(modality, (0.0, 0.0))
            if reason is not None:
                cells.append(f"not defined ({notes.setdefault(reason, len(notes) + 1)})")
            else:
                cells.append(f"{before:.3f} → {after:.3f}" if after > before else "missing")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{number}. {note}" for note, number in notes.items())])
