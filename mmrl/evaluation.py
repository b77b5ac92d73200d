"""Held-out evaluation: fixed prompts, fixed seeds, the deterministic sampler."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmrl import distributed
from mmrl.algorithms.collecting import row_chunks
from mmrl.dialogue import readable
from mmrl.media import contact_sheet, save_samples, save_videos
from mmrl.policy import Policy
from mmrl.scoring import Scorer, spread
from mmrl.seeding import derive_seed
from mmrl.types import Prompt, Samples


@dataclass
class Evaluation:
    """What is evaluated and how; the same for every evaluation of a stage.

    Attributes:
        prompts: held-out prompts.
        samples_per_prompt: with 2 or more, group-wise rewards such as diversity mean something.
        seed: fixes the noise of every sample, whatever the step.
        scorer: rewards to report; need not be those trained on.
        record: of policies that act in an environment, how many prompts' episodes are kept as moving pictures.
    """

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    seed: int
    scorer: Scorer
    record: int = 8

    @torch.no_grad()
    def __call__(self, policy: Policy, step: int, folder: Path | None = None) -> dict[str, float]:
        """``{"eval/reward": ..., "eval/<name>/mean|std|share": ...}`` over all processes.

        A score that is only ever 0 or 1 is a proportion: it also has ``/low`` and ``/high``, its 95% interval over
        ``/count`` samples (which is too narrow where the samples of a prompt are alike).

        Args:
            folder: where to write the samples and ``scores.json``; nothing is written without it.
        """
        totals: list[torch.Tensor] = []
        each: dict[str, list[torch.Tensor]] = {name: [] for name in self.scorer.terms}
        records: list[dict[str, Any]] = []
        digits = max(3, len(str(len(self.prompts) - 1)))
        mine = list(range(distributed.rank(), len(self.prompts), distributed.world_size()))
        whole_groups = max(1, policy.batch_size // self.samples_per_prompt)
        for rows in row_chunks(len(mine), whole_groups):
            numbers = mine[rows]
            filmed = self.samples_per_prompt * sum(number < self.record for number in numbers) if folder else 0
            samples, seeds = self._generate(policy, numbers, filmed)
            scores = self.scorer(samples, step=step)
            totals.append(scores.total)
            for name, values in scores.each.items():
                each[name].append(values)
            if folder is not None:
                names = [f"{number:0{digits}d}-{k}" for number in numbers for k in range(self.samples_per_prompt)]
                outputs = _save_outputs(samples, folder, names, filmed)
                marks = self.scorer.marks(samples)
                for row, prompt in enumerate(samples.prompts):
                    records.append(
                        {
                            "name": names[row],
                            **outputs[row],
                            "prompt": prompt.text,
                            "prompt_id": prompt.id,
                            "seed": seeds[row],
                            "scores": {name: _number(values[row]) for name, values in scores.each.items()},
                            "total": _number(scores.total[row]),
                            **({"marks": marks[row]} if marks[row] else {}),
                        }
                    )
        if folder is not None:
            _write_records(folder, records)
        found = _statistics("eval/reward", totals)
        if "eval/reward/mean" in found:
            found = {"eval/reward": found.pop("eval/reward/mean"), **found}
        for name, parts in each.items():
            found |= _statistics(f"eval/{name}", parts, share=True)
        return found

    def _generate(self, policy: Policy, numbers: Sequence[int], filmed: int) -> tuple[Samples, list[int]]:
        prompts = [self.prompts[number] for number in numbers for _ in range(self.samples_per_prompt)]
        seeds = [
            derive_seed(self.seed, "eval", number, k) for number in numbers for k in range(self.samples_per_prompt)
        ]
        parts = []
        for rows in row_chunks(len(prompts), policy.batch_size):
            with _recording(policy, max(filmed - rows.start, 0)):
                parts.append(policy.generate(prompts[rows], seeds[rows]))
        samples = Samples.cat(parts)
        samples.group = torch.arange(len(numbers)).repeat_interleave(self.samples_per_prompt)
        return samples, seeds


def wilson_interval(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a probability of which ``count`` independent trials gave ``share`` (Wilson 1927).

    Within [0, 1], and of some width also where all trials failed or all succeeded.
    """
    middle = share + z * z / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    whole = 1 + z * z / count
    return max((middle - half) / whole, 0.0), min((middle + half) / whole, 1.0)


def _statistics(name: str, parts: Sequence[torch.Tensor], share: bool = False) -> dict[str, float]:
    """Of the scores of all processes; ``share`` also gives the part of the samples that have one."""
    scores = distributed.gather_ragged(torch.cat([part.detach().cpu() for part in parts] or [torch.empty(0)]))
    found = spread(name, scores)
    known = scores[~scores.isnan()]
    if len(known) and ((known == 0) | (known == 1)).all():
        low, high = wilson_interval(found[f"{name}/mean"], len(known))
        found |= {f"{name}/low": low, f"{name}/high": high, f"{name}/count": len(known)}
    if share and len(scores):
        found[f"{name}/share"] = len(known) / len(scores)
    return found


@contextlib.contextmanager
def _recording(policy: Policy, count: int) -> Iterator[None]:
    """Inside, a policy that can keep pictures of its first ``count`` episodes does so."""
    before = getattr(policy, "record", None)
    if before is not None:
        policy.record = count
    try:
        yield
    finally:
        if before is not None:
            policy.record = before


def _save_outputs(samples: Samples, folder: Path, names: list[str], filmed: int) -> list[dict[str, str]]:
    """Write pictures, clips, sounds, or films of the first ``filmed`` episodes.

    Returns:
        Per sample its ``file``, or its ``text`` and the ``picture`` that it was asked about.
    """
    if saved := save_samples(samples, folder, names):
        return [{"file": path.name} for path in saved]
    if samples.episodes is not None:
        recorded = [row for row, one in enumerate(samples.episodes[:filmed]) if one.frames is not None]
        films = [samples.episodes[row].frames / 255 for row in recorded]
        paths = dict(zip(recorded, save_videos(films, folder, [names[row] for row in recorded]), strict=True))
        return [{"file": paths[row].name} if row in paths else {} for row in range(len(samples))]
    if samples.texts is None:
        return [{} for _ in names]
    asked: dict[int, str] = {}
    out = []
    texts = samples.texts if samples.transcripts is None else [readable(one) for one in samples.transcripts]
    for name, text, prompt in zip(names, texts, samples.prompts, strict=True):
        if id(prompt) not in asked:
            asked[id(prompt)] = _save_asked(prompt, folder, f"{name}-asked.png")
        out.append({"text": text, "picture": asked[id(prompt)]})
    return out


def _save_asked(prompt: Prompt, folder: Path, name: str) -> str:
    """The name of a file with the pictures, or else the first clip, of a prompt; "" if there is nothing to see."""
    sheet = contact_sheet(prompt.images, () if prompt.images else prompt.videos[:1])
    if sheet is None:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / name, format="PNG")
    return name


def _write_records(folder: Path, records: list[dict[str, Any]]) -> None:
    """``scores.json`` of all processes: each writes a part, the first joins them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f".scores-{distributed.rank()}.json").write_text(json.dumps(records), encoding="utf-8")
    distributed.barrier()
    if distributed.rank() == 0:
        parts = sorted(folder.glob(".scores-*.json"))
        joined = [record for part in parts for record in json.loads(part.read_text(encoding="utf-8"))]
        joined.sort(key=lambda record: record["name"])
        (folder / "scores.json").write_text(json.dumps(joined, indent=1), encoding="utf-8")
        for part in parts:
            part.unlink()
    distributed.barrier()


def _number(value: torch.Tensor) -> float | None:
    number = value.item()
    return None if number != number else number
