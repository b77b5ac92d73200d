"""The quickstart's prompt files.

    python -m mmrl.world.prompts configs/quickstart

writes ``shapes_train.jsonl`` and ``shapes_eval.jsonl``: rows of text, id, target and task. The held-out targets
(:func:`mmrl.world.captions.is_held_out`) are in no training row and not in the base model's pre-training either.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mmrl.types import Prompt
from mmrl.world.captions import TASKS, all_targets, caption, is_held_out

TRAIN_ROWS = {"single": 12, "count": 20, "pair": 136, "relation": 280}
EVAL_ROWS = {"count": 3, "pair": 25, "relation": 36}


def rows(split: str, per_task: dict[str, int], seed: int = 0) -> Iterator[dict[str, Any]]:
    """The rows of one split, "train" or "eval"; within a task no target comes again before all have come once."""
    for task in TASKS:
        rng = np.random.default_rng([seed, TASKS.index(task), split == "eval"])
        choices = [t for t in all_targets(task) if is_held_out(t) == (split == "eval")]
        for k in range(per_task.get(task, 0)):
            if k % len(choices) == 0:
                rng.shuffle(choices)
            target = choices[k % len(choices)]
            yield {"text": caption(target, rng), "id": f"{split}-{task}-{k}", "target": target, "task": task}


def write(folder: Path) -> None:
    """Write both files into ``folder``."""
    for split, per_task in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        lines = [json.dumps(row) for row in rows(split, per_task)]
        (folder / f"shapes_{split}.jsonl").write_text("\n".join(lines) + "\n")


def read(path: Path) -> list[Prompt]:
    """The prompts of a file written by :func:`write`."""
    return [Prompt(**json.loads(line)) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    write(Path(sys.argv[1]))
