"""Completions behind prompts: continued from a cache that the rows of a prompt share, or run in full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from mmrl.types import Rows
from pipelines.vlm.inputs import Processed, Reader
from pipelines.vlm.media import Media
from pipelines.vlm.network import Network, position_ids


@dataclass(eq=False)
class Trace(Rows):
    """What followed each row's prompt; scored again from here.

    Attributes:
        prompts: N; rows of a group hold the same object.
        tokens: long ``[N, T]``, what the model said and, in dialogues, what was said to it in between.
        lengths: long ``[N]``, tokens that are there.
        positions: long ``[N, 1 or 3, T]``.
        types: long ``[N, T]``, 1 at place holders of pictures, 2 at those of clips.
        media: per row the pictures and clips among its tokens, in order.
    """

    prompts: list[Processed]
    tokens: Tensor
    lengths: Tensor
    positions: Tensor
    types: Tensor
    media: list[list[Media]]

    ragged: ClassVar[Mapping[str, int]] = {"tokens": 1, "positions": 2, "types": 1}

    def __len__(self) -> int:
        return len(self.prompts)

    def live(self, length: int) -> Tensor:
        """Bool ``[N, length]``: which tokens are there."""
        return torch.arange(length) < self.lengths[:, None]


def text_trace(prompts: Sequence[Processed], tokens: Tensor, lengths: Tensor) -> Trace:
    """The trace of completions that are text alone."""
    steps = torch.arange(tokens.shape[1])
    positions = [(steps + len(prompt) + prompt.delta).expand(len(prompt.positions), -1) for prompt in prompts]
    return Trace(
        list(prompts), tokens, lengths, torch.stack(positions), torch.zeros_like(tokens), [[] for _ in prompts]
    )


def joined_trace(
    reader: Reader, heads: Sequence[Processed], rest: Sequence[Sequence[tuple[Processed, bool]]]
) -> tuple[Trace, Tensor]:
    """The trace of conversations, and the tokens ``[N, T]`` of it that are the model's to say.

    Args:
        heads: prompts.
        rest: per row what followed, in order, each part with whether the model says it; parts may hold pictures.
    """
    lengths = torch.tensor([sum(len(part) for part, _ in parts) for parts in rest])
    rows, width = len(heads), int(lengths.max())
    tokens, mask = torch.zeros(rows, width, dtype=torch.long), torch.zeros(rows, width, dtype=torch.bool)
    types, positions = torch.zeros_like(tokens), torch.zeros(rows, len(heads[0].positions), width, dtype=torch.long)
    media = []
    for i, (head, parts) in enumerate(zip(heads, rest, strict=True)):
        begin = 0
        for part, counts in parts:
            place = slice(begin, begin + len(part))
            tokens[i, place], mask[i, place] = part.ids, counts
            types[i, place] = part.types
            begin += len(part)
        media.append([one for part, _ in parts for one in part.media])
        positions[i, :, :begin] = reader.positions_after(head, tokens[i, :begin], types[i, :begin], media[i])
    return Trace(list(heads), tokens, lengths, positions, types, media), mask


def unique_prompts(prompts: Sequence[Processed]) -> tuple[list[Processed], Tensor]:
    """The distinct prompt objects, and the place among them of each row's, long ``[N]``."""
    place: dict[int, int] = {}
    distinct = []
    for prompt in prompts:
        if id(prompt) not in place:
            place[id(prompt)] = len(distinct)
            distinct.append(prompt)
    return distinct, torch.tensor([place[id(prompt)] for prompt in prompts])


def select_rows(cache: Any, rows: Tensor) -> None:
    """Let a cache hold the rows ``rows``, of which some may come often; gradients flow through it."""
    for layer in cache.layers:
        # Layers of linear attention have no such method of their own; what they call reordering does the same.
        getattr(layer, "batch_select_indices", layer.reorder_cache)(rows)


def read_only(cache: Any) -> None:
    """Keep layers of linear attention from writing over the states that a backward pass still needs.

    What the next tokens leave in such a cache is then wrong, so that it serves for one more forward alone.
    """
    for layer in cache.layers:
        if hasattr(layer, "update_recurrent_state"):
            layer.update_recurrent_state = lambda states, *args, **kwargs: states


def begin(network: Network, prompts: Sequence[Processed], share: bool) -> tuple[Tensor, Any, Tensor]:
    """Run the prompts of rows, with ``share`` equal ones once: last states ``[N, H]``, cache and mask ``[N, P]``."""
    distinct, place = unique_prompts(prompts) if share else (prompts, None)
    state, cache, mask = network.prefill(distinct)
    if place is not None and len(distinct) < len(prompts):
        place = place.to(network.device)
        select_rows(cache, place)
        state, mask = state[place], mask[place]
    return state, cache, mask


def states_shared(network: Network, trace: Trace) -> Tensor:
    """Hidden states ``[N, T, H]``: entry t is what token t is predicted from. Each prompt runs once."""
    device = network.device
    prompts, place = unique_prompts(trace.prompts)
    last, cache, prompt_mask = network.prefill(prompts)
    place = place.to(device)
    if len(prompts) < len(place):
        select_rows(cache, place)
    if torch.is_grad_enabled():
        read_only(cache)
    first = last[place][:, None]
    length = int(trace.lengths.max())
    if length == 1:
        return first
    live = trace.live(length - 1).to(device, prompt_mask.dtype)
    states, _ = advance(
        network,
        cache,
        trace.tokens[:, : length - 1],
        trace.positions[:, :, : length - 1],
        torch.cat([prompt_mask[place], live], 1),
        [media for row in trace.media for media in row],
        trace.types[:, : length - 1],
    )
    return torch.cat([first, states], 1)


def advance(
    network: Network,
    cache: Any,
    tokens: Tensor,
    positions: Tensor,
    mask: Tensor,
    media: Sequence[Media] = (),
    types: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """Go on from a cache by ``tokens [N, t]`` at ``positions [N, 1 or 3, t]``; returns states ``[N, t, H]`` and cache.

    ``mask [N, P + t]`` says which tokens of cache and input are there; ``media`` fill the place holders of the input.
    """
    device = network.device
    inputs: dict[str, Any] = network.media_inputs(media)
    if media and types is not None:
        inputs["mm_token_type_ids"] = types.to(device)
    return network.hidden(
        input_ids=tokens.to(device),
        attention_mask=mask,
        position_ids=position_ids(positions.to(device)),
        past_key_values=cache,
        use_cache=True,
        **inputs,
    )


def extend(
    network: Network,
    cache: Any,
    mask: Tensor,
    ids: Sequence[Tensor],
    positions: Sequence[Tensor],
    media: Sequence[Media] = (),
    types: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Any, Tensor]:
    """Let each row's cache go on by its own tokens, with pictures: what a dialogue does between turns.

    Args:
        mask: ``[N, S]``, which of the cached tokens are there.
        ids: per row long ``[t_i]``, at least one, padded here on the left.
        positions: per row ``[1 or 3, t_i]``.
        media: of all rows, in order.
        types: per row ``[t_i]``, see :class:`Trace`.

    Returns:
        hidden state ``[N, H]`` of each last token, the cache, and its mask ``[N, S + t]``.
    """
    longest = max(len(row) for row in ids)
    tokens = torch.full((len(ids), longest), int(ids[0][-1]))
    there, kinds = torch.zeros_like(tokens), torch.zeros_like(tokens)
    places = torch.zeros(len(ids), len(positions[0]), longest, dtype=torch.long)
    for i, row in enumerate(ids):
        tail = slice(longest - len(row), longest)
        tokens[i, tail], there[i, tail], places[i, :, tail] = row, 1, positions[i]
        if types is not None:
            kinds[i, tail] = types[i]
    mask = torch.cat([mask, there.to(mask.device, mask.dtype)], 1)
    states, cache = advance(network, cache, tokens, places, mask, media, kinds)
    return states[:, -1], cache, mask


def states_plain(network: Network, trace: Trace) -> Tensor:
    """The same as :func:`states_shared` by running every row in full."""
    device = network.device
    inputs: dict[str, Any] = network.padded(trace.prompts)
    length = int(trace.lengths.max())
    prompt_length = inputs["input_ids"].shape[1]
    live = trace.live(length)
    tokens = torch.where(live, trace.tokens[:, :length], int(trace.prompts[0].ids[-1]))
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens.to(device)], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], live.to(device, torch.long)], 1)
    after = position_ids(trace.positions[:, :, :length].to(device))
    inputs["position_ids"] = torch.cat([inputs["position_ids"], after], -1)
    for key, text in network.text_type.items():
        if key in inputs:
            types = trace.types[:, :length]
            inputs[key] = torch.cat([inputs[key], torch.where(types > 0, types, text).to(device)], 1)
    network.counters["prefill_rows"] += len(trace)
    media = [one for prompt, row in zip(trace.prompts, trace.media, strict=True) for one in (*prompt.media, *row)]
    states, _ = network.hidden(**inputs, **network.media_inputs(media))
    return states[:, prompt_length - 1 : -1]
