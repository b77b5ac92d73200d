"""Rollouts of completions that are given: ground truth, hinted answers, replayed ones, the two answers of a pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mmrl.errors import UserError
from mmrl.types import Prompt, Rollout, Samples
from pipelines.vlm.prefix import joined_trace

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
