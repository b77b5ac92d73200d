"""One training step as the trainer takes it, for tests that have no run."""

import torch

from mmrl.algorithms.base import Context


def training_step(algorithm, context: Context, optimizer: torch.optim.Optimizer, step: int):
    """Collect for the prompts of ``step``, then take all updates; returns what was collected."""
    with torch.no_grad():
        experience = algorithm.collect(context, context.prompts.batch(step), step)
    for update in algorithm.updates(context, experience, step):
        for micro_batch in update.micro_batches:
            algorithm.loss(context, micro_batch).backward()
        if hasattr(context.policy, "finish_backward"):
            context.policy.finish_backward()
        optimizer.step()
        optimizer.zero_grad()
    return experience
