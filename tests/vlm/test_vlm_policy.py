"""VLMPolicy on a tiny Qwen2.5-VL: sampling, scoring, supervised training, freezing, adapters, bad rows."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from zoo.vlms import build_vlm
from zoo.vlms.linear import qwen3_5

from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import with_groups
from mmrl.algorithms.supervised import Supervised
from mmrl.errors import UserError
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt, Rollout, Samples
from pipelines import VLMLoRA, VLMPolicy
from pipelines.vlm.decoding import Sampling, draw
from pipelines.vlm.loading import LoadedVLM, load_vlm
from pipelines.vlm.prefix import joined_trace, unique_prompts
from pipelines.vlm.token_logps import token_logps
from pipelines.vlm.training import features_train, part_of


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def pair():
    return build_vlm("qwen2_5_vl")


@pytest.fixture
def make(pair):
    """A policy on the shared random model, whose weights must be left as they are."""

    def build(**options) -> VLMPolicy:
        return VLMPolicy(*pair, **({"max_new_tokens": 6, "batch_size": 16} | options))

    return build


@pytest.fixture
def own():
    """A policy on a model of its own."""

    def build(**options) -> VLMPolicy:
        return VLMPolicy(*build_vlm("qwen2_5_vl"), **({"max_new_tokens": 6, "batch_size": 16} | options))

    return build


def mixed_prompts() -> list[Prompt]:
    return [
        Prompt("where is the red circle?", "one", images=[picture(60, 90, 0)]),
        Prompt("how many?", "none"),
        Prompt("compare the first with the second, please", "two", images=[picture(90, 60, 1), picture(60, 60, 2)]),
        Prompt("what moves?", "clip", videos=[[picture(60, 60, k) for k in range(4)]]),
    ]


def grads(policy: VLMPolicy, loss: torch.Tensor) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(policy.parameters), allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(policy.parameters, found, strict=True)]
    )


def weights(rollout: Rollout) -> torch.Tensor:
    return torch.linspace(-1, 1.5, rollout.mask.numel()).view(rollout.mask.shape) * rollout.mask


def test_shared_prompts_equal_full_runs(make):
    shared, full = make(share_prefix="always"), make(share_prefix="never")
    rollout = shared.rollout(mixed_prompts(), 3, seed=1)
    a, b = shared.decisions(rollout).logp, full.decisions(rollout).logp
    assert (a - b).abs().max() < 1e-5
    assert (rollout.logp - a).abs().max() < 1e-5
    weight = weights(rollout)
    ours, theirs = grads(shared, (weight * a).sum()), grads(full, (weight * b).sum())
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert shared.counters["prefill_rows"] == 2 * 4
    assert full.counters["prefill_rows"] == 12


def test_states_of_linear_attention_are_shared_as_well():
    pytest.importorskip("transformers.models.qwen3_5")
    pair = qwen3_5(seed=0)
    shared, full = (VLMPolicy(*pair, max_new_tokens=6, share_prefix=share) for share in ("auto", "never"))
    rollout = shared.rollout(mixed_prompts(), 3, seed=1)
    a, b = shared.decisions(rollout).logp, full.decisions(rollout).logp
    assert shared.scorer.sharing
    assert (rollout.logp - a).abs().max() < 1e-4
    assert (a - b).abs().max() < 1e-4
    weight = weights(rollout)
    ours, theirs = grads(shared, (weight * a).sum()), grads(full, (weight * b).sum())
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


def test_sampling_without_sharing_draws_the_same(make):
    prompts = mixed_prompts()
    a, b = (make(share_prefix=share).rollout(prompts, 2, seed=3) for share in ("auto", "never"))
    assert torch.equal(a.trace.tokens, b.trace.tokens)
    assert (a.logp - b.logp).abs().max() < 1e-5


def test_work_is_done_once_per_prompt_in_rollout_and_update(make):
    prompts = mixed_prompts()
    policy = make()
    rollout = policy.rollout(prompts, 4, seed=0)
    expected = {"images_processed": 3, "images_encoded": 3, "videos_processed": 1, "videos_encoded": 1}
    assert {**policy.counters, "forward_tokens": 0} == {**expected, "prefill_rows": 4, "forward_tokens": 0}
    policy.counters.clear()
    policy.decisions(rollout)
    assert policy.counters["images_processed"] == policy.counters["videos_processed"] == 0
    assert policy.counters["prefill_rows"] == 4
    assert policy.counters["images_encoded"] == 3
    longest = max(len(prompt) for prompt in rollout.trace.prompts)
    assert policy.counters["forward_tokens"] == 4 * longest + 16 * (rollout.logp.shape[1] - 1)


def test_one_picture_under_many_questions_is_processed_and_encoded_once(make, tmp_path):
    picture(60, 60, 5).save(tmp_path / "a.png")
    picture(60, 60, 5).save(tmp_path / "same.png")
    files = [str(tmp_path / "a.png"), str(tmp_path / "same.png"), picture(60, 60, 5)]
    prompts = [Prompt(f"question {k}", f"q{k}", images=[file]) for k, file in enumerate(files)]
    policy = make(freeze=["vision", "projector"])
    policy.rollout(prompts, 2, seed=0)
    assert policy.counters["images_processed"] == policy.counters["images_encoded"] == 1
    assert policy.counters["prefill_rows"] == 3


def test_features_of_a_frozen_tower_serve_rollout_reference_and_update(own):
    policy = own(freeze=["vision", "projector"])
    policy.parameters.take_snapshot("reference")
    rollout = policy.rollout(mixed_prompts(), 2, seed=0)
    with torch.no_grad(), policy.reference():
        policy.decisions(rollout)
    loss = policy.decisions(rollout).logp.sum()
    assert policy.counters["images_encoded"] == 3
    assert all("pixel_values" not in media.tensors for prompt in rollout.trace.prompts for media in prompt.media)
    loss.backward()
    assert {part_of(name) for name in policy.parameters.named} == {"language"}
    assert all(p.grad is None for name, p in policy.model.named_parameters() if part_of(name) != "language")


@pytest.mark.parametrize("freeze", [["language"], ["vision"], ["projector", "language"]])
def test_frozen_parts_do_not_train(own, freeze):
    policy = own(freeze=freeze)
    assert {part_of(name) for name in policy.parameters.named} == {"vision", "projector", "language"} - set(freeze)
    assert features_train(policy.parameters)
    rollout = policy.rollout(mixed_prompts()[:1], 2, seed=0)
    policy.decisions(rollout).logp.sum().backward()
    assert all((p.grad is None) == (part_of(n) in freeze) for n, p in policy.model.named_parameters())
    with pytest.raises(UserError, match="nothing to train"):
        own(freeze=["vision", "projector", "language"])


def test_rows_do_not_depend_on_their_batch(make):
    prompts = mixed_prompts()
    whole = make().rollout(prompts, 2, seed=7)
    small = make(rollout_batch_size=2).rollout(prompts, 2, seed=7)
    assert torch.equal(whole.trace.tokens, small.trace.tokens)
    turned = make().rollout(prompts[::-1], 2, seed=7)
    assert whole.samples.texts[:2] == turned.samples.texts[-2:]
    assert make().rollout(prompts, 2, seed=8).samples.texts != whole.samples.texts


def test_padding_changes_nothing(make):
    policy = make()
    rollout = policy.rollout(mixed_prompts(), 1, seed=2)
    with torch.no_grad():
        together = policy.decisions(rollout).logp
        alone = torch.cat([policy.decisions(rollout[[k]]).logp for k in range(4)])
    # Log-probs are around -10, where neighbouring float32 numbers lie 1e-6 apart.
    assert torch.allclose(together, alone, rtol=1e-6, atol=1e-6)


def test_gradient_does_not_depend_on_micro_batches(make):
    policy = make()
    rollout = policy.rollout(mixed_prompts(), 3, seed=2)
    weight = weights(rollout)
    whole = grads(policy, (weight * policy.decisions(rollout).logp).sum())
    parts = sum(
        grads(policy, (weight[k : k + 5] * policy.decisions(rollout[k : k + 5]).logp).sum()) for k in range(0, 12, 5)
    )
    assert (whole - parts).norm() < 1e-5 * whole.norm()


def test_gradient_checkpointing_changes_no_number(own, caplog):
    plain, careful = own(), own(gradient_checkpointing=True)
    assert "every row in full" in caplog.text
    rollout = plain.rollout(mixed_prompts(), 2, seed=2)
    weight = weights(rollout)
    a = grads(plain, (weight * plain.decisions(rollout).logp).sum())
    b = grads(careful, (weight * careful.decisions(careful.rollout(mixed_prompts(), 2, seed=2)).logp).sum())
    assert (a - b).norm() < 1e-4 * a.norm()
    assert not any(module.training for module in careful.model.modules())


def test_log_probs_are_those_of_the_scaled_distribution_without_media_tokens(make, pair):
    model, processor = pair
    policy = make(temperature=0.7, top_k=5, top_p=0.9, keep_entropy=True)
    rollout = policy.rollout([mixed_prompts()[0]], 3, seed=1)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    marks = processor.tokenizer.convert_tokens_to_ids(list(names))
    assert set(marks) <= set(policy.banned.tolist())
    found = policy.decisions(rollout)
    for k in range(3):
        ids = torch.cat([rollout.trace.prompts[0].ids, rollout.trace.tokens[k, : rollout.samples.lengths[k]]])[None]
        media = rollout.trace.prompts[0].media[0].tensors
        types = (ids == processor.image_token_id).long()
        with torch.no_grad():
            logits = model(ids, **media, mm_token_type_ids=types).logits[0, len(rollout.trace.prompts[0]) - 1 : -1]
        scaled = (logits.double() / 0.7).index_fill(-1, policy.banned, -torch.inf)
        logp = scaled.log_softmax(-1)
        own = torch.arange(int(rollout.samples.lengths[k]))
        assert torch.allclose(logp[own, rollout.trace.tokens[k, own]].float(), rollout.logp[k, own], atol=1e-5)
        entropy = torch.distributions.Categorical(logits=scaled).entropy()
        assert torch.allclose(entropy.float(), found.entropy[k, own], atol=1e-4)
        # Every drawn token is among the five likeliest.
        rank = (logp > logp[own, rollout.trace.tokens[k, own]][:, None]).sum(1)
        assert rank.max() < 5


def test_draws_follow_the_distribution():
    scaled = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    uniforms = (torch.arange(20000) + 0.5) / 20000
    drawn = draw(scaled.expand(20000, -1), uniforms, Sampling(1))
    assert torch.allclose(drawn.bincount(minlength=4) / 20000, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=1e-4)
    top = draw(scaled.expand(20000, -1), uniforms, Sampling(1, top_p=0.75))
    assert torch.allclose(top.bincount(minlength=4) / 20000, torch.tensor([0.625, 0.375, 0, 0]), atol=1e-4)
    best = draw(scaled.expand(20000, -1), uniforms, Sampling(1, top_k=1))
    assert (best == 0).all()
    assert (draw(scaled.flip(0).expand(3, -1), uniforms[:3], Sampling(1, temperature=0.0)) == 3).all()
    banned = torch.tensor([[-torch.inf, 0.0, -torch.inf]])
    ends = torch.tensor([0.0, 1 - 2**-24])
    assert (draw(banned.expand(2, -1), ends, Sampling(1)) == 1).all()


def test_completions_end_at_any_end_token_and_are_flagged_when_cut():
    model, processor = build_vlm("qwen2_5_vl")
    reach = VLMPolicy(model, processor, max_new_tokens=8).rollout([Prompt("count", "a")], 8, seed=1)
    second = int(reach.trace.tokens[0, 2])
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id, second]
    policy = VLMPolicy(model, processor, max_new_tokens=8)
    rollout = policy.rollout([Prompt("count", "a")], 8, seed=1)
    assert rollout.samples.lengths[0] == 3
    assert not rollout.samples.truncated[0]
    tokens, lengths = rollout.trace.tokens, rollout.samples.lengths
    for row in range(8):
        ended = tokens[row, lengths[row] - 1].item() in policy.eos.tolist()
        assert ended != bool(rollout.samples.truncated[row])
        assert not torch.isin(tokens[row, : lengths[row] - 1], policy.eos).any()
        assert rollout.mask[row].sum() == lengths[row]
    # The end token is a decision like the others.
    assert rollout.logp[0, 2] < 0
    assert (rollout.logp[0, 3:] == 0).all()
    assert (policy.decisions(rollout).logp - rollout.logp).abs().max() < 1e-5


def test_stop_strings_end_completions(make):
    prompts = [Prompt("count", "a")]
    free = make(max_new_tokens=12).rollout(prompts, 4, seed=1)
    word = free.samples.texts[2][3:6]
    stopped = make(max_new_tokens=12, stop=[word]).rollout(prompts, 4, seed=1)
    assert word in stopped.samples.texts[2]
    assert not stopped.samples.truncated[2]
    assert stopped.samples.lengths[2] < free.samples.lengths[2]
    assert free.samples.texts[2].startswith(stopped.samples.texts[2])


def test_generate_takes_the_likeliest_tokens_as_the_library_does(make, pair):
    model, processor = pair
    policy = make(ban_media_tokens=False)
    prompts = [mixed_prompts()[0], mixed_prompts()[2]]
    samples = policy.generate(prompts, [0, 1])
    for prompt, text in zip(prompts, samples.texts, strict=True):
        parts = [{"type": "image", "image": one} for one in prompt.images] + [{"type": "text", "text": prompt.text}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        assert processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == text
    warm = make(eval_temperature=1.0)
    assert warm.generate(prompts, [0, 1]).texts == warm.generate(prompts, [0, 1]).texts
    assert warm.generate(prompts, [0, 1]).texts != warm.generate(prompts, [2, 3]).texts


def test_samples_say_what_rewards_need(make):
    samples = make().rollout(mixed_prompts(), 2, seed=0).samples
    assert samples.sizes[0] == samples.sizes[1] == [(56, 84)]
    assert [len(sizes) for sizes in samples.sizes[::2]] == [1, 0, 2, 0]
    assert samples.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert len(samples.texts) == 8
    assert samples.lengths.max() <= 6


def test_fit_is_the_library_s_loss(make, pair):
    model, processor = pair
    policy = make(fit_reduction="mean", batch_size=2)
    prompt = Prompt("where?", "a", images=[picture(60, 60, 0)], target="left of the blue square")
    other = Prompt("how many circles are there in all?", "b", metadata={"response": "two"})
    loss = policy.fit(Samples([prompt, other]), [0, 1])
    for one, text, found in ((prompt, prompt.target, loss[0]), (other, "two", loss[1])):
        parts = [{"type": "image"} for _ in one.images] + [{"type": "text", "text": one.text}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True) + text
        data = processor(text=[text + "<|im_end|>"], images=list(one.images) or None, return_tensors="pt")
        start = len(policy.reader.read([one])[0])
        labels = data["input_ids"].clone()
        labels[:, :start] = -100
        assert torch.allclose(model(**data, labels=labels).loss, found, rtol=1e-5)
    total = make(fit_reduction="sum").fit(Samples([prompt, other]), [0, 1])
    counts = [len(policy.reader.answer_ids(text)) + 1 for text in (prompt.target, "two")]
    assert torch.allclose(total, loss * torch.tensor(counts), rtol=1e-5)
    assert torch.allclose(policy.fit(Samples([prompt, other], texts=[prompt.target, "two"])), loss)


def test_supervised_micro_batches_hold_rows_of_like_length(own):
    words = "the red circle is left of the blue square and above it"
    prompts = [Prompt("what?", str(k), target=words if k % 2 else "red") for k in range(8)]

    def learn(micro_batch_size):
        policy, algorithm = own(), Supervised()
        context = Context(policy, None, 0, micro_batch_size, Clock(), Tally())
        (update,) = algorithm.updates(context, algorithm.collect(context, prompts, 0), 0)
        for micro_batch in update.micro_batches:
            assert len({prompt.target for prompt in micro_batch.prompts}) == 1 or micro_batch_size > 4
            algorithm.loss(context, micro_batch).backward()
        # Without pictures the tower has no gradient.
        found = torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None])
        return found, policy.counters["forward_tokens"]

    sorted_grad, sorted_tokens = learn(4)
    whole_grad, whole_tokens = learn(8)
    assert (sorted_grad - whole_grad).norm() < 1e-5 * whole_grad.norm()
    assert sorted_tokens < whole_tokens


def test_fit_explains_every_turn_of_the_assistant(make, pair):
    model, processor = pair
    policy = make()
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "look"}]},
        {"role": "assistant", "content": "a red circle"},
        {"role": "user", "content": [{"type": "text", "text": "and here?"}, {"type": "image"}]},
        {"role": "assistant", "content": "two squares"},
    ]
    images = [picture(60, 90, 0), picture(90, 60, 1)]
    dialogue = Prompt(messages=messages, images=images, id="d")
    plain = Prompt("how many?", "p", target="three")
    loss = policy.fit(Samples([dialogue, plain]), [0, 0])
    as_parts = [
        m if not isinstance(m["content"], str) else {**m, "content": [{"type": "text", "text": m["content"]}]}
        for m in messages
    ]
    data = processor(text=[processor.apply_chat_template(as_parts)], images=images, return_tensors="pt")
    logp = model(**data).logits[0, :-1].log_softmax(-1)
    ids = data["input_ids"][0]
    begin = processor.tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    end, expected = processor.tokenizer.convert_tokens_to_ids("<|im_end|>"), 0.0
    for i in range(len(ids)):
        if ids[i : i + len(begin)].tolist() == begin:
            j = i + len(begin)
            stop = j + ids[j:].tolist().index(end) + 1
            expected = expected - logp[torch.arange(j - 1, stop - 1), ids[j:stop]].sum()
    assert torch.allclose(loss[0], expected, rtol=1e-5)
    assert torch.allclose(loss[1], policy.fit(Samples([plain]), [0])[0], rtol=1e-5)
    full = make(share_prefix="never").fit(Samples([dialogue]), [0])
    assert torch.allclose(full[0], expected, rtol=1e-5)


def test_fit_of_a_rollout_is_its_unscaled_log_prob(make):
    policy = make(ban_media_tokens=False)
    rollout = policy.rollout(mixed_prompts(), 2, seed=4)
    assert torch.allclose(policy.fit(rollout, [0] * 8), -rollout.logp.sum(1), rtol=1e-5)
    # A pair of a preference: winners and losers of the same prompts in one call.
    both = Rollout.cat([rollout[[0, 2]], rollout[[1, 3]]])
    policy.counters.clear()
    assert torch.allclose(policy.fit(both, [0] * 4), -both.logp.sum(1), rtol=1e-5)
    assert policy.counters["prefill_rows"] == 2


def test_given_answers_become_rollouts(make):
    policy = make(temperature=0.8)
    rollout = policy.rollout(mixed_prompts(), 2, seed=4)
    given = with_groups(policy.given(rollout.samples.prompts, ["red"] * 8), rollout.group)
    assert given.samples.texts == ["red"] * 8
    assert given.group.tolist() == rollout.group.tolist()
    assert given.mask.sum(1).tolist() == given.samples.lengths.tolist()
    assert (given.logp - policy.decisions(given).logp).abs().max() < 1e-5
    plain = make(ban_media_tokens=False)
    answers = Samples(given.samples.prompts, texts=["red"] * 8)
    again = plain.given(answers.prompts, answers.texts)
    assert torch.allclose(-again.logp.sum(1), plain.fit(answers, [0] * 8), rtol=1e-5)


def test_rows_without_a_response_are_named(make):
    with pytest.raises(UserError, match=r"row 'b'.*no response"):
        make().fit(Samples([Prompt("x", "a", target="y"), Prompt("x", "b")]), [0, 0])


def test_value_head(own):
    policy = own(value_head=True)
    assert "values" in policy.verbs
    assert "values" not in own().verbs
    rollout = policy.rollout(mixed_prompts(), 2, seed=0)
    assert (rollout.value == 0).all()
    with torch.no_grad():
        policy.value_head.linear.weight.normal_()
    rollout = policy.rollout(mixed_prompts(), 2, seed=0)
    found = policy.decisions(rollout)
    assert torch.allclose(found.value, rollout.value, atol=1e-4)
    assert (found.value[~rollout.mask] == 0).all()
    (gradient,) = torch.autograd.grad(found.value.sum(), policy.value_head.linear.bias)
    assert gradient == rollout.mask.sum()


def test_adapters_start_at_the_base_and_give_it_back(own):
    policy = own(lora=VLMLoRA(rank=4))
    assert all("lora_" in name and part_of(name) == "language" for name in policy.parameters.named)
    rollout = policy.rollout(mixed_prompts(), 2, seed=0)
    assert torch.allclose(rollout.logp, own().rollout(mixed_prompts(), 2, seed=0).logp, atol=1e-5)
    before = policy.decisions(rollout).logp.detach()
    policy.counters.clear()
    optimizer = torch.optim.Adam(policy.parameters, 0.01)
    policy.decisions(rollout).logp.sum().backward()
    optimizer.step()
    after = policy.decisions(rollout).logp
    with torch.no_grad(), policy.reference():
        base = policy.decisions(rollout).logp
    assert (after - before).abs().max() > 1e-2
    assert torch.allclose(base, before, atol=1e-6)
    assert policy.counters["images_encoded"] == 0
    with pytest.raises(UserError, match="cannot be applied"):
        own(lora=VLMLoRA(targets="no_such_layer"))


def test_what_is_exported_loads_as_it_was(own, tmp_path):
    policy = own(value_head=True)
    policy.export(tmp_path / "whole")
    again = VLMPolicy(load_vlm(str(tmp_path / "whole")), max_new_tokens=6)
    prompts = mixed_prompts()
    assert isinstance(load_vlm(str(tmp_path / "whole")), LoadedVLM)
    assert torch.equal(again.rollout(prompts, 2, 3).logp, policy.rollout(prompts, 2, 3).logp)

    small = VLMPolicy(load_vlm(str(tmp_path / "whole"), max_pixels=4 * 28 * 28), max_new_tokens=2)
    assert small.rollout(prompts[:1], 2, 3).samples.sizes[0] == [(28, 56)]
    assert again.rollout(prompts[:1], 2, 3).samples.sizes[0] == [(56, 84)]

    adapted = VLMPolicy(load_vlm(str(tmp_path / "whole")), max_new_tokens=6, lora=VLMLoRA(rank=2))
    with torch.no_grad():
        for parameter in adapted.parameters:
            parameter.normal_(std=0.1)
    adapted.export(tmp_path / "adapter")
    from peft import PeftModel

    base = load_vlm(str(tmp_path / "whole"))
    whole = PeftModel.from_pretrained(base.model, tmp_path / "adapter").merge_and_unload()
    merged = VLMPolicy(whole, base.processor, max_new_tokens=6)
    assert (merged.rollout(prompts, 1, 3).logp - adapted.rollout(prompts, 1, 3).logp).abs().max() < 1e-4


def test_broken_rows_are_named(make, tmp_path):
    policy = make()
    (tmp_path / "broken.png").write_bytes(picture(60, 60, 0).tobytes()[:200])
    picture(60, 60, 0).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    bad = {
        "no picture": Prompt("a", "r1", images=[str(tmp_path / "missing.png")]),
        "not a picture": Prompt("a", "r1", images=[str(tmp_path / "broken.png")]),
        "broken picture": Prompt("a", "r1", images=[str(tmp_path / "cut.png")]),
        "no clip": Prompt("a", "r1", videos=[str(tmp_path / "missing.mp4")]),
        "no frames": Prompt("a", "r1", videos=[[]]),
        "2 image parts, but it has 1": Prompt(
            messages=[{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}],
            id="r1",
            images=[picture(60, 60, 0)],
        ),
        "part of type 'sound'": Prompt(messages=[{"role": "user", "content": [{"type": "sound"}]}], id="r1"),
        "processor refuses": Prompt("a <|image_pad|> of my own", "r1"),
    }
    for message, prompt in bad.items():
        with pytest.raises(UserError, match=f"row 'r1'.*{message}"):
            policy.rollout([Prompt("fine", "ok"), prompt], 2, seed=0)


def test_prompts_that_are_too_long_are_refused_by_row(make):
    long = Prompt("a circle and a square " * 40, "long")
    with pytest.raises(UserError, match=r"row 'long': its prompt has .* tokens, but at most 100"):
        make(max_prompt_tokens=100).rollout([long], 2, seed=0)
    with pytest.raises(UserError, match="row 'long'"):
        make(max_new_tokens=4090).rollout([long], 2, seed=0)


def test_processor_of_another_model_is_refused(pair):
    model, processor = pair
    other = copy.deepcopy(processor)
    other.tokenizer.add_tokens([f"<more {k}>" for k in range(100)])
    with pytest.raises(UserError, match="processor and model disagree"):
        VLMPolicy(model, other)
    with pytest.raises(UserError, match="no tokenizer"):
        VLMPolicy(model, processor.image_processor)


def test_models_with_cross_attention_are_refused(pair):
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    text = sizes | {"vocab_size": 64, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0}
    vision = sizes | {
        "attention_heads": 2,
        "num_global_layers": 1,
        "image_size": 28,
        "intermediate_layers_indices": [0],
    }
    model = MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text))
    with pytest.raises(UserError, match="cross-attention, which is not supported"):
        VLMPolicy(model, pair[1])


def test_a_shared_prompt_that_is_not_exact_is_given_up_with_a_message(own, caplog):
    policy = own()
    # A model whose attention looks only a few tokens back from where the cache believes to be.
    forward = policy.model.model.language_model.layers[1].self_attn.forward

    def forgetful(hidden_states, *args, past_key_values=None, **kwargs):
        if past_key_values is not None and past_key_values.get_seq_length(1) > 0:
            past_key_values.layers[1].keys = past_key_values.layers[1].keys * 0.5
        return forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)

    policy.model.model.language_model.layers[1].self_attn.forward = forgetful
    rollout = policy.rollout(mixed_prompts(), 2, seed=0)
    assert "shared prompt is not exact" in caplog.text
    assert "full run" in caplog.text
    assert policy.scorer.sharing is False
    assert (policy.decisions(rollout).logp - rollout.logp).abs().max() < 1e-5


def test_log_probs_in_portions_are_the_same():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(23, 8, generator=generator).requires_grad_()
    head = torch.randn(50, 8, generator=generator).requires_grad_()
    tokens = torch.randint(0, 40, (23,), generator=generator)
    banned = torch.tensor([41, 49])
    found = []
    for chunk in (1 << 20, 200):
        logp, entropy = token_logps(hidden, tokens, lambda x: x @ head.T, 0.7, banned, True, chunk, 50)
        found.append((logp, entropy, *torch.autograd.grad((logp * logp.detach() + entropy).sum(), [hidden, head])))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() < 1e-5 * a.norm()


def test_dialogues_go_on_from_the_cache(make):
    """A turn, a message of the environment with a picture, and another turn: as if run in one piece."""
    from pipelines.vlm.decoding import Decoder
    from pipelines.vlm.media import Shelf
    from pipelines.vlm.prefix import extend

    policy = make(max_new_tokens=5)
    rows = policy.reader.read([mixed_prompts()[0], mixed_prompts()[1]])
    state, cache, mask = policy.network.prefill(rows)
    decoder: Decoder = policy.decoder
    uniforms = torch.rand(2, 10, generator=torch.Generator().manual_seed(0))
    position = torch.tensor([len(row) + row.delta for row in rows])
    limits = torch.tensor([5, 3])
    first = decoder(state, cache, mask, position, 3, uniforms, policy.sampling, limits=limits, keep_cache=True)
    said = [policy.reader.plain(first.tokens[k, : first.lengths[k]]) for k in range(2)]
    shelf = Shelf(policy.counters)
    with shelf.in_processor(policy.processor):
        crop = shelf.picture(picture(60, 60, 9), "r")
        text = "<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>see<|im_end|>\n"
        told = [
            policy.reader.process(text, [crop], [], shelf, "r", first=False),
            policy.reader.process("go on", [], [], shelf, "r", first=False),
        ]
    rest = [[(said[k], True), (told[k], False)] for k in range(2)]
    trace, model_says = joined_trace(policy.reader, rows, rest)
    new = [trace.lengths[k] - len(told[k]) - 1 for k in range(2)]
    with torch.no_grad():
        state, cache, mask = extend(
            policy.network,
            first.cache,
            first.mask,
            [trace.tokens[k, new[k] : trace.lengths[k]] for k in range(2)],
            [trace.positions[k, :, new[k] : trace.lengths[k]] for k in range(2)],
            trace.media[0],
            [trace.types[k, new[k] : trace.lengths[k]] for k in range(2)],
        )
    position = torch.tensor([int(trace.positions[k, :, trace.lengths[k] - 1].max()) + 1 for k in range(2)])
    second = decoder(state, cache, mask, position, 3, uniforms[:, 5:], policy.sampling)
    for k in range(2):
        rest[k].append((policy.reader.plain(second.tokens[k, : second.lengths[k]]), True))
    trace, model_says = joined_trace(policy.reader, rows, rest)
    for share in ("always", "never"):
        scorer = make(share_prefix=share, max_new_tokens=5).scorer
        logp = scorer(trace, model_says, 1.0, policy.banned).logp
        for k in range(2):
            expected = torch.cat([first.logp[k, : first.lengths[k]], second.logp[k, : second.lengths[k]]])
            assert torch.allclose(logp[k, model_says[k, : logp.shape[1]]], expected, atol=1e-5)
    assert len(unique_prompts(trace.prompts)[0]) == 2
