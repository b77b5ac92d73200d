"""Reward backprop against finite differences in float64, and what a step keeps in memory."""

import pytest
import torch
from zoo import ZOO

from mmrl import Prompt
from mmrl.algorithms.base import Context
from mmrl.algorithms.reward_backprop import RewardBackprop
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from mmrl.types import Chain
from pipelines import DiffusionPolicy

PROMPTS = [Prompt("a red circle", id="a"), Prompt("two blue squares", id="b")]


def lent(num_steps, **options):
    entry = ZOO["StableDiffusion3"]()
    call = {**entry.call, "guidance_scale": 1.0}
    policy = DiffusionPolicy(entry.pipe, num_steps=num_steps, call=call, **options)
    return Context(policy, Scorer([waves]), 7, 4, Clock(), Tally())


def waves(samples):
    """A reward with curvature: the pixels weighted by a fixed pattern, and their squares."""
    images = samples.images
    pattern = torch.arange(images[0].numel()).sin().view(images[0].shape).to(images)
    return (images * pattern + images.square()).flatten(1).mean(1)


waves.differentiable = True


def losses(context, algorithm):
    (update,) = algorithm.updates(context, algorithm.collect(context, PROMPTS, 0), 0)
    for micro_batch in update.micro_batches:
        yield algorithm.loss(context, micro_batch)


class Unrolled:
    """The two steps written out with copies of the networks in float64; only the last K of them can be moved."""

    def __init__(self, policy, seeds):
        pipe = policy.pipe
        self.x = policy.start(PROMPTS, seeds).double()
        self.sigmas = policy.seam.inspect(PROMPTS[0], policy.train).grid.sigmas
        with torch.no_grad():
            texts = [
                pipe.encode_prompt(p.text, None, None, do_classifier_free_guidance=False, max_sequence_length=16)
                for p in PROMPTS
            ]
        self.text, self.pooled = (torch.cat([row[k] for row in texts]).double() for k in (0, 2))
        # The same weights each time that it is built.
        fixed, moved = (ZOO["StableDiffusion3"]().pipe.to(torch.float64) for _ in range(2))
        self.fixed, self.moved, self.vae = fixed.transformer, moved.transformer, fixed.vae

    @torch.no_grad()
    def loss(self, grad_steps):
        x = self.x
        for step in range(2):
            network = self.moved if step >= 2 - grad_steps else self.fixed
            time = torch.full((len(x),), 1000 * self.sigmas[step], dtype=torch.float32)
            (velocity,) = network(x, self.text, self.pooled, time, return_dict=False)
            x = x + (self.sigmas[step + 1] - self.sigmas[step]) * velocity
        config = self.vae.config
        pictures = self.vae.decode(x / config.scaling_factor + config.shift_factor, return_dict=False)[0]
        return -waves(type("Shown", (), {"images": (pictures / 2 + 0.5).clamp(0, 1)})).mean()


@pytest.mark.parametrize("grad_steps", [1, 2])
def test_gradient_equals_finite_differences_in_float64(grad_steps):
    context = lent(2)
    policy = context.policy
    (loss,) = losses(context, RewardBackprop(grad_steps=grad_steps))
    loss.backward()
    (update,) = RewardBackprop().updates(context, PROMPTS, 0)
    (part,) = update.micro_batches
    unrolled = Unrolled(policy, part.seeds)
    assert unrolled.loss(grad_steps).item() == pytest.approx(loss.item(), abs=1e-6)

    for seed in (3, 4):
        draw = torch.Generator().manual_seed(seed)
        total, pairs = 0.0, []
        moved = dict(unrolled.moved.named_parameters())
        for name, parameter in policy.parameters.named.items():
            twin = moved[name.removeprefix("transformer.")]
            direction = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
            if parameter.grad is not None:
                # Towards the gradient as well, so that the derivative does not vanish by chance.
                direction += parameter.grad.double() / (parameter.grad.double().norm() + 1e-12)
                total += (parameter.grad.double() * direction).sum().item()
            pairs.append((twin, direction))

        def at(amount, pairs=pairs):
            with torch.no_grad():
                for twin, direction in pairs:
                    twin.add_(amount * direction)
            value = unrolled.loss(grad_steps).item()
            with torch.no_grad():
                for twin, direction in pairs:
                    twin.sub_(amount * direction)
            return value

        step = 1e-6
        assert (at(step) - at(-step)) / (2 * step) == pytest.approx(total, rel=2e-4)


def kept_bytes(context, algorithm):
    """Bytes that the graph of one training step keeps for the backward pass, each storage counted once."""
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        graphs = list(losses(context, algorithm))
    assert graphs
    return sum(found.values())


def test_memory_of_draft_1_does_not_grow_with_the_number_of_steps():
    one = RewardBackprop(grad_steps=1)
    few, many = (kept_bytes(lent(steps), one) for steps in (2, 8))
    assert few == many
    everything = RewardBackprop(grad_steps="all")
    assert kept_bytes(lent(8), everything) > 3 * kept_bytes(lent(2), everything) > 3 * few


def test_checkpointed_steps_keep_little_and_give_the_same_gradient():
    algorithm = RewardBackprop(grad_steps="all")
    gradients, kept = [], []
    for option in (False, True, "step"):
        context = lent(4, gradient_checkpointing=option)
        kept.append(kept_bytes(context, algorithm))
        (loss,) = losses(context, algorithm)
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in context.policy.parameters if p.grad is not None]))
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, rtol=1e-4, atol=1e-7)
    assert kept[2] < kept[1] < kept[0]


def test_checkpointing_leaves_chains_alone():
    plain, checkpointed = (
        lent(2, gradient_checkpointing=option).policy.chain(PROMPTS, [1, 2], Chain(0, 2, 2)).samples.images
        for option in (False, "step")
    )
    assert torch.equal(plain, checkpointed)
