"""What a VLMPolicy says: draws, ends, rows and batches, the likeliest answer, what rewards see of it."""

import torch
from vlm_rows import mixed_prompts
from zoo.vlms import build_vlm

from mmrl.types import Prompt
from pipelines import VLMPolicy
from pipelines.vlm.decoding import Sampling, draw


def test_sampling_without_sharing_draws_the_same(make):
    prompts = mixed_prompts()
    a, b = (make(share_prefix=share).rollout(prompts, 2, seed=3) for share in ("auto", "never"))
    assert torch.equal(a.trace.tokens, b.trace.tokens)
    assert (a.logp - b.logp).abs().max() < 1e-5


def test_rows_do_not_depend_on_their_batch(make):
    prompts = mixed_prompts()
    whole = make().rollout(prompts, 2, seed=7)
    small = make(rollout_batch_size=2).rollout(prompts, 2, seed=7)
    assert torch.equal(whole.trace.tokens, small.trace.tokens)
    turned = make().rollout(prompts[::-1], 2, seed=7)
    assert whole.samples.texts[:2] == turned.samples.texts[-2:]
    assert make().rollout(prompts, 2, seed=8).samples.texts != whole.samples.texts


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
