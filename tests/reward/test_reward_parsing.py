"""Answers, boxes, points, numbers and choices in what a model wrote."""

import pytest

from rewards.parsing import (
    Marked,
    ToolCall,
    answer_of,
    boxes_of,
    choice_of,
    code_of,
    count_of,
    integers,
    interval_of,
    json_values,
    loads,
    number_of,
    numbers,
    points_of,
    says_nothing,
    tool_calls,
)


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        ("<think>a</think><answer> b </answer>", "b", "b"),
        ("<answer>a</answer> no, <answer>b</answer>", "b", "b"),
        ("<think>maybe</think> b", "b", None),
        ("b", "b", None),
        ("<think>x</think><answer>b", None, None),
        ("</answer>b<answer>", None, None),
        ("", "", None),
    ],
)
def test_answer(text, lenient, strict):
    assert answer_of(text) == lenient
    assert answer_of(text, strict=True) == strict


def test_answer_without_a_tag():
    assert answer_of("<answer>b</answer>", tag="") == "<answer>b</answer>"
    assert answer_of("<final>c</final>", tag="final") == "c"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        ("{'a': True, 'b': (1, 2)}", {"a": True, "b": [1, 2]}),
        ("['it\\'s', \"a 'b'\"]", ["it's", "a 'b'"]),
        ("[1, 2", None),
        ("", None),
        ("[" * 40 + "]" * 40, None),
        ("[" * 100_000, None),
        ("9" * 5000, float("inf")),
        ("__import__('os').system('true')", None),
        ("{[]: 1}", None),
    ],
)
def test_json(text, value):
    assert loads(text) == value


def test_json_in_prose():
    assert json_values('The box is {"bbox": [1, 2]} and [3], I think.') == [{"bbox": [1, 2]}, [3]]
    assert json_values("First:\n```json\n[1, 2]\n```\nthat is [3].") == [[1, 2]]
    assert json_values("[ oh [1, 2] {") == [[1, 2]]
    assert json_values("no brackets") == []


@pytest.mark.parametrize(
    ("text", "boxes"),
    [
        ("[1, 2, 3, 4]", [(1, 2, 3, 4)]),
        ("[[1, 2, 3, 4]]", [(1, 2, 3, 4)]),
        ("(1,2),(3,4)", [(1, 2, 3, 4)]),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", [(1, 2, 3, 4)]),
        ("[[1, 2], [3, 4]]", [(1, 2, 3, 4)]),
        ("from 1 2 to 3 4", [(1, 2, 3, 4)]),
        ('{"x1": 1, "y1": 2, "x2": 3, "y2": 4}', [(1, 2, 3, 4)]),
        ('{"objects": [{"bbox": [1, 2, 3, 4]}, {"box": [5, 6, 7, 8.5]}]}', [(1, 2, 3, 4), (5, 6, 7, 8.5)]),
        ("[1, 2, 3]", []),
        ('[1, 2, "3", 4]', [(1, 2, 3, 4)]),
        ('{"bbox_2d": [1, 2, NaN, 4]}', []),
        ('{"bbox_2d": [1, 2, Infinity, 4]}', []),
        ('{"bbox_2d": [1, 2, true, 4]}', []),
        ("[]", []),
        ("[1e999, 2, 3, 4]", []),
        ("nothing", []),
    ],
)
def test_boxes(text, boxes):
    assert [one.box for one in boxes_of(text)] == boxes


def test_labels_of_boxes():
    text = '```json\n[{"bbox_2d": [1, 2, 3, 4], "label": " Cat "}, {"bbox_2d": [5, 6, 7, 8]}]\n```'
    assert boxes_of(text) == [Marked((1, 2, 3, 4), "Cat"), Marked((5, 6, 7, 8), "")]


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("[1, 2]", [(1, 2)]),
        ("(1.5, 2)", [(1.5, 2)]),
        ("[[1, 2], [3, 4]]", [(1, 2), (3, 4)]),
        ('{"point_2d": [1, 2], "label": "x"}', [(1, 2)]),
        ('[{"point": [1, 2]}, {"x": 3, "y": 4}]', [(1, 2), (3, 4)]),
        ("x=1 y=2", [(1, 2)]),
        ("[1, 2, 3, 4]", []),
        ("1 2 3", []),
    ],
)
def test_points(text, points):
    assert points_of(text) == points


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("42", 42),
        ("It is 1,234.5 m", 1234.5),
        ("-3e2", -300),
        ("3/4", 0.75),
        ("1/0", 0),
        ("between 3-4", 4),
        ("10 of 12", 12),
        ("none", None),
        ("1" + "0" * 5000, None),
        ("x2", None),
        (".5", 0.5),
    ],
)
def test_number(text, number):
    assert number_of(text) == number


def test_numbers_and_counts():
    assert numbers("1,2 and 3.5.") == [1, 2, 3.5]
    assert integers("[3, 1, 2.0, 2.5]") == [3, 1, 2]
    assert count_of("There are Three of them") == 3
    assert count_of("three or 4") == 4
    assert count_of("someone") is None


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("B.", "B"),
        ("B: the dog", "B"),
        ("(C) the dog", "C"),
        ("The answer is C", "C"),
        ("Answer: (D)", "D"),
        ("**B**", "B"),
        (r"\boxed{B}", "B"),
        (r"so $\boxed{\text{C}}$", "C"),
        ("I would take (A) here", "A"),
        ("(A) or (B)", "A"),
        ("either (A) or (B)", None),
        ("A bird", None),
        ("a dog.", "B"),
        ("", None),
        ("é", None),
    ],
)
def test_choice(text, letter):
    assert choice_of(text, ["a cat", "A dog"]) == letter


def test_intervals():
    assert interval_of("[3.5, 8]") == (3.5, 8)
    assert interval_of("from 3.5 s to 8 s") == (3.5, 8)
    assert interval_of("00:03 - 01:08.5") == (3, 68.5)
    assert interval_of("1:00:03 to 1:01:08") == (3603, 3668)
    assert interval_of('{"start": 1, "end": 2}') == (1, 2)
    assert interval_of("at 5") is None


def test_tool_calls():
    text = (
        'Let me look. <tool_call>{"name": "zoom", "arguments": {"bbox_2d": [1, 2, 3, 4]}}</tool_call> or '
        '<tool_call>{"name": "zoom", "arguments": "{\\"a\\": 1}"}</tool_call><tool_call>broken</tool_call>'
        '<tool_call>{"name": 3}</tool_call><tool_call>{"name": "open"'
    )
    assert tool_calls(text) == [ToolCall("zoom", {"bbox_2d": [1, 2, 3, 4]}), ToolCall("zoom", {"a": 1})]


def test_code_blocks():
    text = "a\n```python\nx = 1\n```\nb\n```svg\n<svg/>\n```"
    assert code_of(text) == "<svg/>\n"
    assert code_of(text, ["python"]) == "x = 1\n"
    assert code_of("```python\nx = 1", ["python"]) == "x = 1"
    assert code_of("x = 1") is None


def test_saying_that_there_is_nothing():
    assert says_nothing("[]")
    assert says_nothing("None.")
    assert not says_nothing("")
    assert not says_nothing("a cat")
