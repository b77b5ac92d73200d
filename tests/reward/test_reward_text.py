"""Rewards of a text's form, and of its nearness to a reference, against other libraries."""

import math
import random

import pytest
import torch

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.text_overlap import edit_distance


def score(name, text, target=None, *, length=None, truncated=False, prompt="what?", metadata=None, **options):
    lengths = None if length is None else torch.tensor([length])
    prompts = [Prompt(prompt, id="rows.jsonl:7", target=target, metadata=metadata or {})]
    samples = Samples(prompts, texts=[text], lengths=lengths, truncated=torch.tensor([truncated]))
    (found,) = load_reward(name, **options)(samples)
    return found


@pytest.mark.parametrize(
    ("text", "all_or_nothing", "graded"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" <think>a</think>\n\n<answer>b</answer>\n", 1, 1),
        ("Well: <think>a</think><answer>b</answer>", 0, 2 / 3),
        ("<think>a</think> so <answer>b</answer>", 0, 2 / 3),
        ("<think>a</think><answer>b</answer> done", 0, 2 / 3),
        ("<think>a</think>b", 0, 1 / 3),
        ("<think></think><answer>b</answer>", 0, 2 / 3),
        ("<answer>b</answer><think>a</think>", 0, 1 / 3),
        ("<think>a<think>b</think><answer>c</answer>", 0, 2 / 3),
        ("<think>a</think><answer>b", 0, 1 / 3),
        ("", 0, 1 / 3),
    ],
)
def test_format(text, all_or_nothing, graded):
    assert score("format", text) == all_or_nothing
    assert score("format", text, graded=True) == pytest.approx(graded)


def test_format_with_other_tags():
    assert score("format", "<box>1</box>", tags=["box"]) == 1
    with pytest.raises(UserError, match="should be a name without brackets"):
        load_reward("format", tags=["<think>"])
    with pytest.raises(UserError, match="tags is empty"):
        load_reward("format", tags=[])


def test_json_schema():
    schema = {"type": "array", "items": {"type": "object", "required": ["bbox_2d"]}, "minItems": 1}
    assert score("json_schema", '<answer>[{"bbox_2d": [1]}]</answer>', schema=schema) == 1
    assert score("json_schema", '```json\n[{"bbox_2d": [1]}]\n```', schema=schema) == 1
    assert score("json_schema", "[{}]", schema=schema) == 0
    assert score("json_schema", "[]", schema=schema) == 0
    assert score("json_schema", "broken [", schema=schema) == 0
    assert score("json_schema", "{}") == 1
    assert score("json_schema", "1") == 0
    per_row = {"metadata": {"form": '{"type": "integer"}'}, "schema_column": "form"}
    assert score("json_schema", "3", **per_row) == 1
    assert score("json_schema", "3.5", **per_row) == 0
    with pytest.raises(UserError, match="'schema' is no JSON schema"):
        load_reward("json_schema", schema={"type": "shape"})
    with pytest.raises(UserError, match=r"rows.jsonl:7.*no ground truth in column 'other'"):
        score("json_schema", "3", schema_column="other")


def test_length_follows_the_cosine():
    options = {"limit": 100, "of": {"type": "exact"}}
    for right, (start, end) in {"yes": (1.0, 0.5), "no": (-1.0, -0.5)}.items():
        for length in (0, 25, 50, 100, 150):
            wanted = end + 0.5 * (start - end) * (1 + math.cos(math.pi * min(length, 100) / 100))
            assert score("length", right, "yes", length=length, **options) == pytest.approx(wanted)
    assert score("length", "yes", "yes", length=150, exceeded=-2.0, **options) == -2
    assert score("length", "yes", "yes", length=50, truncated=True, exceeded=-2.0, **options) == -2
    assert score("length", "whatever", length=100, limit=100) == 0.5


def test_wrong_answers_are_not_rewarded_as_right():
    """The mistake in VLM-R1's function: every answer got the schedule of right ones."""
    options = {"limit": 100, "of": {"type": "number"}}
    for length in (1, 50, 99):
        assert score("length", "5", 4, length=length, **options) < 0 < score("length", "4", 4, length=length, **options)


def test_length_leaves_out_what_the_inner_reward_leaves_out(tmp_path):
    path = tmp_path / "inner.py"
    path.write_text("def unknown(completions):\n    return [None for _ in completions]\n")
    assert score("length", "x", length=3, limit=10, of={"type": f"{path}:unknown"}) is None
    with pytest.raises(UserError, match="'of' needs a 'type'"):
        load_reward("length", limit=10, of={"name": "x"})
    with pytest.raises(UserError, match=r"there is no reward 'exat' \(did you mean 'exact'"):
        load_reward("length", limit=10, of={"type": "exat"})
    with pytest.raises(UserError, match="needs the number of tokens"):
        score("length", "x", limit=10)


def test_overlong():
    marks = {0: 0, 80: 0, 81: -0.05, 90: -0.5, 100: -1, 200: -1}
    for length, mark in marks.items():
        assert score("overlong", "x", length=length, limit=100, buffer=20) == pytest.approx(mark)
    with pytest.raises(UserError, match="buffer is 20, more than limit"):
        load_reward("overlong", limit=10, buffer=20)


def test_repetition():
    assert score("repetition", "a b c d e") == 0
    # Five pairs of words, of which (a, b) and (b, a) are all there is.
    assert score("repetition", "a b a b A b", size=2) == pytest.approx(2 / 5 - 1)
    assert score("repetition", "哈哈哈哈", size=2, unit="characters") == pytest.approx(1 / 3 - 1)
    assert score("repetition", "a b", size=3) == score("repetition", "") == 0


def test_language():
    assert score("language", "Hello, wörld 42!", script="latin") == 1
    assert score("language", "ab你好", script="chinese") == 0.5
    assert score("language", "これは漢字です", script="japanese") == 1
    assert score("language", "привет", script="latin") == 0
    assert score("language", "42 [1, 2]", script="latin") is None
    assert score("language", "Ответ: cat", prompt="Что на картинке?") == pytest.approx(5 / 8)
    assert score("language", "看", prompt="这是什么?") == 1
    assert score("language", "word", prompt="123") is None
    messages = Prompt(messages=[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "где?"}]}])
    assert load_reward("language")(Samples([messages], texts=["там"])) == [1]


def random_text(rng, most):
    return "".join(rng.choice("abc é你") for _ in range(rng.randrange(most)))


def test_edit_distance_equals_that_of_rapidfuzz():
    distance = pytest.importorskip("rapidfuzz").distance.Levenshtein
    rng = random.Random(0)
    for _ in range(300):
        a, b = random_text(rng, 30), random_text(rng, 30)
        assert edit_distance(a, b) == distance.distance(a, b)
        assert edit_distance(a.split(), b.split()) == distance.distance(a.split(), b.split())
        if b.strip():
            found = score("edit_distance", a, b)
            assert found == pytest.approx(distance.normalized_similarity(a.strip(), b.strip()))


def test_edit_distance():
    assert score("edit_distance", "<answer>kitten</answer>", "sitting") == pytest.approx(1 - 3 / 7)
    assert score("edit_distance", "Cat", "cat") == pytest.approx(2 / 3)
    assert score("edit_distance", "Cat", "cat", case=False) == 1
    assert score("edit_distance", "the big cat", "the cat", unit="words", over="truth") == 0.5
    assert score("edit_distance", "x" * 20_000, "abc", over="truth") == 0
    assert score("edit_distance", "", "abc") == 0
    assert score("edit_distance", "abd", ["xyz", "abc"]) == pytest.approx(2 / 3)


def test_bleu_and_rouge_are_those_of_the_libraries():
    sacrebleu = pytest.importorskip("sacrebleu")
    rouge = pytest.importorskip("rouge_score.rouge_scorer")
    found, truths = "the cat sat on a mat today", ["the cat sat on the mat", "a cat sat on a mat"]
    expected = sacrebleu.sentence_bleu(found, truths, use_effective_order=True).score / 100
    assert 0 < expected < 1
    assert score("bleu", f"<answer>{found}</answer>", truths) == pytest.approx(expected)
    assert score("bleu", found, truths, metric="chrf") == pytest.approx(
        sacrebleu.sentence_chrf(found, truths).score / 100
    )
    assert score("bleu", truths[0], truths) == pytest.approx(1)
    assert score("bleu", "", truths) == score("rouge", "", truths) == 0
    for kind in ("rouge1", "rouge2", "rougeL"):
        each = [rouge.RougeScorer([kind]).score(truth, found)[kind].fmeasure for truth in truths]
        assert score("rouge", found, truths, kind=kind) == pytest.approx(max(each))
    # By hand: 6 of 7 and 6 words are in the longest common subsequence of "the cat sat on a mat today" and the second.
    assert score("rouge", found, truths[1]) == pytest.approx(2 * 5 / (7 + 6))
