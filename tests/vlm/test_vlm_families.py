"""Every family: what VLMPolicy computes from shared prompts equals the family's own plain forward, row by row."""

import functools

import pytest
import torch
from vlm_rows import picture
from zoo.vlms import VLM_FAMILIES, build_vlm

from mmrl.algorithms.base import Context
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.errors import UserError
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt, Samples
from pipelines import VLMPolicy
from pipelines.vlm.training import VLMLoRA, part_of

FALLS_BACK: frozenset[str] = frozenset()
NO_TEXT_ONLY = frozenset({"paligemma"})
# PaliGemma has no turns; the Llama tokenizer puts a space in front of text that stands alone; LLaVA-OneVision cuts a
# picture into tiles if no other comes with it, and what comes in other turns is not known yet.
NO_DIALOGUE = frozenset({"paligemma", "llava", "llava_next", "pixtral", "mistral3", "llava_onevision"})
TAKES_VIDEO = frozenset(
    {"qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5", "glm4v", "smolvlm", "llava_onevision", "internvl"}
)
# Linear attention sums in float32, whatever the weights, in chunks whose borders move with the padding; with all of
# its sums in float64 the effect of padding is 4e-14.
LINEAR_ATTENTION = frozenset({"qwen3_5"})
PICTURES_OR_VIDEO = frozenset({"glm4v", "smolvlm"})


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
    if family in TAKES_VIDEO - PICTURES_OR_VIDEO:
        media = {"images": [picture(84, 56, 8)], "videos": [[picture(56, 84, 9 + k) for k in range(2)]]}
        found.append(Prompt("same?", "both", target="e", **media))
    return found


def pictures_of(prompts: list[Prompt]) -> int:
    return sum(len(prompt.images) for prompt in prompts)


@functools.cache
def parts(family: str):
    """Model and processor; many tokens end a completion, so that lengths differ."""
    model, processor = build_vlm(family)
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *range(300, 400)]
    return model, processor


def policy_of(family: str, **options) -> VLMPolicy:
    return VLMPolicy(*parts(family), **({"max_new_tokens": 8, "temperature": 0.8, "batch_size": 16} | options))


def plain_logps(policy: VLMPolicy, prompt: Prompt, tokens: torch.Tensor, temperature=0.8, ban=True) -> torch.Tensor:
    """Log-probs of a completion by the model's own forward over what the processor gives, without the policy."""
    model, processor = policy.model, policy.processor
    content = [{"type": "video"} for _ in prompt.videos] + [{"type": "image"} for _ in prompt.images]
    content.append({"type": "text", "text": prompt.text})
    turns = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    given = {}
    if prompt.images:
        given["images"] = [list(prompt.images)]
    if prompt.videos:
        # All frames are read, as if taken at the processor's own rate.
        frames = list(range(len(prompt.videos[0])))
        rate = getattr(processor.video_processor, "fps", None) or 2.0
        metadata = [{"total_num_frames": len(frames), "fps": rate, "frames_indices": frames}]
        given |= {"videos": [list(prompt.videos)], "video_metadata": metadata, "do_sample_frames": False}
    bos = processor.tokenizer.bos_token
    if bos and text.startswith(bos):
        given["add_special_tokens"] = False
    inputs = dict(processor(text=[text], return_tensors="pt", **given))
    inputs.pop("labels", None)
    inputs = {key: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in inputs.items()}
    count, new = inputs["input_ids"].shape[1], tokens[None]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    # PaliGemma's token types say what is prefix (0) and what is not (1); elsewhere 0 is text.
    suffix = int(type(model).__name__.startswith("PaliGemma"))
    for key, value in (("mm_token_type_ids", 0), ("token_type_ids", suffix)):
        if key in inputs:
            inputs[key] = torch.cat([inputs[key], torch.full_like(new, value)], 1)
    logits = model(**inputs).logits[0, count - 1 : -1].float() / temperature
    if ban:
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
    assert policy.counters["images_processed"] == pictures_of(prompts)

    expected = torch.zeros_like(found)
    plain = []
    for k, prompt in enumerate(rollout.samples.prompts):
        length = int(rollout.samples.lengths[k])
        plain.append(plain_logps(policy, prompt, rollout.trace.tokens[k, :length]))
        expected[k, :length] = plain[-1].detach()
    exact = 3e-5 if family in LINEAR_ATTENTION else 1e-5
    assert (found - expected).abs().max() < exact
    # What sampling recorded is what training computes.
    assert (rollout.logp - found.detach()).abs().max() < exact

    weight = weights(rollout)
    ours = gradients(policy, (weight * found).sum())
    theirs = gradients(policy, sum((weight[k, : len(row)] * row).sum() for k, row in enumerate(plain)))
    assert relative(ours, theirs) < 1e-4


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_padding_changes_nothing(family):
    # In float64, so that rounding cannot hide a small effect of padding.
    model, processor = build_vlm(family)
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, *range(300, 400)]
    policy = VLMPolicy(model.double(), processor, max_new_tokens=8, temperature=0.8, batch_size=16)
    rollout = policy.rollout(rows(family), group_size=2, seed=2)
    exact = 2e-4 if family in LINEAR_ATTENTION else 1e-6
    with torch.no_grad():
        together = policy.decisions(rollout).logp
        for k in range(len(rollout)):
            assert (policy.decisions(rollout[[k]]).logp[0] - together[k]).abs().max() < exact


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_frozen_towers_encode_each_picture_once(family):
    policy, prompts = policy_of(family, freeze=["vision", "projector"]), rows(family)
    rollout = policy.rollout(prompts, group_size=2, seed=1)
    found = policy.decisions(rollout).logp
    with torch.no_grad():
        policy.decisions(rollout)
    clips = sum(len(prompt.videos) for prompt in prompts)
    assert policy.counters["images_processed"] == policy.counters["images_encoded"] == pictures_of(prompts)
    assert policy.counters["videos_processed"] == policy.counters["videos_encoded"] == clips
    assert (rollout.logp - found).abs().max() < 1e-5
    assert torch.autograd.grad(found.sum(), list(policy.parameters), allow_unused=True)[0] is not None


@pytest.mark.parametrize("family", VLM_FAMILIES)
def test_adapters_go_to_the_language_model_and_learn_from_answers(family):
    model, processor = build_vlm(family, seed=2)
    prompts = rows(family)
    answers = ["a blue square", "", "two", "left of", "yes"][: len(prompts)]
    end = torch.tensor([processor.tokenizer.eos_token_id])
    tokens = [processor.tokenizer(x, add_special_tokens=False, return_tensors="pt")["input_ids"][0] for x in answers]
    full = VLMPolicy(model, processor)
    expected = torch.stack(
        [
            -plain_logps(full, prompt, torch.cat([own.long(), end]), temperature=1.0, ban=False).sum()
            for prompt, own in zip(prompts, tokens, strict=True)
        ]
    ).detach()
    policy = VLMPolicy(model, processor, temperature=0.8, lora=VLMLoRA(rank=2))
    assert {part_of(name) for name in policy.parameters.named} == {"language"}
    found = policy.fit(Samples(prompts, texts=answers))
    torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-5)
    found.sum().backward()
    assert any(p.grad.abs().max() > 0 for p in policy.parameters)


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


@pytest.mark.parametrize("family", [family for family in VLM_FAMILIES if family not in NO_DIALOGUE])
def test_answers_in_the_middle_of_a_dialogue_with_pictures(family):
    policy = VLMPolicy(*build_vlm(family))
    processor, pictures = policy.processor, [picture(56, 84, 5), picture(84, 84, 6)]
    turns = [("user", "look", True), ("assistant", "a circle", False), ("user", "and this?", True)]
    turns.append(("assistant", "two squares", False))
    messages, marked, images = [], [], iter(pictures)
    for role, text, shows in turns:
        said = {"type": "text", "text": text}
        messages.append({"role": role, "content": [{"type": "image"}, said] if shows else [said]})
        marked.append({"role": role, "content": [{"type": "image", "image": next(images)}, said] if shows else [said]})
    inputs = processor.apply_chat_template(
        marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
    )
    said = torch.as_tensor(inputs.pop("assistant_masks")).bool()[:, 1:]
    inputs = {key: x.float() if x.is_floating_point() else x for key, x in inputs.items()}
    logp = policy.model(**inputs).logits[:, :-1].log_softmax(-1).gather(-1, inputs["input_ids"][:, 1:, None])[..., 0]
    expected = -logp[said].sum()
    other = Prompt("two?", "other", images=[picture(56, 56, 7)], target="yes")
    found = policy.fit(Samples([Prompt(messages=messages, images=pictures, id="dialogue"), other]))[0]
    assert said.sum() > 4
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert relative(gradients(policy, found), gradients(policy, expected)) < 1e-4


@pytest.mark.parametrize("family", sorted(PICTURES_OR_VIDEO))
def test_pictures_and_a_clip_in_one_row_are_refused_where_they_cannot_be_told_apart(family):
    both = Prompt("same?", "row 7", images=[picture(56, 56, 0)], videos=[[picture(56, 56, k) for k in range(2)]])
    with pytest.raises(UserError, match=r"row 7.*not both"):
        policy_of(family).rollout([both], group_size=2, seed=0)


def test_pictures_that_enter_by_cross_attention_are_refused():
    with pytest.raises(UserError, match="cross-attention"):
        VLMPolicy(*build_vlm("mllama"))
