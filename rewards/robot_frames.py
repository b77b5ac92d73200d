"""Rewards of episodes by what their pictures look like to a CLIP-type model."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from rewards.clip import BatchSize
from rewards.encoders import Backend, Dtype, load_encoder
from rewards.robot import pictures_of

Share = Annotated[float, Field(ge=0, le=1)]


class GoalSimilarity:
    """How much the pictures of an episode look like its goal in words.

    Of a picture s, the goal g and a baseline b (unit vectors of the model), as in VLM-RM (arXiv 2310.12921)::

        similarity = 1 - |P (s - g)|^2 / 2,    P = alpha * (projection on the direction g - b) + (1 - alpha) * identity

    which without a baseline is the cosine of s and g. With a ``negative`` goal it is contrasted as in VLM-RL (arXiv
    2412.15544): ``(1 - negative_weight) * similarity - negative_weight * cosine(s, negative)``.

    Args:
        goal: what the end should look like, such as "a robot arm that holds a red cube"; default, each prompt's text.
        baseline: what it looks like in any case, such as "a robot arm".
        alpha: how much of the difference between s and g off that direction is ignored.
        negative: what it should not look like.
        negative_weight: see above.
        of: each turn earns its "progress", the similarity after it less the one before, so that an episode's score is
            that of its end less that of its start; or the similarity after it ("each"); or only the "last" one counts.
        model, backend, checkpoint, processor, dtype, device: see :class:`rewards.clip.ClipSimilarity`.
        batch_size: pictures per forward; those of all episodes are encoded together.
    """

    name = "goal_similarity"
    differentiable = False
    partial = False

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        goal: str = "",
        baseline: str = "",
        alpha: Share = 0.5,
        negative: str = "",
        negative_weight: Share = 0.5,
        of: Literal["progress", "each", "last"] = "progress",
        backend: Backend = "transformers",
        checkpoint: str | None = None,
        processor: str | None = None,
        batch_size: BatchSize = 32,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        self.encoder = load_encoder(model, backend, checkpoint, processor, dtype, device)
        self.goal, self.baseline, self.alpha = goal, baseline, alpha
        self.negative, self.negative_weight = negative, negative_weight
        self.of, self.batch_size = of, batch_size

    def __call__(self, samples: Samples) -> Tensor:
        """``[N]``, the sums over turns."""
        return torch.tensor([sum(parts) for parts in self.turns(samples)], dtype=torch.float32)

    def turns(self, samples: Samples) -> list[list[float]]:
        """What each turn earned, for credit turn by turn (see :meth:`mmrl.scoring.Scorer.turns`)."""
        found = self.potentials(samples)
        if self.of == "progress":
            return [one.diff().tolist() for one in found]
        if self.of == "each":
            return [one[1:].tolist() for one in found]
        return [[*[0.0] * (len(one) - 2), one[-1].item()] for one in found]

    @torch.no_grad()
    def potentials(self, samples: Samples) -> list[Tensor]:
        """Of each episode the similarities ``[C + 1]``, float64, before each turn and at the end.

        Raises:
            UserError: the samples are no episodes, have no pictures, or no goal.
        """
        films = pictures_of(samples, self.name)
        counts = [len(film) for film in films]
        # In parts, since as real numbers all pictures at once take four times the room.
        parts = [self.encoder.images(part / 255, self.batch_size) for part in torch.cat(films).split(self.batch_size)]
        pictures = torch.cat(parts).double().cpu()
        owner = torch.arange(len(films)).repeat_interleave(torch.tensor(counts))
        goals = self._texts([self._goal(prompt) for prompt in samples.prompts])[owner]
        return list(self._similarity(pictures, goals).split(counts))

    def _similarity(self, pictures: Tensor, goals: Tensor) -> Tensor:
        gaps = pictures - goals
        if self.baseline:
            direction = torch.nn.functional.normalize(goals - self._texts([self.baseline]), dim=-1)
            along = (gaps * direction).sum(-1, keepdim=True) * direction
            gaps = self.alpha * along + (1 - self.alpha) * gaps
        found = 1 - gaps.square().sum(-1) / 2
        if self.negative:
            unwanted = (pictures * self._texts([self.negative])).sum(-1)
            found = (1 - self.negative_weight) * found - self.negative_weight * unwanted
        return found

    def _goal(self, prompt: Prompt) -> str:
        if not (self.goal or prompt.text):
            raise UserError(f"reward '{self.name}': prompt '{prompt.id}' has no text, so the option 'goal' is needed")
        return self.goal or prompt.text

    def _texts(self, texts: list[str]) -> Tensor:
        return self.encoder.texts(texts, self.batch_size).double().cpu()
