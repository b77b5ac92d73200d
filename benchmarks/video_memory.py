"""Peak memory of one training step on a video pipeline, over the number of denoising steps.

    python benchmarks/video_memory.py

Flow-GRPO with a window of one step and DRaFT-1 differentiate one network call each, however long the sampler is; DRaFT
through all steps is there for comparison. The pipeline is a small WanPipeline with random weights. On a CPU the peak is
that of PyTorch's allocations during the step, as its profiler records them; on a GPU the allocator's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mmrl.types import Chain, Prompt
from pipelines import DiffusionPolicy
from pipelines.quickstart.video_base import MAX_TOKENS, assemble, build_vae

CALL = {"height": 32, "width": 32, "num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": MAX_TOKENS}
PROMPTS = [Prompt("a red circle moves left fast", id="0"), Prompt("a blue square moves slowly up", id="1")]
GROUP = 4


def policy(num_steps: int) -> DiffusionPolicy:
    """A small video pipeline with random weights; the same ones for every number of steps."""
    torch.manual_seed(0)
    pipe = assemble(build_vae(), seed=0)
    if torch.cuda.is_available():
        pipe.to("cuda")
    return DiffusionPolicy(
        pipe, num_steps, window={"first": 1}, call=CALL, batch_size=len(PROMPTS) * GROUP, offload_states=True
    )


def grpo_step(policy: DiffusionPolicy) -> None:
    """Roll out, and one backward through the replay of the window's only step."""
    with torch.no_grad():
        rollout = policy.rollout(PROMPTS, GROUP, seed=1)
    policy.decisions(rollout, [0]).logp.sum().backward()


def draft_step(policy: DiffusionPolicy, grad_steps: int | None) -> None:
    """Sample with gradient in the last steps and the decoder, and one backward; None is all steps."""
    steps = policy.num_steps if grad_steps is None else grad_steps
    rows = [prompt for prompt in PROMPTS for _ in range(GROUP)]
    clips = policy.chain(rows, list(range(len(rows))), Chain(0, policy.num_steps, steps)).samples.videos
    clips.mean().backward()


STEPS: dict[str, Callable[[DiffusionPolicy], None]] = {
    "Flow-GRPO, window of 1": grpo_step,
    "DRaFT-1": lambda policy: draft_step(policy, 1),
    "DRaFT, all steps": lambda policy: draft_step(policy, None),
}


def peak_bytes(action: Callable[[], None]) -> int:
    """The most memory that ``action`` held at a time, beyond what was there before."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        action()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(name: str, num_steps: int) -> int:
    """Peak bytes of one training step of the method ``name``, after one step to fill the caches."""
    lent = policy(num_steps)
    for _ in range(2):
        for parameter in lent.parameters:
            parameter.grad = None
        peak = peak_bytes(lambda: STEPS[name](lent))
    return peak


def main(counts: Sequence[int] = (4, 8, 16)) -> None:
    """Print the table."""
    print("| method | " + " | ".join(f"{count} steps" for count in counts) + " |")
    print("|---|" + "---|" * len(counts))
    for name in STEPS:
        print(f"| {name} | " + " | ".join(f"{measure(name, count) / 1e6:.1f} MB" for count in counts) + " |")


if __name__ == "__main__":
    main()
