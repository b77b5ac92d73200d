"""The sampling loop: one token of every row at a time, from prompts that were run once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmrl.types import widened
from pipelines.vlm.network import Network
from pipelines.vlm.prefix import select_rows
from pipelines.vlm.token_logps import scaled_logits


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        max_new_tokens: longest completion.
        temperature: 0 takes the likeliest token.
        top_p, top_k: limits of the drawn set; 1.0 and 0 are no limits. Log-probs are those of the whole distribution.
        stop: completions end with these.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()


@dataclass
class Completions:
    """What was drawn for N rows; 0 beyond a row's length.

    Attributes:
        tokens, logp: ``[N, T]``; the log-probs are on the device.
        lengths: long ``[N]``.
        truncated: bool ``[N]``, cut by the limit.
        value: ``[N, T]`` predicted returns, from a policy with a value head.
        cache, mask: only if asked for: the cache to go on from, and which of its tokens ``[N, S]`` are there. The last
            token of each row is drawn, but not in the cache yet.
    """

    tokens: Tensor
    logp: Tensor
    lengths: Tensor
    truncated: Tensor
    value: Tensor | None = None
    cache: Any = None
    mask: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence[Completions]) -> Completions:
        """Join row-wise, as wide as the widest; caches are left behind."""
        width = max(part.tokens.shape[1] for part in parts)
        value = None if parts[0].value is None else torch.cat([widened(part.value, width) for part in parts])
        return cls(
            torch.cat([widened(part.tokens, width) for part in parts]),
            torch.cat([widened(part.logp, width) for part in parts]),
            torch.cat([part.lengths for part in parts]),
            torch.cat([part.truncated for part in parts]),
            value,
        )


class Decoder:
    """Draws completions.

    Args:
        network: the model.
        eos: ids that end a completion, long ``[E]``.
        banned: ids that are never drawn, long ``[X]``, or None.
        tokenizer: finds stop strings.
    """

    def __init__(self, network: Network, eos: Tensor, banned: Tensor | None, tokenizer: Any):
        self.network = network
        self.eos = eos
        self.banned = banned
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(
        self,
        state: Tensor,
        cache: Any,
        mask: Tensor,
        next_position: Tensor,
        axes: int,
        uniforms: Tensor,
        sampling: Sampling,
        value_head: Callable[[Tensor], Tensor] | None = None,
        limits: Tensor | None = None,
        keep_cache: bool = False,
    ) -> Completions:
        """Continue N rows until each has ended or reached its limit.

        Args:
            state: ``[N, H]`` hidden state of each row's last token.
            cache: of N rows.
            mask: ``[N, P]`` which of the cached tokens are there.
            next_position: long ``[N]``.
            axes: 1, or 3 for positions in three dimensions.
            uniforms: ``[N, T]`` in [0, 1): row k's token t is drawn with ``uniforms[k, t]`` alone.
            limits: long ``[N]``, tokens allowed per row, at least 1; the default is ``max_new_tokens``.
            keep_cache: give back the cache, for dialogues that go on; rows that are done then stay until the end.
        """
        device = self.network.device
        rows, steps = len(state), sampling.max_new_tokens
        eos, banned = self.eos.to(device), None if self.banned is None else self.banned.to(device)
        uniforms, next_position = uniforms.to(device), next_position.to(device)
        tokens = torch.zeros(rows, steps, dtype=torch.long, device=device)
        logp = torch.zeros(rows, steps, device=device)
        value = torch.zeros(rows, steps, device=device) if value_head is not None else None
        limits = torch.full((rows,), steps) if limits is None else limits
        limits = limits.to(device)
        lengths, ended = limits.clone(), torch.zeros(rows, dtype=torch.bool, device=device)
        live, going = torch.arange(rows, device=device), torch.ones(rows, dtype=torch.bool, device=device)
        # Tokens that rows draw after their end are seen by themselves alone, so they matter only to dialogues.
        length, padded = mask.shape[1], keep_cache or not bool(mask.all())
        there = torch.cat([mask.bool(), mask.new_ones(rows, steps, dtype=torch.bool)], 1)
        for step in range(int(limits.max())):
            scaled = scaled_logits(self.network.logits(state), sampling.temperature or 1.0, banned)
            drawn = draw(scaled, uniforms[live, step], sampling)
            tokens[live, step] = drawn
            logp[live, step] = scaled.gather(-1, drawn[:, None])[:, 0] - scaled.logsumexp(-1)
            if value is not None:
                value[live, step] = value_head(state)
            over = torch.isin(drawn, eos)
            if sampling.stop:
                over |= self._stopped(tokens[live, : step + 1], sampling.stop)
            ended[live] |= over & going
            lengths[live] = torch.where(over & going, step + 1, lengths[live])
            going = going & ~over & (limits[live] > step + 1)
            left = int(going.sum())
            if left == 0:
                break
            if 2 * left <= len(live) and not keep_cache:
                # Rows that are done cost as much as the others, so they leave once half are; what the remaining ones
                # draw meanwhile is forgotten.
                keep = going.nonzero()[:, 0]
                select_rows(cache, keep)
                live, going, there, drawn = live[keep], going[keep], there[keep], drawn[keep]
            length += 1
            there[:, length - 1] = going if keep_cache else True
            position = (next_position[live] + step)[:, None].expand(-1, axes)
            state, cache = self.network.step(drawn, position, there[:, :length] if padded else None, cache)
        found = self._finished(tokens, logp, lengths, ended, value)
        if keep_cache:
            found.cache, found.mask = cache, there[:, :length].to(mask.dtype)
        return found

    def _stopped(self, tokens: Tensor, stop: Sequence[str]) -> Tensor:
        # A stop string of n characters can take up n tokens and may begin inside the first of them.
        tail = tokens[:, -(max(len(word) for word in stop) + 1) :]
        texts = self.tokenizer.batch_decode(tail)
        return torch.tensor([any(word in text for word in stop) for text in texts], device=tokens.device)

    def _finished(
        self, tokens: Tensor, logp: Tensor, lengths: Tensor, ended: Tensor, value: Tensor | None
    ) -> Completions:
        longest = int(lengths.max())
        there = torch.arange(longest, device=tokens.device) < lengths[:, None]
        tokens = tokens[:, :longest].masked_fill(~there, 0)
        logp = logp[:, :longest].masked_fill(~there, 0.0)
        value = None if value is None else value[:, :longest].masked_fill(~there, 0.0)
        return Completions(tokens.cpu(), logp, lengths.cpu(), ~ended.cpu(), value)


def draw(scaled: Tensor, uniform: Tensor, sampling: Sampling) -> Tensor:
    """One id ``[N]`` a row of ``scaled [N, V]`` log-weights, by inversion of the cumulative distribution.

    ``uniform [N]`` in [0, 1) decides alone, so that a row's draw does not depend on its batch.
    """
    if sampling.temperature == 0:
        return scaled.argmax(-1)
    weights, ids = scaled, None
    if sampling.top_k and sampling.top_k < scaled.shape[-1]:
        weights, ids = scaled.topk(sampling.top_k, -1)
    elif sampling.top_p < 1:
        weights, ids = scaled.sort(-1, descending=True)
    probabilities = weights.softmax(-1)
    if sampling.top_p < 1:
        # The smallest set that reaches top_p: a token stays if those before it do not reach it.
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= sampling.top_p, 0.0)
    cumulative = probabilities.double().cumsum(-1)
    target = uniform.double()[:, None] * cumulative[:, -1:]
    # The target is below the total, however it is rounded, so that the place has a probability; unless all is NaN.
    place = torch.searchsorted(cumulative, target, right=True).clamp_(max=cumulative.shape[-1] - 1)
    return place[:, 0] if ids is None else ids.gather(-1, place)[:, 0]
