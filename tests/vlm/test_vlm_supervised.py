"""Supervised losses of VLMPolicy against the library's, for answers, dialogues and rollouts."""

import pytest
import torch
from vlm_rows import mixed_prompts, picture

from mmrl.algorithms.base import Context
from mmrl.algorithms.supervised import Supervised
from mmrl.errors import UserError
from mmrl.tally import Clock, Tally
from mmrl.types import Prompt, Rollout, Samples


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


def test_rows_without_a_response_are_named(make):
    with pytest.raises(UserError, match=r"row 'b'.*no response"):
        make().fit(Samples([Prompt("x", "a", target="y"), Prompt("x", "b")]), [0, 0])
