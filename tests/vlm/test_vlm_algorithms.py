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


def test_offline_pairs_run_each_prompt_once(policy):
    """Both answers share the prompt's picture and its run, under the policy and under the reference."""
    rows = [
        Prompt("what colour is it?", images=[Image.new("RGB", (56, 56), "red")], metadata=pair("red", "blue")),
        Prompt("count", metadata=pair([{"role": "assistant", "content": "one two"}], "two one")),
    ]
    context = context_of(policy)
    policy.parameters.take_snapshot("reference")
    options = {"type": "dpo", "source": "offline", "loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}}
    algorithm = build_algorithm(algorithm_component(options, where="test", path="algorithm"))
    before = policy.counters.copy()
    pairs = algorithm.collect(context, rows, 0)
    (update,) = algorithm.updates(context, pairs, 0)
    loss = sum(algorithm.loss(context, micro_batch) for micro_batch in update.micro_batches)
    done = policy.counters - before
    assert done["images_processed"] == 1
    assert done["prefill_rows"] == 4, "two prompts, under policy and reference"
    loss.backward()
    squares = sum(p.grad.square().sum().item() for p in policy.parameters if p.grad is not None)
    for parameter in policy.parameters:
        parameter.grad = None
    assert squares > 0
    # At the start sigmoid and bco_pair are log 2 and 2 log 2, and the rest is the mean NLL of the better answers.
    with torch.no_grad():
        better = policy.fit(pairs.winners) / pairs.winners.mask.sum(1)
    expected = (0.8 + 0.4) * torch.tensor(2.0).log() + better.mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def pair(chosen, rejected):
    return {"chosen": chosen, "rejected": rejected}
