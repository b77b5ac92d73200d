"""Random numbers as pure functions of a seed and a place in the run.

Nothing here has state, so there is nothing to checkpoint: step 7 draws the same numbers whether the run came there
directly or was resumed on the way, and on every device, since all draws happen on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import torch

from mmrl.types import Prompt


def derive_seed(seed: int, *path: int | str) -> int:
    """A 63-bit seed for one named place in a run, e.g. ``derive_seed(seed, "rollout", step, prompt_id, k)``."""
    digest = hashlib.blake2b(repr((int(seed), *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, *path: int | str) -> torch.Generator:
    """A CPU generator seeded by :func:`derive_seed`."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *path))


def prompt_keys(prompts: Sequence[Prompt]) -> Iterator[tuple[str, int]]:
    """Name of each prompt and how often it came before, so that a repeated prompt draws other samples."""
    seen: dict[str, int] = {}
    for prompt in prompts:
        name = prompt.id or prompt.text or (repr(prompt.messages) if prompt.messages else "")
        yield name, seen.setdefault(name, 0)
        seen[name] += 1
