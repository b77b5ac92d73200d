"""Scoring recorded tokens: through the shared prompt where that is exact, else every row in full."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pipelines.vlm import training
from pipelines.vlm.network import Network
from pipelines.vlm.prefix import Trace, states_plain, states_shared
from pipelines.vlm.token_logps import token_logps
from pipelines.vlm.training import ValueHead

log = logging.getLogger(__name__)

Share = Literal["auto", "always", "never"]
# Differences of log-probs that rounding explains: the largest in float32 (log-probs of rare tokens are about -20), the
# mean in shorter formats.
EXACT_FLOAT32 = 1e-4
EXACT_SHORT = 0.05


@dataclass
class Scores:
    """Per token that is there, else 0, ``[N, t]``: log-probs, and entropies and values where they were asked for."""

    logp: Tensor
    entropy: Tensor | None = None
    value: Tensor | None = None


class Scorer:
    """Scores traces.

    Args:
        network: the model.
        share: see :class:`pipelines.vlm.policy.VLMPolicy`.
        gradient_checkpointing: gradients run every row in full.
        value_head: of the policy, if it has one.
        logits_in_memory: logits held at a time.

    Attributes:
        sharing: whether prompts are shared; None until the check.
        resample: whether what the cache gives when sampling differs from full runs, so that log-probs of rollouts must
            come from a full run.
    """

    def __init__(
        self,
        network: Network,
        share: Share,
        gradient_checkpointing: bool,
        value_head: ValueHead | None,
        logits_in_memory: int,
    ):
        self.network = network
        self.sharing: bool | None = {"auto": None, "always": True, "never": False}[share]
        self.resample = False
        self.gradient_checkpointing = gradient_checkpointing
        self.value_head = value_head
        self.logits_in_memory = logits_in_memory
        # Whether there are pictures after prompts, which is worth a check of its own.
        kinds = {False, True}
        self._sampling_checked: set[bool] = set() if share != "always" else kinds
        self._sharing_checked: set[bool] = set() if share == "auto" else kinds

    def __call__(
        self, trace: Trace, mask: Tensor, temperature: float = 1.0, banned: Tensor | None = None, entropy: bool = False
    ) -> Scores:
        """Score the tokens ``mask [N, T]`` of a trace, up to the longest row, with gradient if enabled."""
        return self._of_states(self._states(trace), trace, mask, temperature, banned, entropy)

    def check_sampling(
        self, trace: Trace, mask: Tensor, sampled: Tensor, temperature: float, banned: Tensor | None
    ) -> None:
        """Compare log-probs ``[N, T]`` recorded when sampling the tokens ``mask`` with a full run of a few rows.

        Done for the first rollout, and again for the first with pictures after its prompts.
        """
        pictures = any(trace.media)
        if pictures in self._sampling_checked:
            return
        self._sampling_checked.add(pictures)
        rows = _varied_rows(trace)
        with self._aside():
            full = self._logps(states_plain, trace[rows], mask[rows], temperature, banned)
        largest, exact = self._compare(full, sampled[rows][:, : full.shape[1]])
        if not exact:
            self.resample = True
            log.warning(
                "%s: sampling with a cache is not exact (log-probs differ by up to %.2g), so log-probs "
                "of rollouts come from a full run",
                type(self.network.model).__name__,
                largest,
            )

    def _check_sharing(self, trace: Trace) -> None:
        """Compare the shared run with a full run of a few rows; once, and once for pictures after prompts."""
        self._sharing_checked.add(any(trace.media))
        few = trace[_varied_rows(trace)]
        with self._aside():
            mask = few.live(few.tokens.shape[1])
            full, shared = (self._logps(states, few, mask, 1.0, None) for states in (states_plain, states_shared))
        largest, self.sharing = self._compare(full, shared)
        if not self.sharing:
            log.warning(
                "%s: the shared prompt is not exact (log-probs differ by up to %.2g), so updates run every row in "
                "full; share_prefix: never leaves out this check",
                type(self.network.model).__name__,
                largest,
            )

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Inside, nothing is counted and there are no gradients."""
        counters = self.network.counters
        before = dict(counters)
        with torch.no_grad():
            yield
        counters.clear()
        counters.update(before)

    def _logps(
        self,
        states: Callable[[Network, Trace], Tensor],
        trace: Trace,
        mask: Tensor,
        temperature: float,
        banned: Tensor | None,
    ) -> Tensor:
        return self._of_states(states(self.network, trace), trace, mask, temperature, banned, False).logp

    def _states(self, trace: Trace) -> Tensor:
        """Hidden states ``[N, t, H]`` that each token is predicted from."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            with training.checkpointing(self.network.model):
                return states_plain(self.network, trace)
        nothing_to_share = len({id(prompt) for prompt in trace.prompts}) == len(trace)
        if nothing_to_share or self.sharing is False or self.network.needs_full_run(trace):
            return states_plain(self.network, trace)
        if any(trace.media) not in self._sharing_checked:
            self._check_sharing(trace)
            return self._states(trace)
        return states_shared(self.network, trace)

    def _of_states(
        self, states: Tensor, trace: Trace, mask: Tensor, temperature: float, banned: Tensor | None, entropy: bool
    ) -> Scores:
        device, length = states.device, states.shape[1]
        mask, tokens = mask[:, :length].to(device), trace.tokens[:, :length].to(device)
        logp, found = token_logps(
            states[mask],
            tokens[mask],
            self.network.logits,
            temperature,
            None if banned is None else banned.to(device),
            entropy,
            self.logits_in_memory,
            self.network.vocabulary,
        )

        def spread(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, device=device).masked_scatter(mask, values)

        value = None if self.value_head is None else self.value_head(states) * mask
        return Scores(spread(logp), spread(found) if entropy else None, value)

    def _compare(self, a: Tensor, b: Tensor) -> tuple[float, bool]:
        """The largest difference, and whether rounding explains it."""
        gap = (a - b).abs()
        whole = self.network.dtype == torch.float32 and not torch.is_autocast_enabled(a.device.type)
        exact = gap.max() <= EXACT_FLOAT32 if whole else gap.mean() <= EXACT_SHORT
        return float(gap.max()), bool(exact)


def _varied_rows(trace: Trace, rows: int = 2) -> list[int]:
    """A few rows of unlike prompts, since padding is where things go wrong: the shortest, a middle and the longest one,
    those with pictures first; and a row with pictures after its prompt."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(trace.prompts):
        groups.setdefault(id(prompt), []).append(i)
    ranked = sorted(groups.values(), key=lambda own: (not trace.prompts[own[0]].media, len(trace.prompts[own[0]])))
    chosen = dict.fromkeys([0, len(ranked) // 2, len(ranked) - 1])
    found = [i for number in chosen for i in ranked[number][:rows]]
    found += [i for i, media in enumerate(trace.media) if media][:1]
    return sorted(set(found))
