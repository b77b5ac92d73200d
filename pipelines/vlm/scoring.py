"""Scoring recorded tokens: through the shared prompt where that is exact, else every row in full."""

from __future__ import annotations

import logging
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
        self._checked: set[bool] = {False, True} if share == "always" else set()

    def __call__(
        self, trace: Trace, mask: Tensor, temperature: float = 1.0, banned: Tensor | None = None, entropy: bool = False
    ) -> Scores:
        """Score the tokens ``mask [N, T]`` of a trace, up to the longest row, with gradient if enabled."""
        return self._of_states(self._states(trace), trace, mask, temperature, banned, entropy)

    @torch.no_grad()
    def check(self, trace: Trace, mask: Tensor, sampled: Tensor, temperature: float, banned: Tensor | None) -> None:
        """Compare sampled log-probs ``[N, T]`` at the model's tokens ``mask``, and the shared run, with a full run.

        Done for a few rows of the first rollout, and again once pictures have come in between. The work counters stay
        as they were.
        """
        pictures = any(trace.media)
        if pictures in self._checked:
            return
        self._checked.add(pictures)
        rows = [i for i, media in enumerate(trace.media) if media][:4] if pictures else _varied_rows(trace)
        few, mask = trace[rows], mask[rows]
        before = dict(self.network.counters)
        full = self._of_states(states_plain(self.network, few), few, mask, temperature, banned, False).logp
        largest, exact = self._compare(full, sampled[rows][:, : full.shape[1]])
        kind = type(self.network.model).__name__
        if not exact:
            self.resample = True
            log.warning(
                "%s: sampling with a cache is not exact (log-probs differ by up to %.2g), so log-probs "
                "of rollouts come from a full run",
                kind,
                largest,
            )
        if self.sharing is None or (pictures and self.sharing and not self.network.needs_full_run(few)):
            states = states_shared(self.network, few)
            shared = self._of_states(states, few, mask, temperature, banned, False).logp
            largest, self.sharing = self._compare(full, shared)
            if not self.sharing:
                log.warning(
                    "%s: the shared prompt is not exact (log-probs differ by up to %.2g), so updates run every row in "
                    "full; share_prefix: never leaves out this check",
                    kind,
                    largest,
                )
        self.network.counters.clear()
        self.network.counters.update(before)

    def _states(self, trace: Trace) -> Tensor:
        """Hidden states ``[N, t, H]`` that each token is predicted from."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            with training.checkpointing(self.network.model):
                return states_plain(self.network, trace)
        if self.sharing is False or self.network.needs_full_run(trace):
            return states_plain(self.network, trace)
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


def _varied_rows(trace: Trace, prompts: int = 3, rows: int = 2) -> list[int]:
    """Rows of the prompts of most unlike length, since padding is where things go wrong; with pictures first."""
    groups: dict[int, list[int]] = {}
    for i, prompt in enumerate(trace.prompts):
        groups.setdefault(id(prompt), []).append(i)
    ranked = sorted(groups.values(), key=lambda own: (not trace.prompts[own[0]].media, len(trace.prompts[own[0]])))
    chosen = dict.fromkeys([0, len(ranked) // 2, len(ranked) - 1][:prompts])
    return [i for number in chosen for i in ranked[number][:rows]]
