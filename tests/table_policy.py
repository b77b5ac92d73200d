"""A whole language model for tests: a table of logits for each prompt and place, with an optional value table."""

import contextlib
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training import training_step

from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import Experience
from mmrl.data import PromptSampler
from mmrl.policy import Parameters
from mmrl.scoring import Scorer
from mmrl.seeding import generator
from mmrl.tally import Clock, Tally
from mmrl.types import Decisions, Prompt, Rollout, Rows, Samples

END = 0


@dataclass(eq=False)
class Trace(Rows):
    places: torch.Tensor
    tokens: torch.Tensor

    def __len__(self):
        return len(self.places)

    @classmethod
    def cat(cls, parts):
        width = max(part.tokens.shape[1] for part in parts)
        tokens = [nn.functional.pad(part.tokens, (0, width - part.tokens.shape[1])) for part in parts]
        return cls(torch.cat([part.places for part in parts]), torch.cat(tokens))


class TablePolicy:
    """A prompt that ends with "p3" has the third table; texts are token numbers with spaces; token 0 ends."""

    verbs = frozenset({"rollout", "decisions", "fit", "generate", "entropy", "values", "given"})
    load = staticmethod(lambda model=None: None)

    def __init__(
        self,
        net: Any = None,
        prompts: int = 4,
        length: int = 5,
        words: int = 6,
        value_head: bool = False,
        batch_size: int = 8,
        seed: int = 0,
        spread: float = 0.0,
    ):
        self.logits = nn.Parameter(spread * torch.randn(prompts, length, words, generator=generator(seed, "logits")))
        named = {"logits": self.logits}
        self.values = nn.Parameter(torch.zeros(prompts, length)) if value_head else None
        if value_head:
            named["values"] = self.values
        self.verbs = self.offers(value_head)
        self.parameters = Parameters(named)
        self.counters = Counter()
        self.batch_size = batch_size
        self.max_decisions = length
        self.has_frozen_base = False
        self.keep_mean = self.keep_entropy = False

    @staticmethod
    def offers(value_head=False, **others):
        return TablePolicy.verbs if value_head else TablePolicy.verbs - {"values"}

    def to(self, device):
        return self

    def _places(self, prompts):
        return torch.tensor([int(prompt.text.split()[-1][1:]) for prompt in prompts])

    def _rollout(self, prompts, group, tokens, truncated=None):
        """``tokens`` are lists that end with END unless cut."""
        lengths = torch.tensor([len(row) for row in tokens])
        width = int(lengths.max())
        table = torch.tensor([row + [END] * (width - len(row)) for row in tokens])
        mask = torch.arange(width) < lengths[:, None]
        trace = Trace(self._places(prompts), table)
        texts = [" ".join(str(token) for token in row if token != END) for row in tokens]
        samples = Samples(list(prompts), texts=texts, lengths=lengths, truncated=truncated, group=group)
        rollout = Rollout(samples, torch.zeros(table.shape), mask, group, trace)
        with torch.no_grad():
            found = self.decisions(rollout)
        rollout.logp, rollout.value = found.logp, found.value
        return rollout

    def rollout(self, prompts, group_size, seed, step=0):
        tokens, rows = [], [prompt for prompt in prompts for _ in range(group_size)]
        for number, place in enumerate(self._places(rows).tolist()):
            key = rows[number].id, number % group_size
            draw = (
                torch.multinomial(self.logits.detach()[place].softmax(-1), 1, generator=generator(seed, "sample", *key))
                .flatten()
                .tolist()
            )
            tokens.append(draw[: draw.index(END) + 1] if END in draw else draw)
        self.counters["sampled"] += len(rows)
        truncated = torch.tensor([row[-1] != END for row in tokens])
        return self._rollout(rows, torch.arange(len(prompts)).repeat_interleave(group_size), tokens, truncated)

    def completions(self, rollout):
        lengths = rollout.mask.sum(1).tolist()
        return [row[:n] for row, n in zip(rollout.trace.tokens.tolist(), lengths, strict=True)]

    def continued(self, prompts, completions, text, seeds):
        out = []
        for prompt, ids, seed in zip(prompts, completions, seeds, strict=True):
            begun = [token for token in ids if token != END] + [int(word) for word in text.split()]
            if len(begun) >= self.max_decisions:
                out.append(list(ids))
                continue
            table = self.logits.detach()[self._places([prompt])[0], len(begun) :]
            drawn = torch.multinomial(table.softmax(-1), 1, generator=generator(seed)).flatten().tolist()
            out.append(begun + (drawn[: drawn.index(END) + 1] if END in drawn else drawn))
        return out

    def decode(self, tokens, lengths):
        rows = zip(tokens.tolist(), lengths.tolist(), strict=True)
        return [" ".join(str(token) for token in row[:n] if token != END) for row, n in rows]

    def given(self, prompts, completions, score=True):
        tokens = []
        for answer in completions:
            row = [int(word) for word in answer.split()] + [END] if isinstance(answer, str) else list(answer)
            tokens.append(row[: self.max_decisions])
        truncated = torch.tensor([row[-1] != END for row in tokens])
        return self._rollout(prompts, torch.arange(len(prompts)), tokens, truncated)

    def decisions(self, rollout, steps=None):
        trace, mask = rollout.trace, rollout.mask
        self.counters["scored"] += len(trace)
        width = trace.tokens.shape[1]
        everything = self.logits[trace.places, :width].log_softmax(-1)
        logp = everything.gather(2, trace.tokens[..., None])[..., 0]
        entropy = -(everything.exp() * everything).sum(-1) * mask if self.keep_entropy else None
        value = None if self.values is None else self.values[trace.places, :width] * mask
        found = Decisions(logp * mask, entropy=entropy, value=value)
        return found if steps is None else found.columns(steps)

    def decision_chunks(self, rollout):
        return [list(range(rollout.logp.shape[1]))]

    def fit(self, samples, seeds=()):
        if isinstance(samples, Samples):
            texts = samples.texts or [prompt.target for prompt in samples.prompts]
            samples = self.given(samples.prompts, texts)
        return -self.decisions(samples).logp.sum(1)

    def generate(self, prompts, seeds):
        best = self.logits.detach()[self._places(prompts)].argmax(-1).tolist()
        tokens = [row[: row.index(END) + 1] if END in row else row for row in best]
        return self._rollout(prompts, torch.arange(len(prompts)), tokens).samples

    def reference(self):
        if "reference" in self.parameters.snapshots:
            return self.parameters.swapped("reference")
        return contextlib.nullcontext()

    def export(self, folder: Path):
        Path(folder).mkdir(parents=True, exist_ok=True)


def share_right(samples: Samples) -> list[float]:
    """Share of the five places that say the prompt's target; 0 for an end too early."""
    return [text.split().count(prompt.target) / 5 for text, prompt in zip(samples.texts, samples.prompts, strict=True)]


def exact(samples: Samples) -> list[float]:
    """1 for the target at the first place."""
    return [
        float(text.split()[:1] == [prompt.target]) for text, prompt in zip(samples.texts, samples.prompts, strict=True)
    ]


def first_half(samples: Samples) -> list[float]:
    """Prompts 2 and 3 have no spread."""
    first = [prompt.text in ("p0", "p1") for prompt in samples.prompts]
    return [value if own else 1.0 for value, own in zip(share_right(samples), first, strict=True)]


def table_context(policy: TablePolicy, reward=share_right, micro_batch_size: int = 8, prompts: int = 4) -> Context:
    """What the trainer would lend an algorithm, with ``prompts`` prompts."""
    rows = [Prompt(f"p{k}", id=f"p{k}", target=str(k + 1)) for k in range(prompts)]
    sampler = PromptSampler(rows, prompts, shuffle=False)
    return Context(policy, Scorer([reward]), 7, micro_batch_size, Clock(), Tally(), sampler)


def take_step(algorithm, context: Context, step: int = 0, lr: float = 1.0) -> Experience:
    """One training step of plain gradient descent."""
    return training_step(algorithm, context, torch.optim.SGD(list(context.policy.parameters), lr), step)


HERE = Path(__file__).resolve()


def table_config(run_dir: Path, algorithm: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run on the table: four prompts, each wants one word said five times."""
    from mmrl.overrides import merge

    base = {
        "run_dir": str(run_dir),
        "seed": 5,
        "pipeline": {"type": f"{HERE}:TablePolicy", "value_head": algorithm.get("type") == "ppo"},
        "data": {"prompts": [{"text": f"p{k}", "target": str(k + 1)} for k in range(4)], "batch_size": 4},
        "rewards": [{"type": f"{HERE}:share_right"}],
        "algorithm": algorithm,
        "trainer": {
            "steps": 12,
            "lr": 0.2,
            "device": "cpu",
            "tensorboard": False,
            "optimizer_options": {"weight_decay": 0.0},
        },
        "eval": {"samples_per_prompt": 1},
    }
    return merge(base, changes)


def train(config: dict[str, Any]) -> dict[str, Any]:
    from mmrl import run
    from mmrl.config import parse_config

    return run.train(parse_config(config))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """Metric lines without timings, which no two runs share."""
    found = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and not k.endswith("seconds")} for line in found
    ]


def resumes_bit_exactly(
    folder: Path, algorithm: dict[str, Any], config: Callable = table_config, **changes: Any
) -> dict[str, Any]:
    """Train twice, the second time as if killed after the first checkpoint; returns the algorithm's state in it."""
    from safetensors.torch import load_file

    from mmrl import checkpoints, run

    for name in ("straight", "stopped"):
        train(config(folder / name, algorithm, **changes))
    first, *later = checkpoints.checkpoints(folder / "stopped")
    for path in later:
        shutil.rmtree(path)
    run.resume(folder / "stopped")
    assert lines(folder / "stopped") == lines(folder / "straight")
    last = [checkpoints.checkpoints(folder / name)[-1] for name in ("straight", "stopped")]
    for file in sorted(last[0].glob("*.safetensors")):
        one, other = load_file(file), load_file(last[1] / file.name)
        assert all(torch.equal(one[key], other[key]) for key in one), file.name
    ends = [json.loads((path / "state.json").read_text())["training"]["algorithm"] for path in last]
    assert ends[0] == ends[1]
    return json.loads((first / "state.json").read_text())["training"]["algorithm"]


def train_all(folder: str) -> None:
    """Train every config file of a folder; what a launcher of several processes runs."""
    from mmrl import run
    from mmrl.config import load_config

    for path in sorted(Path(folder).glob("*.yaml")):
        run.train(load_config(path))


if __name__ == "__main__":
    train_all(sys.argv[1])
