"""The few exchanges between processes that training needs; each is the identity in a single process."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def total(value: float) -> float:
    """Sum of one number over processes."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(float(value), dtype=torch.float64, device=exchange_device())
    dist.all_reduce(tensor)
    return tensor.item()


def any_rank(flag: bool) -> bool:
    """True everywhere when it is true anywhere."""
    return total(float(flag)) > 0


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes in rank order. Every process must bring the same number."""
    if world_size() == 1:
        return rows
    own = rows.contiguous().to(exchange_device())
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts).to(rows.device)


def exchange_device() -> str:
    """Where tensors must be to be exchanged."""
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def gather_ragged(rows: Tensor) -> Tensor:
    """Rows of all processes in rank order, on the CPU, where processes may bring different numbers of them."""
    return torch.cat(_gather_parts(rows))


def gather_values(value: Any) -> list[Any]:
    """One value of each process, in rank order; of what JSON can hold, which is how it travels."""
    if world_size() == 1:
        return [value]
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(bytes(part.tolist())) for part in _gather_parts(text)]


def _gather_parts(rows: Tensor) -> list[Tensor]:
    """The rows of each process, on the CPU."""
    if world_size() == 1:
        return [rows.cpu()]
    counts = gather_rows(torch.tensor([len(rows)])).tolist()
    if max(counts) == 0:
        return [rows.cpu() for _ in counts]
    padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
    everyone = gather_rows(torch.cat([rows, padding])[None]).cpu()
    return [part[:count] for part, count in zip(everyone, counts, strict=True)]


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Add up gradients over processes, in one exchange per dtype; a missing gradient counts as zero.

    Losses are divided by totals over all processes, so the sum is the gradient of the whole step.
    """
    if world_size() == 1:
        return
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter)
    for group in by_dtype.values():
        flat = torch.cat([p.grad.flatten() for p in group])
        dist.all_reduce(flat)
        for parameter, grad in zip(group, flat.split([p.numel() for p in group]), strict=True):
            parameter.grad.copy_(grad.view_as(parameter))
