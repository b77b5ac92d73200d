"""VLMPolicy on a tiny Qwen2.5-VL: scoring, shared prompts, freezing, adapters, bad rows."""

import copy

import pytest
import torch
from vlm_rows import mixed_prompts, picture
from zoo.vlms.linear import qwen3_5

from mmrl.algorithms.experience import with_groups
from mmrl.errors import UserError
from mmrl.types import Prompt, Rollout, Samples
from pipelines import VLMLoRA, VLMPolicy
from pipelines.vlm.loading import LoadedVLM, load_vlm
from pipelines.vlm.prefix import joined_trace, unique_prompts
from pipelines.vlm.token_logps import token_logps
from pipelines.vlm.training import features_train, part_of


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
