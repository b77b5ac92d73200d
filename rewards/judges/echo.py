"""A judge that is not asked for an opinion: how likely it finds the prompt, having seen the picture."""

from __future__ import annotations

from mmrl.errors import UserError
from mmrl.types import Samples
from rewards.encoders import Dtype
from rewards.judges.local import load_vlm
from rewards.judges.subjects import Modality, Question, modality, subjects
from rewards.judges.yes import Count, media_device

QUESTIONS: dict[Modality, str] = {
    "image": "Describe the picture.",
    "video": "These are frames of a video in order. Describe the video.",
    "text": "{prompt}",
}


class JudgeEcho:
    """Minus the cross-entropy per token of the prompt, given the picture, under a vision-language model.

    As in PromptEcho (arXiv 2604.12652), the model is asked to describe the picture and the prompt is scored as its
    answer; in nats, never positive. For samples of text the completion is scored as the answer to its prompt and
    pictures.

    Args:
        model: a repository on the hub, a folder, or ``builtin:NAME``.
        question: as for ``judge_yes``; default :data:`QUESTIONS`.
        system: what the judge is told first.
        frames: of a clip that are looked at, evenly spread.
        batch_size: cases per forward.
        dtype: of the network.
        device: default, that of the pictures.

    Raises:
        UserError: the model is not found or is none that chats about pictures; the question names an unknown field.
    """

    name = "judge_echo"
    differentiable = False

    def __init__(
        self,
        model: str,
        question: str | None = None,
        system: str = "",
        frames: Count = 4,
        batch_size: Count = 16,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        texts = {kind: question or text for kind, text in QUESTIONS.items()}
        self.questions = {
            kind: Question(text, ("prompt",), where=f"reward '{self.name}'") for kind, text in texts.items()
        }
        self.vlm = load_vlm(model, dtype, device)
        self.system, self.frames, self.batch_size = system, frames, batch_size

    def __call__(self, samples: Samples) -> list[float | None]:
        """N scores; None for a text that is empty, which has no tokens to be likely.

        Raises:
            UserError: a prompt without words.
        """
        kind = modality(samples, self.name)
        question = self.questions[kind]
        cases, rows = [], []
        for row, subject in enumerate(subjects(samples, self.frames, self.name)):
            echoed = subject.completion if kind == "text" else subject.prompt
            if self.vlm.says_nothing(echoed):
                if kind == "text":
                    continue
                prompt = samples.prompts[row]
                raise UserError(f"reward '{self.name}': prompt {prompt.id!r} has no words to be scored: {echoed!r}")
            cases.append((question.case(prompt=subject.prompt, media=subject.pictures), echoed))
            rows.append(row)
        self.vlm.place(media_device(samples))
        scores: list[float | None] = [None] * len(samples)
        if cases:
            nll = self.vlm.answer_nll(cases, self.batch_size, self.system)
            for row, value in zip(rows, nll.tolist(), strict=True):
                scores[row] = -value
        return scores
