"""Every family: what VLMPolicy computes from shared prompts equals the family's own plain forward, row by row."""

import functools

import numpy as np
import pytest
import torch
from PIL import Image
from zoo.vlms import VLM_FAMILIES, build_vlm

from mmrl.algorithms.base import Context
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.tally import Clock
from mmrl.scoring import Scorer
from mmrl.tally import Tally
from mmrl.types import Prompt
from pipelines import VLMPolicy
from pipelines.vlm.training import part_of

FALLS_BACK: frozenset[str] = frozenset()
NO_TEXT_ONLY = frozenset({"paligemma"})
TAKES_VIDEO = frozenset({"qwen2_5_vl", "qwen2_vl", "qwen3_vl", "glm4v", "smolvlm", "llava_onevision", "internvl"})


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def rows(family: str) -> list[Prompt]:
    """One picture, two pictures, text alone, and a video, as far as the family takes them; lengths differ."""
    found = [
        Prompt("where is the red circle?", "one", images=[picture(56, 84, 0)], target="a"),
        Prompt("two?", "two", images=[picture(84, 56, 1), picture(56, 56, 2)], target="b"),
    ]
    if family not in NO_TEXT_ONLY:
        found.append(Prompt("how many squares are left of the quick brown fox?", "text", target="c"))
    if family in TAKES_VIDEO:
        found.append(Prompt("what moves?", "video", videos=[[picture(56, 56, 3 + k) for k in range(4)]], target="d"))
    return found


@functools.cache
def parts(family: str):
    return build_vlm(family)


def policy_of(family: str, **options) -> VLMPolicy:
    return VLMPolicy(*parts(family), max_new_tokens=5, temperature=0.8, batch_size=16, **options)


def plain_logps(policy: VLMPolicy, prompt: Prompt, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probs of one completion by the model's own forward over processor output, without any of the policy's code."""
    model, processor = policy.model, policy.processor
    content = [{"type": "image"} for _ in prompt.images] + [{"type": "video"} for _ in prompt.videos]
    content.append({"type": "text", "text": prompt.text})
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    media = {}
    if prompt.images:
        media["images"] = [list(prompt.images)]
    if prompt.videos:
        media["videos"] = [list(prompt.videos)]
        # All frames are read, as if taken twice a second.
        frames = list(range(len(prompt.videos[0])))
        rate = getattr(processor.video_processor, "fps", None) or 2.0
        media["video_metadata"] = [{"total_num_frames": len(frames), "fps": rate, "frames_indices": frames}]
        media["do_sample_frames"] = False
    bos = processor.tokenizer.bos_token
    if bos and text.startswith(bos):
        media["add_special_tokens"] = False
    inputs = dict(processor(text=[text], return_tensors="pt", **media))
    inputs.pop("labels", None)
    inputs = {key: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs.items()}
    count, new = inputs["input_ids"].shape[1], tokens[None]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for key, value in (("mm_token_type_ids", 0), ("token_type_ids", int("paligemma" in type(model).__name__.lower()))):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.full_like(new, value)], 1)
    if "cross_attention_mask" in inputs:
        mask = inputs["cross_attention_mask"]
        inputs["cross_attention_mask"] = torch.cat([mask, mask[:, -1:].expand(-1, len(tokens), -1, -1)], 1)
    logits = model(**inputs).logits[0, count - 1 : -1].float() / 0.8
    logits = logits.index_fill(-1, policy.banned, float("-inf"))
    return logits.log_softmax(-1).gather(-1, new.T)[:, 0]


def gradients(policy: VLMPolicy, loss: torch.Tensor) -> torch.Tensor:
    """All gradients as one vector."""
    named = list(policy.parameters)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(named, torch.autograd.grad(loss, named, allow_unused=True), strict=True)
        ]
    )


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def weights(rollout) -> torch.Tensor:
    """Signed weights of the decisions, unlike for each."""
    return torch.linspace(-1, 1.5, rollout.mask.numel()).view(rollout.mask.shape) * rollout.mask


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_shared_prompts_give_log_probs_and_gradients_of_the_plain_forward(family):
    policy = policy_of(family)
    prompts = rows(family)
    rollout = policy.rollout(prompts, group_size=2, seed=1)
    before = policy.counters["prefill_rows"]
    found = policy.decisions(rollout).logp
    shared = policy.counters["prefill_rows"] - before == len(prompts)
    assert shared == (family not in FALLS_BACK)
    assert policy.counters["images_processed"] == 3

    expected = torch.zeros_like(found)
    plain = []
    for k, prompt in enumerate(rollout.samples.prompts):
        length = int(rollout.samples.lengths[k])
        plain.append(plain_logps(policy, prompt, rollout.trace.tokens[k, :length]))
        expected[k, :length] = plain[-1].detach()
    assert (found - expected).abs().max() < 1e-5
    # What sampling recorded is what training computes.
    assert (rollout.logp - found.detach()).abs().max() < 1e-5

    weight = weights(rollout)
    ours = gradients(policy, (weight * found).sum())
    theirs = gradients(policy, sum((weight[k, : len(row)] * row).sum() for k, row in enumerate(plain)))
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_padding_changes_nothing(family):
    policy = policy_of(family)
    rollout = policy.rollout(rows(family), group_size=1, seed=2)
    with torch.no_grad():
        together = policy.decisions(rollout).logp
        for k in range(len(rollout)):
            alone = policy.decisions(rollout[k : k + 1]).logp
            assert (alone - together[k]).abs().max() < 2e-6


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_one_step_of_grpo(family):
    model, processor = build_vlm(family, seed=1)
    policy = VLMPolicy(model, processor, max_new_tokens=5, batch_size=4)
    algorithm = PolicyGradient(group_size=4, objective="clip", clip_range=0.2)
    scorer = Scorer([lambda samples: [float(k % 4) for k in range(len(samples))]])
    context = Context(policy, scorer, seed=0, micro_batch_size=4, clock=Clock(), tally=Tally())
    optimizer = torch.optim.SGD(list(policy.parameters), lr=1e-2)
    old = {name: value.clone() for name, value in policy.parameters.state().items()}
    with torch.no_grad():
        experience = algorithm.collect(context, rows(family)[:2], 0)
    for update in algorithm.updates(context, experience, 0):
        for micro_batch in update.micro_batches:
            algorithm.loss(context, micro_batch).backward()
        optimizer.step()
    metrics = context.tally.result()
    assert metrics["ratio/max_abs_dev"] < 1e-4
    moved = {part_of(name) for name, value in policy.parameters.state().items() if not torch.equal(value, old[name])}
    assert moved == {"vision", "projector", "language"}
    assert all(value.isfinite().all() for value in policy.parameters.state().values())
