"""Measure every pipeline of the zoo and print the table of ``docs/pipelines.md``.

Run in ``tests/``: ``PYTHONPATH=.. python -m zoo [NAME ...]``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable

import diffusers
import torch
import transformers

from mmrl import Prompt, Rollout
from mmrl.errors import UserError
from mmrl.types import Chain
from pipelines import DiffusionPolicy, LoRA
from zoo import EXTRA, ZOO, Entry

HEAD = [
    "pipeline",
    "rollout",
    "replay, float32",
    "rows alone, float32",
    "replay, bf16",
    "rows alone, bf16",
    "float32 rollout, bf16 replay",
    "fit",
    "x0",
    "backprop",
    "LoRA",
]
FAILURES = (UserError, RuntimeError, ValueError, IndexError, TypeError)


def deviation(policy: DiffusionPolicy, rollout: Rollout) -> float:
    return float((policy.decisions(rollout).logp - rollout.logp).abs().max().detach())


def works(action: Callable[[], torch.Tensor], policy: DiffusionPolicy) -> str:
    """``yes`` when the result has a finite, non-zero gradient."""
    for p in policy.parameters:
        p.grad = None
    try:
        action().backward()
    except FAILURES as error:
        return f"no: {str(error).splitlines()[0][:90]}"
    norms = [float(p.grad.norm()) for p in policy.parameters if p.grad is not None]
    return "yes" if norms and 0 < sum(norms) < float("inf") else "no gradient"


def measure(name: str, build: Callable[[], Entry]) -> list[str]:
    """One row of the table."""
    entry = build()
    prompts = [Prompt(text=text, inputs=entry.inputs) for text in entry.prompts]
    try:
        policy = DiffusionPolicy(entry.pipe, num_steps=4, call=entry.call, batch_size=4)
        rollout = policy.rollout(prompts, group_size=2, seed=7)
    except FAILURES as error:
        return [name, f"no: {error}"]
    row = [name, "yes"]
    try:
        row.append(f"{deviation(policy, rollout):.1e}")
        with torch.autocast("cpu", torch.bfloat16):
            mixed = deviation(policy, rollout)
            low = policy.rollout(prompts, group_size=2, seed=7)
            same = deviation(policy, low)
        policy.batch_size = 1
        row.append(f"{deviation(policy, rollout):.1e}")
        with torch.autocast("cpu", torch.bfloat16):
            row += [f"{same:.1e}", f"{deviation(policy, low):.1e}", f"{mixed:.1e}"]
        policy.batch_size = 4
    except FAILURES as error:
        return [*row, f"no: {error}"]

    def backprop() -> torch.Tensor:
        samples = policy.chain(prompts, list(range(len(prompts))), Chain(0, policy.num_steps, 1)).samples
        return (samples.images if samples.images is not None else samples.videos).std()

    def jump() -> torch.Tensor:
        samples = policy.jump_to_x0(rollout, 1)
        return (samples.images if samples.images is not None else samples.videos).std()

    row.append(works(lambda: policy.fit(rollout, list(range(len(rollout)))).mean(), policy))
    row += [works(jump, policy), works(backprop, policy), adapters(build)]
    return row


def adapters(build: Callable[[], Entry]) -> str:
    entry = build()
    try:
        policy = DiffusionPolicy(entry.pipe, num_steps=4, call=entry.call, lora=LoRA(rank=2))
    except UserError:
        return "no: train all weights"
    rollout = policy.rollout([Prompt(text=entry.prompts[0], inputs=entry.inputs)], group_size=2, seed=1)
    return works(lambda: policy.decisions(rollout).logp.mean(), policy)


def main() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    every = {**ZOO, **EXTRA}
    print("| " + " | ".join(HEAD) + " |\n|" + "---|" * len(HEAD))
    for name in sys.argv[1:] or every:
        print("| " + " | ".join(measure(name, every[name])) + " |", flush=True)


if __name__ == "__main__":
    main()
