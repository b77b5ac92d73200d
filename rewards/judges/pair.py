"""A judge that compares two samples of a prompt, in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples
from rewards.encoders import Dtype
from rewards.judges.local import load_vlm
from rewards.judges.subjects import Case, Modality, Question, Subject, modality, subjects
from rewards.judges.yes import Count, choice_probability, choice_tokens, media_device

QUESTIONS: dict[Modality, str] = {
    "image": "Picture A: {first}\nPicture B: {second}\nWhich picture shows {prompt} better? Answer A or B.",
    "video": "Video A in frames: {first}\nVideo B: {second}\nWhich video shows {prompt} better? Answer A or B.",
    "text": "{media}Task: {prompt}\nAnswer A: {first}\nAnswer B: {second}\nWhich answer is better? Answer A or B.",
}


class JudgePair:
    """Share of the other samples of its group that a sample beats, as a vision-language model sees it; in [0, 1].

    Each pair is shown in both orders. A sample wins if it is preferred in both; if the verdict changes with the order,
    it is a tie, which counts one half. Does not apply (NaN) to a sample that is alone in its group.

    Args:
        model: a repository on the hub, a folder, or ``builtin:NAME``.
        question: with the fields ``{prompt}``, ``{first}``, ``{second}`` (pictures, frames or texts) and, for texts,
            ``{media}`` (what the prompt shows); default by what is judged: :data:`QUESTIONS`.
        system: what the judge is told first.
        first, second: spellings of the two answers. Those that are one token of the model count.
        verdict: ``win`` counts wins and ties; ``probability`` takes the mean over both orders of P(preferred).
        opponents: compare each sample with only so many that follow it in its group (and with those for which it is
            such a follower); all pairs of a group when not given. Costs two forwards a pair.
        frames: of a clip that are looked at, evenly spread.
        batch_size: cases per forward.
        dtype: of the network.
        device: default, that of the pictures.

    Raises:
        UserError: the model is not found or is none that chats about pictures; the question names an unknown field;
            both answers begin with the same token.
    """

    name = "judge_pair"
    differentiable = False
    partial = True

    def __init__(
        self,
        model: str,
        question: str | None = None,
        system: str = "",
        first: Sequence[str] = ("A", " A"),
        second: Sequence[str] = ("B", " B"),
        verdict: Literal["win", "probability"] = "win",
        opponents: Annotated[int, Field(gt=0)] | None = None,
        frames: Count = 4,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        texts = {kind: question or text for kind, text in QUESTIONS.items()}
        self.questions = {
            kind: Question(
                text,
                ("prompt", "first", "second") if kind == "text" else ("prompt",),
                ("media",) if kind == "text" else ("first", "second"),
                where=f"reward '{self.name}'",
            )
            for kind, text in texts.items()
        }
        self.vlm = load_vlm(model, dtype, device)
        self.first_ids, self.second_ids = choice_tokens(self.vlm, first, second, self.name)
        self.system, self.verdict, self.opponents = system, verdict, opponents
        self.frames, self.batch_size = frames, batch_size

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``.

        Raises:
            UserError: the samples have no groups.
        """
        if samples.group is None:
            raise UserError(f"reward '{self.name}' compares the samples of a group, but these have none")
        pairs = group_pairs(samples.group.tolist(), self.opponents)
        shown = subjects(samples, self.frames, self.name)
        outcome = self._outcomes([(shown[i], shown[j]) for i, j in pairs], samples)
        won, played = torch.zeros(len(samples)), torch.zeros(len(samples))
        for (i, j), value in zip(pairs, outcome.tolist(), strict=True):
            won[i] += value
            won[j] += 1 - value
            played[[i, j]] += 1
        return won / played  # 0 / 0 is NaN: does not apply

    def compare(self, a: Samples, b: Samples) -> Tensor:
        """``[N]``, row by row: 1 where a is better, 0 where b is, one half for a tie (or P(a), see ``verdict``).

        ``compare(b, a)`` is one minus this. The prompts are those of ``a``.

        Raises:
            UserError: the two differ in number or in kind.
        """
        if len(a) != len(b) or modality(a, self.name) != modality(b, self.name):
            raise UserError(f"reward '{self.name}' was given {len(a)} samples to compare with {len(b)} others")
        mine, others = (subjects(samples, self.frames, self.name) for samples in (a, b))
        return self._outcomes(list(zip(mine, others, strict=True)), a)

    def _outcomes(self, pairs: Sequence[tuple[Subject, Subject]], samples: Samples) -> Tensor:
        if not pairs:
            return torch.zeros(0)
        kind = modality(samples, self.name)
        self.vlm.place(media_device(samples))
        cases = [self._case(kind, *pair) for pair in pairs]
        cases += [self._case(kind, b, a, prompt=a) for a, b in pairs]
        ids = [*self.first_ids, *self.second_ids]
        chosen = choice_probability(self.vlm.next_scores(cases, ids, self.batch_size, self.system), len(self.first_ids))
        straight, swapped = chosen[: len(pairs)], 1 - chosen[len(pairs) :]
        return (straight + swapped) / 2 if self.verdict == "probability" else verdicts(straight, swapped)

    def _case(self, kind: Modality, a: Subject, b: Subject, prompt: Subject | None = None) -> Case:
        asked = prompt or a
        if kind == "text":
            fields = {"first": a.completion, "second": b.completion, "media": asked.pictures}
        else:
            fields = {"first": a.pictures, "second": b.pictures}
        return self.questions[kind].case(prompt=asked.prompt, **fields)


def verdicts(straight: Tensor, swapped: Tensor) -> Tensor:
    """1 where P(a is better) is above one half in both orders, 0 where it is below in both; else a tie, one half."""
    one, other = torch.sign(straight - 0.5), torch.sign(swapped - 0.5)
    return torch.where(one == other, (one + 1) / 2, 0.5)


def group_pairs(group: Sequence[int], opponents: int | None = None) -> list[tuple[int, int]]:
    """Pairs (i, j) of rows of the same group, each unordered pair once; see ``JudgePair`` for ``opponents``."""
    rows: dict[int, list[int]] = {}
    for row, index in enumerate(group):
        rows.setdefault(index, []).append(row)
    pairs: dict[tuple[int, int], None] = {}
    for members in rows.values():
        size = len(members)
        for place in range(size):
            for step in range(1, min(opponents or size, size - 1) + 1):
                i, j = members[place], members[(place + step) % size]
                pairs[min(i, j), max(i, j)] = None
    return list(pairs)
