"""Rollouts of completions that are given: ground truth, hinted answers, replayed ones, the two answers of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mmrl.errors import UserError
from mmrl.seeding import generator
from mmrl.types import Prompt, Rollout, Samples
from pipelines.vlm.inputs import Processed
from pipelines.vlm.prefix import begin, joined_trace

if TYPE_CHECKING:
    from pipelines.vlm.policy import VLMPolicy


def given(
    policy: VLMPolicy, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]], score: bool = True
) -> Rollout:
    """A rollout as if the policy had said ``completions``; each row is a group of its own.

    Args:
        prompts: N; prompts that are there twice are processed once and share their run.
        completions: per row a text, which gets the end token, or token ids as they are. Longer ones than
            ``max_new_tokens`` are cut and count as truncated.
        score: fill in log-probs and values under the policy as it is; without it they are 0.
    """
    end, limit = policy.answers.end_id(), policy.sampling.max_new_tokens
    ends = set(policy.eos.tolist())
    tokens, truncated = [], []
    for completion in completions:
        if isinstance(completion, str):
            said = policy.reader.answer_ids(completion).tolist() if completion else []
            ids = [*said, end]
        else:
            ids = list(completion)
        tokens.append(torch.tensor(ids[:limit], dtype=torch.long))
        truncated.append(ids[:limit][-1] not in ends)
    heads = policy.reader.read(prompts)
    trace, mask = joined_trace(policy.reader, heads, [[(policy.reader.plain(ids), True)] for ids in tokens])
    samples = Samples(
        list(prompts),
        texts=policy.decode(trace.tokens, trace.lengths),
        truncated=torch.tensor(truncated),
        lengths=trace.lengths,
        sizes=[head.sizes for head in heads],
        group=torch.arange(len(heads)),
    )
    mask = mask.to(policy.device)
    logp = torch.zeros(mask.shape, device=policy.device)
    rollout = Rollout(samples, logp, mask, samples.group, trace)
    if score:
        with torch.no_grad():
            found = policy.decisions(rollout)
        rollout.logp, rollout.value = found.logp, found.value
    return rollout


def completions(rollout: Rollout) -> list[list[int]]:
    """Token ids of each row, from which :func:`given` makes the row again.

    Raises:
        UserError: a row is a dialogue, which is more than what the model said.
    """
    trace, mask = rollout.trace, rollout.mask.cpu()
    if any(trace.media) or not torch.equal(mask, trace.live(mask.shape[1])):
        raise UserError("completions of dialogues with tools cannot be kept for replay, only plain answers can")
    return [row[:length] for row, length in zip(trace.tokens.tolist(), trace.lengths.tolist(), strict=True)]


@torch.no_grad()
def continued(
    policy: VLMPolicy, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], text: str, seeds: Sequence[int]
) -> list[list[int]]:
    """Completions without their end token, ``text`` behind them, and what the policy says next.

    Row k draws from ``seeds[k]`` alone. A row that leaves no room within ``max_new_tokens`` comes back as it was.
    """
    limit, ends = policy.sampling.max_new_tokens, set(policy.eos.tolist())
    trigger = policy.reader.answer_ids(text).tolist()
    begun = [[*(ids[:-1] if ids and ids[-1] in ends else ids), *trigger] for ids in map(list, completions)]
    out = [list(ids) for ids in completions]
    open_rows = [row for row, ids in enumerate(begun) if len(ids) < limit]
    heads = policy.reader.read([prompts[row] for row in open_rows]) if open_rows else []
    for first in range(0, len(open_rows), policy.rollout_batch_size):
        part = slice(first, first + policy.rollout_batch_size)
        rows = open_rows[part]
        wholes = [_extended(head, begun[row]) for head, row in zip(heads[part], rows, strict=True)]
        state, cache, mask = begin(policy.network, wholes, False)
        found = policy.decoder(
            state,
            cache,
            mask,
            torch.tensor([len(whole) + whole.delta for whole in wholes]),
            len(wholes[0].positions),
            torch.stack([torch.rand(limit, generator=generator(seeds[row], "continued")) for row in rows]),
            policy.sampling,
            limits=torch.tensor([limit - len(begun[row]) for row in rows]),
        )
        for k, row in enumerate(rows):
            out[row] = begun[row] + found.tokens[k, : int(found.lengths[k])].tolist()
    return out


def _extended(head: Processed, ids: Sequence[int]) -> Processed:
    """A prompt with text behind it, as one prompt."""
    more = torch.tensor(ids, dtype=torch.long)
    types = {
        key: torch.cat([values, torch.zeros_like(more, dtype=values.dtype)]) for key, values in head.token_types.items()
    }
    steps = (torch.arange(len(more)) + len(head) + head.delta).expand(len(head.positions), -1)
    return replace(
        head, ids=torch.cat([head.ids, more]), token_types=types, positions=torch.cat([head.positions, steps], 1)
    )
