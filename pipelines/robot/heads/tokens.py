"""Binned action tokens: every number of a chunk is a token of its own, and a decision (arXiv 2406.09246)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.types import Decisions
from pipelines.robot.heads.base import ActionHead, HeadShape, Sampled, chunk_error
from pipelines.robot.vla import Expert, ExpertSize, Memory, Prefix, TokenExpert


class TokenHead(ActionHead):
    """``H * D`` tokens a turn, each one of B bins of equal width in [-1, 1] whose centre is the action.

    Tokens of actions that were not executed are no decisions.

    Args:
        shape: of context and chunk.
        bins: B; an odd number has a bin for 0.
        decoding: ``parallel`` gives all tokens in one network call, independent of each other (OpenVLA-OFT,
            arXiv 2502.19645); ``autoregressive`` each from those before it.
        temperature: divides the logits, in sampling and in scoring.
        expert: sizes of the transformer over tokens, for encoders that do not bring one.
    """

    def __init__(
        self,
        shape: HeadShape,
        bins: Annotated[int, Field(ge=2)] = 256,
        decoding: Literal["parallel", "autoregressive"] = "parallel",
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        expert: ExpertSize = ExpertSize(),  # noqa: B008 (frozen)
    ):
        super().__init__()
        self.shape, self.bins, self.temperature = shape, bins, temperature
        self.parallel = decoding == "parallel"
        self.decisions_per_turn = shape.horizon * shape.action_dim
        # One more scores all tokens at once.
        self.steps = 1 if self.parallel else 1 + self.decisions_per_turn
        self.verbs = frozenset({"entropy"})
        brought = getattr(shape.encoder, "token_network", None)
        network = None if brought is None else brought(self.decisions_per_turn, bins)
        if network is None:
            memory = Memory(shape.context_dim, 1, 0)
            network = _OnTensors(TokenExpert(Expert(memory, self.decisions_per_turn, expert), bins))
        # ``network(context, tokens) -> [n, H * D, B]``, see :class:`pipelines.robot.vla.TokenExpert`.
        self.network = network

    def to_actions(self, tokens: Tensor) -> Tensor:
        """Centres ``[n, H, D]`` of the bins ``[n, H * D]``."""
        centres = (2 * tokens.float() + 1) / self.bins - 1
        return centres.unflatten(1, (self.shape.horizon, self.shape.action_dim))

    def to_tokens(self, actions: Tensor) -> Tensor:
        """Bins ``[n, H * D]`` of actions ``[n, H, D]``; what is beyond -1 or 1 falls into the last ones."""
        return ((actions.flatten(1) + 1) / 2 * self.bins).long().clamp(0, self.bins - 1)

    def log_probs(self, context: Any, tokens: Tensor | None, temperature: float) -> Tensor:
        """Log-probs ``[n, Q, B]`` of the values of all tokens, or if not parallel of those up to the first not said."""
        known = None if self.parallel else tokens[:, : self.decisions_per_turn - 1]
        return (self.network(context, known) / temperature).log_softmax(-1)

    def draw(self, turns: int, generator: torch.Generator, deterministic: bool = False) -> Tensor:
        """A uniform number for each token, none for the likeliest ones."""
        return torch.rand(turns, 0 if deterministic else self.decisions_per_turn, generator=generator)

    def sample(self, context: Any, draws: Tensor, deterministic: bool = False) -> Sampled:
        """See :meth:`ActionHead.sample`; the deterministic sampler takes the likeliest tokens."""

        def chosen(log_probs: Tensor, places: slice) -> Tensor:
            if deterministic:
                return log_probs.argmax(-1)
            below = log_probs.exp().cumsum(-1) <= draws[:, places, None]
            return below.sum(-1).clamp(max=self.bins - 1)

        tokens = torch.zeros(len(draws), 0, dtype=torch.long, device=draws.device)
        log_probs = None
        if self.parallel:
            log_probs = self.log_probs(context, None, self.temperature)
            tokens = chosen(log_probs, slice(None))
        else:
            for place in range(self.decisions_per_turn):
                last = self.log_probs(context, tokens, self.temperature)[:, -1:]
                tokens = torch.cat([tokens, chosen(last, slice(place, place + 1))], 1)
        if deterministic:
            return Sampled(self.to_actions(tokens), {})
        if log_probs is None:
            # As the scorer does it, all at once, so that the ratio of a replay is 1 to the last bit.
            log_probs = self.log_probs(context, tokens, self.temperature)
        return Sampled(self.to_actions(tokens), {"tokens": tokens}, _picked(log_probs, tokens))

    def logp(self, elements: Tensor, executed: Tensor) -> Tensor:
        """Those of tokens as they are; 0 for actions that were not executed."""
        return torch.where(self.mask(executed), elements, 0.0)

    def mask(self, executed: Tensor) -> Tensor:
        """Tokens of executed actions."""
        places = torch.arange(self.decisions_per_turn, device=executed.device)
        return places < executed[:, None] * self.shape.action_dim

    def decisions(
        self, context: Any, record: Mapping[str, Tensor], executed: Tensor, columns: Sequence[int] | None = None
    ) -> Decisions:
        """See :meth:`ActionHead.decisions`."""
        tokens = record["tokens"]
        log_probs = self.log_probs(context, tokens, self.temperature)
        found = Decisions(self.logp(_picked(log_probs, tokens), executed))
        if self.keep_entropy:
            found.entropy = self.logp(-(log_probs.exp() * log_probs).sum(-1), executed)
        return found if columns is None else found.columns(columns)

    def fit(self, context: Any, actions: Tensor, executed: Tensor, normals: Tensor) -> Tensor:
        """Mean cross-entropy of the tokens at temperature 1; nothing is drawn."""
        tokens = self.to_tokens(actions)
        return chunk_error(-_picked(self.log_probs(context, tokens, 1.0), tokens).view_as(actions), executed)

    def overview(self) -> str:
        """One line on what a decision is."""
        kind = "in parallel" if self.parallel else "one after the other"
        size = f"{self.shape.horizon} x {self.shape.action_dim}"
        return f"{self.decisions_per_turn} a turn ({size} tokens of {self.bins} bins, {kind})"


class _OnTensors(torch.nn.Module):
    """Lets a network that reads prefixes read contexts ``[n, context_dim]``, as prefixes of one token."""

    def __init__(self, network: TokenExpert):
        super().__init__()
        self.network = network

    def forward(self, context: Tensor, tokens: Tensor | None = None) -> Tensor:
        there = torch.ones(len(context), 1, dtype=torch.bool, device=context.device)
        return self.network(Prefix(context[:, None, None], there, context[:, :0]), tokens)


def _picked(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[:, :, None])[:, :, 0]
