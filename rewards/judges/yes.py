"""Judges that answer yes or no, read from the model's next-token probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Samples
from rewards.encoders import Dtype
from rewards.judges.local import LocalVLM, load_vlm
from rewards.judges.subjects import Modality, cases_of, questions

Count = Annotated[int, Field(gt=0)]

QUESTIONS: dict[Modality, str] = {
    "image": "Does the picture show {prompt}? Answer yes or no.",
    "video": "These are frames of a video in order. Does the video show {prompt}? Answer yes or no.",
    "text": "Task: {prompt}\nAnswer: {completion}\nIs this answer right? Answer yes or no.",
}


def choice_tokens(
    vlm: LocalVLM, first: Sequence[str], second: Sequence[str], reward: str
) -> tuple[list[int], list[int]]:
    """The tokens that tell two answers apart: of each, those that the other does not have.

    Raises:
        UserError: nothing is left of an answer.
    """
    one, other = set(vlm.word_tokens(first)), set(vlm.word_tokens(second))
    if not one - other or not other - one:
        raise UserError(
            f"reward '{reward}': judge '{vlm.name}' cannot tell {list(first)} from {list(second)} by the first token"
        )
    return sorted(one - other), sorted(other - one)


def choice_probability(scores: Tensor, first: int) -> Tensor:
    """P(first answer) ``[N]`` under the softmax over the tokens of both.

    Args:
        scores: logits ``[N, a + b]``, the first ``first`` of them of the first answer.
    """
    return torch.sigmoid(scores[:, :first].logsumexp(1) - scores[:, first:].logsumexp(1))


class JudgeYes:
    """Probability that a vision-language model answers yes, read from its next-token scores.

    ``P(yes) / (P(yes) + P(no))`` for the first token of the answer, each summed over its spellings; in [0, 1].
    RewardDance (arXiv 2509.08826) reads its own judge so, which it asks whether a sample beats a reference.

    Args:
        model: a repository on the hub, a folder, or ``builtin:NAME``.
        question: with the fields ``{prompt}``, ``{completion}`` (the text that was written) and ``{media}`` (pictures
            or frames, in front of the question when not named); default by what is judged: :data:`QUESTIONS`.
        system: what the judge is told first.
        yes, no: spellings. Those that are one token of the model count; where none is, the first token of each.
        frames: of a clip that are looked at, evenly spread.
        batch_size: cases per forward.
        dtype: of the network.
        device: default, that of the pictures.

    Raises:
        UserError: the model is not found or is none that chats about pictures; the question names an unknown field;
            both answers begin with the same token.
    """

    name = "judge_yes"
    differentiable = False

    def __init__(
        self,
        model: str,
        question: str | None = None,
        system: str = "",
        yes: Sequence[str] = ("yes", "Yes", "YES", " yes", " Yes", " YES"),
        no: Sequence[str] = ("no", "No", "NO", " no", " No", " NO"),
        frames: Count = 4,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        self.questions = questions({kind: question or text for kind, text in QUESTIONS.items()}, self.name)
        self.vlm = load_vlm(model, dtype, device)
        self.yes_ids, self.no_ids = choice_tokens(self.vlm, yes, no, self.name)
        self.system, self.frames, self.batch_size = system, frames, batch_size

    def __call__(self, samples: Samples) -> Tensor:
        """P(yes) ``[N]``."""
        cases = cases_of(self.questions, samples, self.frames, self.name)
        self.vlm.place(media_device(samples))
        scores = self.vlm.next_scores(cases, [*self.yes_ids, *self.no_ids], self.batch_size, self.system)
        return choice_probability(scores, len(self.yes_ids))


def media_device(samples: Samples) -> torch.device | None:
    """Where the pictures or clips are; None for texts."""
    return next((media.device for media in (samples.images, samples.videos) if media is not None), None)
