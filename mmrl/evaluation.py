"""Held-out evaluation: fixed prompts, fixed seeds, the deterministic sampler."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmrl import distributed
from mmrl.algorithms.collecting import row_chunks
from mmrl.dialogue import readable
from mmrl.media import save_contact_sheet, save_images, save_videos
from mmrl.policy import Policy
from mmrl.scoring import Scorer
from mmrl.seeding import derive_seed
from mmrl.tally import Tally
from mmrl.types import Prompt, Samples


@dataclass
class Evaluation:
    """What is evaluated and how; the same for every evaluation of a stage.

    Attributes:
        prompts: held-out prompts.
        samples_per_prompt: with 2 or more, group-wise rewards such as diversity mean something.
        seed: fixes the noise of every sample, whatever the step.
        scorer: rewards to report; need not be those trained on.
    """

    prompts: Sequence[Prompt]
    samples_per_prompt: int
    seed: int
    scorer: Scorer

    @torch.no_grad()
    def __call__(self, policy: Policy, step: int, folder: Path | None = None) -> dict[str, float]:
        """``{"eval/reward": ..., "eval/<name>/mean": ...}`` over all processes.

        Args:
            folder: where to write the samples and ``scores.json``; nothing is written without it.
        """
        tally = Tally()
        records: list[dict[str, Any]] = []
        mine = list(range(distributed.rank(), len(self.prompts), distributed.world_size()))
        whole_groups = max(1, policy.batch_size // self.samples_per_prompt)
        for rows in row_chunks(len(mine), whole_groups):
            numbers = mine[rows]
            samples, seeds = self._generate(policy, numbers)
            scores = self.scorer(samples, step=step)
            tally.spread("eval/reward", scores.total)
            for name, values in scores.each.items():
                tally.spread(f"eval/{name}", values)
                tally.mean(f"eval/{name}/share", (~values.isnan()).float())
            if folder is not None:
                names = [f"{number:03d}-{k}" for number in numbers for k in range(self.samples_per_prompt)]
                outputs = _save_outputs(samples, folder, names)
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
        found = tally.result()
        if "eval/reward/mean" in found:
            found["eval/reward"] = found.pop("eval/reward/mean")
        return found

    def _generate(self, policy: Policy, numbers: Sequence[int]) -> tuple[Samples, list[int]]:
        prompts = [self.prompts[number] for number in numbers for _ in range(self.samples_per_prompt)]
        seeds = [
            derive_seed(self.seed, "eval", number, k) for number in numbers for k in range(self.samples_per_prompt)
        ]
        parts = [policy.generate(prompts[rows], seeds[rows]) for rows in row_chunks(len(prompts), policy.batch_size)]
        samples = Samples.cat(parts)
        samples.group = torch.arange(len(numbers)).repeat_interleave(self.samples_per_prompt)
        return samples, seeds


def _save_outputs(samples: Samples, folder: Path, names: list[str]) -> list[dict[str, str]]:
    """Write pictures or clips; per sample its ``file``, or its ``text`` and the ``picture`` that it was asked about."""
    if samples.images is not None:
        return [{"file": path.name} for path in save_images(samples.images, folder, names)]
    if samples.videos is not None:
        return [{"file": path.name} for path in save_videos(samples.videos, folder, names)]
    if samples.texts is None:
        return [{} for _ in names]
    saved: dict[int, str] = {}
    out = []
    texts = samples.texts if samples.transcripts is None else [readable(one) for one in samples.transcripts]
    for name, text, prompt in zip(names, texts, samples.prompts, strict=True):
        pictures = list(prompt.images) or list(prompt.videos)[:1]
        if pictures and id(prompt) not in saved:
            saved[id(prompt)] = f"{name}-asked.png"
            save_contact_sheet(pictures, folder / saved[id(prompt)])
        out.append({"text": text, "picture": saved.get(id(prompt), "")})
    return out


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
