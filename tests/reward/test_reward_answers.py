"""Rewards of answers in words, numbers, lists and actions."""

import json
import threading

import pytest

from mmrl.errors import UserError
from mmrl.scoring import Scorer
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.answers import word_f1


def score(name, text, target, *, fields=None, **options):
    prompt = Prompt("what?", id="rows.jsonl:7", target=target, **(fields or {}))
    (found,) = load_reward(name, **options)(Samples([prompt], texts=[text]))
    return found


def test_exact():
    assert score("exact", "<think>no</think><answer> Yes. </answer>", "yes") == 1
    assert score("exact", "Yes", "yes", case=True) == 0
    assert score("exact", "the  grey\ncat", ["gray cat", "The grey cat"]) == 1
    assert score("exact", "<answer>3</answer>", 3) == 1
    assert score("exact", "yes and no", "yes") == 0
    assert score("exact", "", "?") == 0
    assert score("exact", "yes", "yes", strict=True) == 0
    assert score("exact", "<answer>yes", "yes") == 0


def test_choice():
    options = {"metadata": {"options": ["a cat", "a dog"]}}
    assert score("choice", "<answer>(B)</answer>", "B") == 1
    assert score("choice", "B: a dog", "b") == 1
    assert score("choice", "A dog", "B", fields=options) == 1
    assert score("choice", "A", "a dog", fields=options) == 0
    assert score("choice", "either", "B") == 0


def test_number():
    assert score("number", "<answer>1,234</answer>", 1234) == 1
    assert score("number", "about 3.14", "3.14159", tolerance=0.01) == 1
    assert score("number", "3.1", "3.14159", tolerance=0.01) == 0
    assert score("number", "104", 100, relative=0.05) == 1
    assert score("number", "106", 100, relative=0.05) == 0
    assert score("number", "-104", -100, relative=0.05) == 1
    assert score("number", "3/4", 0.75) == 1
    assert score("number", "45%", 45) == score("number", "45%", 0.45) == score("number", "45", "45%") == 1
    assert score("number", "45%", "4500%") == 0
    assert score("number", "0.3", 0.1 + 0.2) == 1
    assert score("number", "0", 0) == 1
    assert score("number", "many", 0) == 0


def test_classification():
    thought = "<think>a cat?</think><answer>Golden Retriever.</answer>"
    assert score("classification", thought, "golden retriever") == 1
    assert score("classification", thought, "golden retriever", thinking=False) == 0
    assert score("classification", "golden retriever", "golden retriever", thinking=False) == 1
    assert score("classification", "golden retriever", "golden retriever") == 0
    long = "<answer>It is a cat.</answer>"
    assert score("classification", long, "cat") == 0
    assert score("classification", long, ["dog", "cat"], contains=True) == 1
    assert score("classification", "<answer>a catfish</answer>", "cat", contains=True) == 0
    with pytest.raises(UserError, match="needs thinking: true"):
        load_reward("classification", thinking=False, contains=True)


def test_order():
    truth = [3, 1, 2, 4]
    assert score("permutation", "<answer>3, 1, 2, 4</answer>", truth) == 1
    assert score("permutation", "[3, 1, 4, 2]", truth) == pytest.approx(0.2 * 2 / 4)
    assert score("permutation", "[3, 1, 4, 2]", truth, partial=1.0) == 0.5
    assert score("permutation", "[3, 3, 2, 4]", truth) == 0
    assert score("permutation", "[3, 1, 2]", truth) == 0
    assert score("permutation", "no idea", truth) == 0


CHANGES = [[1, "colour", "red"], [2, "size", "small"]]


def test_partial_credit():
    def mark(answer, **options):
        return score("partial_credit", f"<answer>{answer}</answer>", CHANGES, normalise=False, **options)

    assert mark(json.dumps(CHANGES)) == 10
    assert mark("(2, size, Small), (1, colour, red)") == 10
    assert mark('[{"object": 1, "attribute": "colour", "value": "red"}]') == 5 - 1
    assert mark('[[1, "colour", "blue"], [2, "shape", "cube"]]') == 1.5 + 0.5
    # Guessing more than there is costs; so does saying nothing.
    assert mark('[[1, "colour", "red"], [2, "size", "small"], [3, "size", "small"]]') == 9
    assert mark("[]") == mark("what") == -2
    assert mark("[]", missing=0.0) == 0
    # Matching is not greedy: the second item takes the exact truth, the first what is left of it.
    twice = [[1, "colour", "red"], [1, "size", "big"]]
    found = score("partial_credit", '[[1, "size", "red"], [1, "size", "big"]]', twice, normalise=False)
    assert found == 5 + 0.5
    assert score("partial_credit", json.dumps(CHANGES), CHANGES) == 1
    with pytest.raises(UserError, match="should be positive and grow"):
        load_reward("partial_credit", credits=(1.0, 0.5))


def test_gui_action():
    click = {"action": "click", "bbox": [100, 100, 200, 200]}

    def mark(answer, target, **options):
        return score("gui_action", f"<answer>{answer}</answer>", target, frame="thousand", **options)

    assert mark('[{"action": "click", "point": [150, 150], "input_text": "no input text"}]', click) == 1
    assert mark("[{'action': 'Click', 'point': [150, 150]}]", click) == 1
    assert mark('{"action": "click", "point": [250, 150]}', click) == 0.5
    assert mark('{"action": "scroll", "point": [150, 150]}', click) == 0.5
    assert mark('{"action": "scroll", "point": [150, 150]}', click, combine="all") == 0
    assert mark('{"action": "press_back"}', {"action": "press_back"}) == 1
    typed = {"action": "type", "text": "hello big world"}
    assert mark('{"action": "type", "input_text": "hello world"}', typed) == 1
    assert mark('{"action": "type", "input_text": "good bye"}', typed) == 0.5
    near = {"action": "click", "point": [500, 500]}
    assert mark('{"action": "click", "point": [530, 500]}', near) == 1
    assert mark('{"action": "click", "point": [530, 500]}', near, radius=0.01) == 0.5
    assert mark("click there", click) == 0


def test_word_f1():
    assert word_f1("hello world", "hello big world") == pytest.approx(0.8)
    assert word_f1("a a", "a") == pytest.approx(2 / 3)
    assert word_f1("", "") == 1
    assert word_f1("", "a") == 0


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("exact", None, "has no ground truth in 'target'"),
        ("exact", True, "but it should be text or a number"),
        ("exact", [], "a text or number, or a list of at least one"),
        ("choice", "the second", "should be the letter of a choice"),
        ("number", "many", "should be a number"),
        ("classification", {"a": 1}, "should be text or a number"),
        ("permutation", [1, 1, 2], "a list of different whole numbers"),
        ("permutation", [1, 2.5], "a list of different whole numbers"),
        ("partial_credit", [[1, 2]], "a list of items of 3 fields each"),
        ("math", [1], "should be text or a number"),
        ("edit_distance", "", "a text that is not empty"),
    ],
)
def test_bad_ground_truth_names_the_row(name, target, message):
    with pytest.raises(UserError) as caught:
        score(name, "1", target)
    assert message in str(caught.value)
    assert "rows.jsonl:7" in str(caught.value)


def test_bad_truth_of_an_action():
    with pytest.raises(UserError, match=r"rows.jsonl:7.*a mapping with an 'action'"):
        score("gui_action", "1", {"point": [1, 2]}, frame="unit")
    with pytest.raises(UserError, match=r"rows.jsonl:7.*does not lie in the picture"):
        score("gui_action", "1", {"action": "click", "point": [1, 2]}, frame="unit")


def maths(pairs):
    """Golds and answers as samples."""
    prompts = [Prompt("?", id=f"m:{k}", target=gold) for k, (gold, _) in enumerate(pairs)]
    return Samples(prompts, texts=[answer for _, answer in pairs])


def test_maths_off_the_main_thread():
    pytest.importorskip("math_verify")
    reward = load_reward("math", seconds=10)
    pairs = {
        ("1/2", "<answer>0.5</answer>"): 1,
        (r"\sqrt{8}", r"<answer>2\sqrt{2}</answer>"): 1,
        (r"\sqrt{8}", "<answer>2</answer>"): 0,
        ("$x^2+2x+1$", r"so \boxed{(x+1)^2}"): 1,
        (r"\{1, 2\}", r"$\{2, 1\}$"): 1,
        (7, "7"): 1,
        (7, ""): 0,
        ("7", "<answer>7"): 0,
        ("no idea", "7"): None,
    }
    found = []
    thread = threading.Thread(target=lambda: found.extend(reward(maths(list(pairs)))))
    thread.start()
    thread.join()
    assert found == list(pairs.values())
    # The scorer's own timeout uses a thread as well.
    assert Scorer([reward])(maths([("1/2", "2/4")])).total.tolist() == [1]


def test_an_expression_that_never_ends_does_not_hold_up_the_run():
    pytest.importorskip("math_verify")
    from rewards.math_answers import MathProcess

    process = MathProcess(1)
    process._start()
    assert process.right("3", "$9^{9^{9^{9^9}}}$") is not True
    process.process.kill()
    process.process.wait()
    assert process.right("7", "7") is True
    process.stop()
