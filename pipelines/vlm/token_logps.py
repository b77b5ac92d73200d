"""Log-probs of tokens from hidden states, without ever holding the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def scaled_logits(logits: Tensor, temperature: float, banned: Tensor | None) -> Tensor:
    """Float32 logits divided by the temperature, ``-inf`` at banned ids."""
    scaled = logits if temperature == 1.0 else logits / temperature
    return scaled if banned is None else scaled.index_fill(-1, banned, float("-inf"))


def token_logps(
    hidden: Tensor,
    tokens: Tensor,
    logits: Callable[[Tensor], Tensor],
    temperature: float = 1.0,
    banned: Tensor | None = None,
    with_entropy: bool = False,
    chunk: int = 1 << 24,
    vocabulary: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Log-probs ``[M]`` (float32) of ``tokens [M]`` and, if asked, entropies ``[M]`` of their distributions.

    Args:
        hidden: ``[M, H]``, the state from which each token is predicted.
        logits: the head, ``[m, H] -> [m, V]``.
        temperature, banned: see :func:`scaled_logits`.
        chunk: logits held at a time; more are computed in portions, again in the backward pass.
        vocabulary: V.
    """

    def portion(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        scaled = scaled_logits(logits(hidden), temperature, banned)
        total = scaled.logsumexp(-1)
        logp = scaled.gather(-1, tokens[:, None])[:, 0] - total
        if not with_entropy:
            return logp, logp
        probabilities = (scaled - total[:, None]).exp()
        finite = scaled if banned is None else scaled.index_fill(-1, banned, 0.0)
        return logp, total - (probabilities * finite).sum(-1)

    size = max(1, chunk // max(vocabulary, 1))
    if len(tokens) <= size:
        logp, entropy = portion(hidden, tokens)
        return logp, entropy if with_entropy else None
    parts = []
    for begin in range(0, len(tokens), size):
        rows = slice(begin, begin + size)
        if torch.is_grad_enabled():
            parts.append(checkpoint(portion, hidden[rows], tokens[rows], use_reentrant=False))
        else:
            parts.append(portion(hidden[rows], tokens[rows]))
    logp, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
    return logp, entropy if with_entropy else None
