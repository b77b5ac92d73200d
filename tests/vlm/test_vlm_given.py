"""Completions that are given to a VLM: exact replay from token ids, texts with their end, pairs that share a prompt."""

import pytest
import torch
from PIL import Image
from zoo.vlms import build_vlm

from mmrl import Prompt
from mmrl.types import Rollout, Samples
from pipelines import VLMPolicy


@pytest.fixture(scope="module")
def policy():
    return VLMPolicy(*build_vlm("qwen2_5_vl"), max_new_tokens=8)


@pytest.fixture(scope="module")
def prompts():
    picture = Image.new("RGB", (56, 56), "red")
    return [Prompt("what colour?", id="a", images=[picture]), Prompt("count", id="b")]


def test_token_ids_make_the_same_row_again(policy, prompts):
    rollout = policy.rollout(prompts, 3, seed=1)
    again = policy.given(rollout.samples.prompts, policy.completions(rollout))
    assert again.samples.texts == rollout.samples.texts
    assert torch.equal(again.mask, rollout.mask)
    assert (again.logp - rollout.logp).abs().max() < 1e-5
    assert again.samples.truncated.tolist() == rollout.samples.truncated.tolist()


def test_a_text_gets_its_end_token_and_is_cut_at_the_limit(policy, prompts):
    rollout = policy.given(prompts, ["red", "one two three four five six seven eight nine ten"])
    assert rollout.samples.texts[0] == "red"
    assert rollout.samples.truncated.tolist() == [False, True]
    assert rollout.mask.sum(1)[1] == 8
    fit = policy.fit(policy.given(prompts, ["red", "a"], score=False))
    assert (fit - policy.fit(Samples(prompts, texts=["red", "a"]))).abs().max() < 1e-4


def test_the_two_answers_of_a_pair_share_their_prompt(policy, prompts):
    before = policy.counters.copy()
    both = policy.given([*prompts, *prompts], ["red", "one", "blue", "two"], score=False)
    policy.fit(both)
    assert policy.counters["images_processed"] - before["images_processed"] == 1
    assert policy.counters["prefill_rows"] - before["prefill_rows"] == 2


def test_rows_of_unequal_length_join_and_replay(policy, prompts):
    parts = [policy.given(prompts, ["red", "a"]), policy.given(prompts, ["one two three", ""])]
    joined = Rollout.cat(parts)
    with torch.no_grad():
        found = policy.decisions(joined)
    assert (found.logp - joined.logp).abs().max() < 1e-5


def test_continued_answers_are_those_of_the_sampler(policy, prompts):
    """Going on from nothing with the same random numbers is a rollout; a beginning stays what it was."""
    answers = policy.continued(prompts, [[], []], "", [1, 2])
    again = policy.continued(prompts, [ids[:3] for ids in answers], "", [1, 2])
    assert [ids[:3] for ids in again] == [ids[:3] for ids in answers]
    end = policy.answers.end_id()
    word = policy.reader.answer_ids("red").tolist()
    full = (word * 8)[:8]
    triggered = policy.continued(prompts, [[*word[:2], end], full], " a", [3, 4])
    assert triggered[0][: len(word[:2])] == word[:2]
    assert end not in triggered[0][:-1]
    assert len(triggered[0]) <= 8
    assert triggered[1] == full, "no room is left"
