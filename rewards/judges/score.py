"""A judge that writes a verdict with a number in it."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmrl.errors import UserError
from mmrl.seeding import derive_seed
from mmrl.types import Samples
from rewards.encoders import Dtype
from rewards.judges.local import load_vlm
from rewards.judges.subjects import Case, Modality, Question, cases_of, questions
from rewards.judges.verdicts import check_pattern, parse_score
from rewards.judges.yes import Count, media_device

_END = "Give a score from {low} to {high}. End with 'Score: ' and the number."
QUESTIONS: dict[Modality, str] = {
    "image": "How well does the picture show: {prompt}? " + _END,
    "video": "These are frames of a video in order. How well does the video show: {prompt}? " + _END,
    "text": "Task: {prompt}\nAnswer: {completion}\nHow good is this answer? " + _END,
}


def score_questions(question: str | None, bounds: tuple[float, float], name: str) -> dict[Modality, Question]:
    """The questions by what is judged, with ``{low}`` and ``{high}`` filled in."""
    low, high = bounds
    if not low < high:
        raise UserError(f"reward '{name}': range is {list(bounds)}, but the first number must be the smaller")
    texts = {kind: question or text for kind, text in QUESTIONS.items()}
    filled = {kind: text.replace("{low}", f"{low:g}").replace("{high}", f"{high:g}") for kind, text in texts.items()}
    return questions(filled, name)


class JudgeScore:
    """The number in what a vision-language model writes about a sample; see :mod:`rewards.judges.verdicts`.

    The first answer is the model's greedy one. While none can be read, it is asked again at ``temperature`` with other
    seeds; a sample whose verdict cannot be read even then gets None, "does not apply".

    Args:
        model: a repository on the hub, a folder, or ``builtin:NAME``.
        question: as for ``judge_yes``, with ``{low}`` and ``{high}`` for the range; default :data:`QUESTIONS`.
        system: what the judge is told first.
        range: lowest and highest score. A number outside is no verdict.
        pattern: regular expression with one group around the number, instead of the usual ways to name a score.
        retries: further answers asked for where none could be read.
        temperature: of the retries.
        seed: of the retries.
        max_new_tokens: longest answer.
        frames: of a clip that are looked at, evenly spread.
        batch_size: cases per forward.
        dtype: of the network.
        device: default, that of the pictures.

    Attributes:
        counts: ``verdicts`` wanted, ``retries`` made and ``unparsable`` verdicts, over all calls.

    Raises:
        UserError: the model is not found or is none that chats about pictures; the question names an unknown field; the
            range is empty; the pattern is no regular expression with one group.
    """

    name = "judge_score"
    differentiable = False

    def __init__(
        self,
        model: str,
        question: str | None = None,
        system: str = "",
        range: tuple[float, float] = (0.0, 10.0),
        pattern: str | None = None,
        retries: Annotated[int, Field(ge=0)] = 2,
        temperature: Annotated[float, Field(gt=0)] = 0.7,
        seed: int = 0,
        max_new_tokens: Count = 256,
        frames: Count = 4,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        self.questions = score_questions(question, range, self.name)
        check_pattern(pattern, f"reward '{self.name}'")
        self.vlm = load_vlm(model, dtype, device)
        self.bounds, self.pattern, self.system = range, pattern, system
        self.retries, self.temperature, self.seed = retries, temperature, seed
        self.max_new_tokens, self.frames, self.batch_size = max_new_tokens, frames, batch_size
        self.counts = {"verdicts": 0, "retries": 0, "unparsable": 0}

    def __call__(self, samples: Samples) -> list[float | None]:
        """N scores in the range, or None where no verdict could be read."""
        cases = cases_of(self.questions, samples, self.frames, self.name)
        self.vlm.place(media_device(samples))
        found: dict[Case, float | None] = dict.fromkeys(cases)
        for attempt in range(self.retries + 1):
            open_cases = [case for case, score in found.items() if score is None]
            for case, text in zip(open_cases, self._write(open_cases, attempt), strict=True):
                found[case] = parse_score(text, *self.bounds, self.pattern)
        scores = [found[case] for case in cases]
        self.counts["verdicts"] += len(scores)
        self.counts["unparsable"] += scores.count(None)
        return scores

    def _write(self, cases: list[Case], attempt: int) -> list[str]:
        if not cases:
            return []
        self.counts["retries"] += len(cases) if attempt else 0
        temperature = self.temperature if attempt else 0.0
        # From what is asked alone, so that a verdict does not depend on which other samples are in the batch.
        seeds = [
            derive_seed(
                self.seed, "judge", attempt, *(part if isinstance(part, str) else part.key.hex() for part in case)
            )
            for case in cases
        ]
        return self.vlm.write(cases, self.batch_size, self.max_new_tokens, self.system, temperature, seeds)
