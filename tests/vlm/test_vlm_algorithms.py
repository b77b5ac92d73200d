"""The token algorithms on a tiny VLM with pictures: every named one takes a step, with exact ratios before it."""

import pytest
import torch
from PIL import Image
from zoo.vlms import build_vlm

from mmrl import Prompt
from mmrl.algorithms.base import Context
from mmrl.components import algorithm_component, build_algorithm
from mmrl.data import PromptSampler
from mmrl.registry import ALGORITHMS
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from pipelines import VLMPolicy

NAMES = [
    name
    for name, entry in ALGORITHMS.items()
    if entry.target.endswith(":PolicyGradient") and name not in ("grpo_guard", "flow_dppo")
]


@pytest.fixture(scope="module")
def policy():
    return VLMPolicy(*build_vlm("qwen2_5_vl"), max_new_tokens=6, value_head=True, batch_size=4)


def even_letters(samples):
    """A graded reward that random text spreads on."""
    return [sum(letter in "aeiou " for letter in text) / (1 + len(text)) for text in samples.texts]


def context_of(policy):
    picture = Image.new("RGB", (56, 56), "red")
    rows = [
        Prompt("what colour is it?", id="a", images=[picture], target="red", metadata={"hint": "not blue"}),
        Prompt("count to two", id="b", target="one two"),
    ]
    sampler = PromptSampler(rows, 2, shuffle=False)
    return Context(policy, Scorer([even_letters]), 3, 4, Clock(), Tally(), sampler)


def step(policy, options):
    """Gradients of one step on the weights as they are; ratios of the first update were 1."""
    algorithm = build_algorithm(algorithm_component(options, where="test", path="algorithm"))
    context = context_of(policy)
    if algorithm.needs_reference:
        policy.parameters.take_snapshot("reference")
    with torch.no_grad():
        experience = algorithm.collect(context, context.prompts.batch(0), 0)
    squares = 0.0
    for update in algorithm.updates(context, experience, 0):
        for micro_batch in update.micro_batches:
            loss = algorithm.loss(context, micro_batch)
            assert torch.isfinite(loss)
            loss.backward()
        for parameter in policy.parameters:
            if parameter.grad is not None:
                squares += parameter.grad.square().sum().item()
                parameter.grad = None
    policy.keep_entropy = False
    return context.tally.result(), squares**0.5


@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_takes_a_step(policy, name):
    # Random weights hardly ever end by themselves, so masking what was cut would leave nothing.
    more = {"mask_truncated": False} if name == "dapo" else {}
    found, norm = step(policy, {"type": name, "group_size": 3, **more})
    assert norm > 0
    assert found["ratio/max_abs_dev"] < 1e-5
    assert found["ratio/clip_fraction"] == 0


OPTIONS = {
    "kl": {"kl_coef": 0.1, "kl_gradient": "k2"},
    "kl_in_reward": {"type": "rloo", "kl_coef": 0.1, "kl_in": "reward"},
    "entropy": {"entropy_coef": 0.01, "top_entropy": 0.5},
    "ground_truth": {"ground_truth": {"template": "<answer>{}</answer>"}},
    "hints": {"hints": {"failing": 1.0}, "importance": {}},
    "consistency": {"consistency": {"marker": "a", "right": 0.0}},
    "replay": {"replay": {}},
    "rethinking": {"rethinking": {"trigger": " a", "keep": "always", "share": 1.0}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_hooks_take_a_step(policy, name):
    found, norm = step(policy, {"type": "grpo", "group_size": 3, **OPTIONS[name]})
    assert norm > 0
    assert found["ratio/max_abs_dev"] < 1e-4
