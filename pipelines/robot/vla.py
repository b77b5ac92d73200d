"""Small vision-language-action networks: pictures and instruction make a prefix, action tokens attend to it.

The layout is that of pi0 and SmolVLA (arXiv 2410.24164, 2506.01844): an *encoder* reads picture and instruction once a
turn; an *expert* of its own weights reads actions, layer by layer beside the encoder's layers. The encoder never sees
actions, so what it made is shared by all denoising steps, or by all tokens that are decoded, in rollout and update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrl.errors import UserError, nearest
from mmrl.types import Rows
from mmrl.world.captions import vocabulary
from pipelines.robot.networks import Spaces, TimeEmbedding
from pipelines.robot.vision import Backbone, ConvStem, Layer

if TYPE_CHECKING:
    from pipelines.robot.envs import Observation

WORDS: tuple[str, ...] = tuple(sorted({*vocabulary(), "the", "to", "reach", "push", "puck"}))
"""Words of the instructions of the planar family."""


@dataclass(frozen=True)
class ExpertSize:
    """Sizes of an expert: width of a token (a multiple of ``heads``), layers, heads."""

    width: Annotated[int, Field(ge=8)] = 64
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 4


@dataclass(frozen=True)
class Memory:
    """Shape of a prefix: width M of its tokens, L layers, P numbers of state."""

    width: int
    layers: int
    state_dim: int


@dataclass(eq=False)
class Prefix(Rows):
    """What an encoder makes of n observations, for action tokens to attend to.

    Attributes:
        states: ``[n, L, S, M]``, S tokens as each of L layers knows them.
        mask: bool ``[n, S]``, the tokens that are there.
        state: ``[n, P]``, numbers that the robot knows of itself; P may be 0.
        following: long ``[n, 1 or 3]``, the position of what comes next, for models that go on from here themselves.
    """

    states: Tensor
    mask: Tensor
    state: Tensor
    following: Tensor | None = None

    def __len__(self) -> int:
        return len(self.states)

    def repeat_interleave(self, repeats: int, dim: int = 0) -> Prefix:
        """Each row so many times, as for a tensor."""
        own = (self.states, self.mask, self.state, self.following)
        return Prefix(*(None if part is None else part.repeat_interleave(repeats, dim) for part in own))

    def pooled(self) -> Tensor:
        """``[n, M + P]``: the mean of the last layer's tokens, and the state."""
        there = self.mask[:, :, None].to(self.states.dtype)
        mean = (self.states[:, -1] * there).sum(1) / there.sum(1)
        return torch.cat([mean, self.state], 1)


class SceneEncoder(nn.Module):
    """Picture and, where there is one, instruction, through a small transformer.

    Args:
        spaces: of the environment.
        width, layers, heads: of the transformer.
        backbone: folder or hub id of a vision model of transformers that reads the picture in place of a convolutional
            stem; see :class:`pipelines.robot.vision.Backbone`.
        freeze_backbone: it does not train.
        words: that instructions are made of, beside those of the planar family.
        max_words: longest instruction; all are filled up to it, so that a row's numbers do not depend on its batch. 0
            leaves instructions unread.
        use_state: the state counts as well.
        pool: give the mean over tokens, for action heads that are MLPs, instead of all tokens for an expert.
        expert: sizes of the network that reads actions.
    """

    def __init__(
        self,
        spaces: Spaces,
        width: Annotated[int, Field(ge=8)] = 64,
        layers: Annotated[int, Field(ge=1)] = 2,
        heads: Annotated[int, Field(ge=1)] = 4,
        backbone: str | None = None,
        freeze_backbone: bool = True,
        words: Sequence[str] = (),
        max_words: Annotated[int, Field(ge=0)] = 8,
        use_state: bool = True,
        pool: bool = False,
        expert: ExpertSize = ExpertSize(),
    ):
        super().__init__()
        if spaces.image_shape is None:
            raise UserError("network 'scene' reads pictures, but the environment shows none: set its image size")
        if width % heads or width % 4:
            raise UserError(f"network.width is {width}, but should be a multiple of 4 and of network.heads, {heads}")
        self.picture: nn.Module = ConvStem(spaces.image_shape, width)
        if backbone is not None:
            found = Backbone(backbone, freeze_backbone)
            self.picture = nn.Sequential(found, nn.Linear(found.width, width))
        self.ids = {word: number for number, word in enumerate(dict.fromkeys([*WORDS, *words]), start=1)}
        self.max_words = max_words
        self.words = nn.Embedding(len(self.ids) + 1, width)
        self.word_places = nn.Parameter(0.02 * torch.randn(max_words, width))
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.memory = Memory(width, layers, spaces.state_dim if use_state else 0)
        self.pool, self.size = pool, expert
        self.context_dim = width + self.memory.state_dim

    def forward(self, observation: Observation) -> Prefix | Tensor:
        """The prefix of n observations, or with ``pool`` ``[n, context_dim]``.

        Raises:
            UserError: an instruction is too long or has a word that is not known.
        """
        tokens = self.picture(observation.image)
        texts = observation.instruction or [""] * len(tokens)
        ids = torch.stack([self.word_ids(text) for text in texts]).to(tokens.device)
        mask = torch.cat([ids.new_ones(tokens.shape[:2]), ids], 1) > 0
        tokens = torch.cat([tokens, self.words(ids) + self.word_places], 1)
        states = []
        for layer in self.layers:
            tokens = layer(tokens, mask[:, None, None])
            states.append(tokens)
        prefix = Prefix(
            torch.stack(states, 1), mask, own_state(observation, self.memory.state_dim, tokens, len(tokens))
        )
        return prefix.pooled() if self.pool else prefix

    def word_ids(self, text: str) -> Tensor:
        """Long ``[max_words]``, 0 behind the end."""
        found = text.lower().split() if self.max_words else []
        for word in found:
            if word not in self.ids:
                raise UserError(f"instruction '{text}': network.words has no '{word}'{nearest(word, self.ids)}")
        if len(found) > self.max_words:
            raise UserError(f"instruction '{text}' has {len(found)} words: network.max_words is {self.max_words}")
        return torch.tensor([self.ids[word] for word in found] + [0] * (self.max_words - len(found)), dtype=torch.long)

    def chunk_network(self, horizon: int, action_dim: int, time_width: int) -> FlowExpert | None:
        """What a denoising head asks, with this encoder's prefix as context; None leaves that to the head."""
        return None if self.pool else FlowExpert(Expert(self.memory, horizon, self.size), action_dim, time_width)

    def token_network(self, queries: int, bins: int) -> TokenExpert | None:
        """What a token head asks, with this encoder's prefix as context; None leaves that to the head."""
        return None if self.pool else TokenExpert(Expert(self.memory, queries, self.size), bins)


class Expert(nn.Module):
    """A transformer over action tokens whose layers attend to those of a prefix.

    Layer i of n looks at layer ``i * memory.layers // n`` of the prefix.

    Args:
        memory: shape of the prefix.
        queries: action tokens.
        size: of the transformer.
    """

    def __init__(self, memory: Memory, queries: int, size: ExpertSize):
        super().__init__()
        if size.width % size.heads:
            raise UserError(f"expert.width is {size.width}, but should be a multiple of expert.heads, {size.heads}")
        self.width = size.width
        self.places = nn.Parameter(0.02 * torch.randn(queries, size.width))
        self.state_in = nn.Linear(memory.state_dim, size.width) if memory.state_dim else None
        self.layers = nn.ModuleList(Layer(size.width, size.heads, memory.width) for _ in range(size.layers))
        self.looks_at = [number * memory.layers // size.layers for number in range(size.layers)]
        self.norm = nn.LayerNorm(size.width)

    def forward(self, tokens: Tensor, prefix: Prefix, causal: bool = False) -> Tensor:
        """What becomes of the first Q action tokens.

        Args:
            tokens: ``[n, Q, width]`` without their positions.
            causal: no token sees those after it.
        """
        tokens = tokens + self.places[: tokens.shape[1]]
        if self.state_in is not None:
            tokens = torch.cat([self.state_in(prefix.state)[:, None], tokens], 1)
        mask = seen_by(prefix.mask, tokens.shape[1], causal)
        for layer, place in zip(self.layers, self.looks_at, strict=True):
            tokens = layer(tokens, mask, prefix.states[:, place])
        return self.norm(tokens if self.state_in is None else tokens[:, 1:])


class FlowExpert(nn.Module):
    """What a denoising head asks at every step, ``network(context, x, time) -> [n, H, D]``, by an expert.

    Args:
        expert: over H tokens, one for each action.
        action_dim: numbers of an action.
        time_width: of the time's embedding.
    """

    def __init__(self, expert: Expert, action_dim: int, time_width: int):
        super().__init__()
        self.expert = expert
        self.time = TimeEmbedding(time_width)
        self.time_in = nn.Linear(time_width, expert.width)
        self.action_in = nn.Linear(action_dim, expert.width)
        self.action_out = nn.Linear(expert.width, action_dim)

    def forward(self, context: Prefix, x: Tensor, time: Tensor) -> Tensor:
        """Velocity or noise ``[n, H, D]`` for noisy chunks ``x`` at times ``[n]``, 1 being noise."""
        tokens = self.action_in(x) + self.time_in(self.time(time))[:, None]
        return self.action_out(self.expert(tokens, context))


class TokenExpert(nn.Module):
    """What a token head asks, ``network(context, tokens) -> [n, Q, B]``, by an expert.

    Args:
        expert: over Q tokens.
        bins: B, values of a token.
    """

    def __init__(self, expert: Expert, bins: int):
        super().__init__()
        self.expert = expert
        self.values = nn.Embedding(bins, expert.width)
        self.start = nn.Parameter(torch.zeros(expert.width))
        self.out = nn.Linear(expert.width, bins)

    def forward(self, context: Prefix, tokens: Tensor | None = None) -> Tensor:
        """Logits of all Q tokens at once, or of tokens 0 to t, each from those before it.

        Args:
            tokens: long ``[n, t]``, those that are known, t < Q; None for all at once.
        """
        if tokens is None:
            empty = self.start.expand(len(context), len(self.expert.places), -1)
            return self.out(self.expert(empty, context))
        known = torch.cat([self.start.expand(len(context), 1, -1), self.values(tokens)], 1)
        return self.out(self.expert(known, context, causal=True))


def seen_by(prefix: Tensor, queries: int, causal: bool) -> Tensor:
    """Bool ``[n, 1, Q, S + Q]``: each query sees the prefix ``[n, S]`` and the queries, or those up to itself."""
    own = torch.ones(queries, queries, dtype=torch.bool, device=prefix.device)
    own = (own.tril() if causal else own).expand(len(prefix), -1, -1)
    return torch.cat([prefix[:, None].expand(-1, queries, -1), own], 2)[:, None]


def own_state(observation: Observation, state_dim: int, like: Tensor, n: int) -> Tensor:
    """The observed state ``[n, state_dim]``, or nothing of it with 0."""
    return observation.state.to(like) if state_dim else like.new_zeros(n, 0)
