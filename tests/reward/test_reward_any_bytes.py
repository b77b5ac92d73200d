"""Whatever a model writes, a reward of its text gives a number or None and never raises."""

import json
import math
import random
import time

import pytest
import torch

from mmrl.types import Prompt, Samples
from rewards import load_reward, parsing

COUNT = 10_000

NEAR = [
    "<think>hmm</think><answer>[0.1, 0.2, 0.5, 0.6]</answer>",
    '<answer>[{"bbox_2d": [0.1, 0.2, 0.5, 0.6], "label": "cat"}]</answer>',
    '```json\n[{"point_2d": [0.3, 0.3], "label": "x"}]\n```',
    "<answer>[{'action': 'click', 'point': [0.3, 0.4], 'input_text': 'a b'}]</answer>",
    "<answer>(0, colour, red), (2, size, small)</answer>",
    "<answer>3, 1, 2</answer>",
    "<answer>from 00:03 to 01:08</answer>",
    "The answer is (B).",
    r"so \boxed{\frac{1}{2}}",
    "<answer>1,234.5e3 %</answer>",
    '<tool_call>{"name": "zoom", "arguments": {"bbox": [1, 2, 3, 4]}}</tool_call>',
    "(10,20),(30,40)",
]
NASTY = [
    "",
    "\x00",
    "\ud800\udfff",
    "[" * 30_000,
    "{" * 5_000 + "}" * 5_000,
    "[" * 31 + "1" + "]" * 31,
    "9" * 30_000,
    "[" + "9" * 5_000 + ", 1, 2, 3]",
    "-" * 30_000,
    "1e" * 10_000,
    "1," * 15_000,
    "1,111" * 5_000,
    "1.1.1" * 5_000,
    "1:1" * 9_000,
    "(" * 30_000,
    "(a, " * 9_000,
    "'" * 30_000,
    "['\\" * 9_000,
    "<answer>" * 5_000,
    "<answer>" * 3_000 + "</answer>" * 3_000,
    "<think>" * 3_000 + "</think>",
    "```" * 9_000,
    "```json\n[NaN, Infinity, -Infinity, 1e999]\n```",
    "[NaN, NaN, NaN, NaN]",
    "[1e308, 1e308, -1e308, -1e308]",
    "[-1e308, -1e308, 1e308, 1e308]",
    "[0.5, 0.5, 0.5, 0.5]",
    "[0.6, 0.6, 0.2, 0.2]",
    "[[1e300, 1e300], [-1e300, 1e300]]",
    '{"bbox_2d": {"bbox_2d": {"bbox_2d": [1, 2, 3, 4]}}}',
    '{"objects": [{"objects": [{"objects": []}]}]}',
    "1/0",
    "0/0",
    "1e308/1e-308",
    "a" * 50_000,
    "a " * 25_000,
    "answer is " * 5_000,
    "\\boxed{" * 5_000,
    "\u202e\u0301" * 5_000,
    "١٢٣ ½ ² Ⅷ",
    json.dumps({"a": "\ud800"}),
]


def any_texts(count):
    """Random bytes as two decodings, and mutations of answers that are nearly right."""
    rng = random.Random(0)
    texts = list(NASTY) + list(NEAR)
    while len(texts) < count:
        kind = rng.randrange(4)
        if kind == 0:
            texts.append(rng.randbytes(rng.randrange(60)).decode("latin-1"))
        elif kind == 1:
            texts.append(rng.randbytes(rng.randrange(60)).decode("utf-8", errors="replace"))
        elif kind == 2:
            texts.append(
                "".join(rng.choice("[]{}()<>/\\'\",:.-+0123456789eE \nNaIn`ABx$_%") for _ in range(rng.randrange(60)))
            )
        else:
            texts.append(mutated(rng.choice(NEAR), rng))
    return texts


def mutated(text, rng):
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(text) + 1)
        change = rng.randrange(4)
        if change == 0:
            text = text[:place] + rng.choice("[]{}<>'\",0-.eN\x00é") + text[place:]
        elif change == 1:
            text = text[:place] + text[place + 1 + rng.randrange(3) :]
        elif change == 2:
            text = text[:place] + text[place // 2 : place] + text[place:]
        else:
            text = text[:place]
    return text


TEXTS = any_texts(COUNT)
BOX, BOXES = [0.1, 0.2, 0.5, 0.6], [{"bbox_2d": [0.1, 0.2, 0.5, 0.6], "label": "cat", "weight": 2}]
PATH = [[0.1, 0.1], [0.5, 0.5]]
ZERO_OR_ONE = {0.0, 1.0}
# Each reward with options, a truth, and the range or the set of its scores.
CASES = {
    "iou": ({"frame": "unit"}, BOX, (0, 1)),
    "iou pixels giou": ({"frame": "pixels", "kind": "giou"}, [1, 2, 50, 60], (0, 1)),
    "boxes": ({"frame": "unit"}, BOXES, (0, 1)),
    "boxes nothing": ({"frame": "unit"}, [], ZERO_OR_ONE),
    "salient_boxes": ({"frame": "unit"}, BOXES, (0, 1)),
    "point_in_box": ({"frame": "thousand", "target_frame": "unit"}, BOX, (0, 1)),
    "point_in_region": ({"frame": "unit", "reach": 0.1}, [[0.1, 0.1], [0.5, 0.1], [0.5, 0.5]], (0, 1)),
    "point_distance": ({"frame": "unit"}, PATH, (0, 1)),
    "point_distance linear": ({"frame": "unit", "falloff": "linear"}, PATH, (0, 1)),
    "trajectory": ({"frame": "unit"}, PATH, (0, 1)),
    "trajectory mean": ({"frame": "unit", "measure": "mean"}, PATH, (0, 1)),
    "trajectory dtw": ({"frame": "unit", "measure": "dtw"}, PATH, (0, 1)),
    "temporal_iou": ({}, [3, 8], (0, 1)),
    "counting": ({}, 3, ZERO_OR_ONE),
    "counting boxes": ({"of": "boxes", "graded": True}, 2, (0, 1)),
    "exact": ({}, "cat", ZERO_OR_ONE),
    "choice": ({}, "B", ZERO_OR_ONE),
    "number": ({"relative": 0.05}, 1234.5, ZERO_OR_ONE),
    "classification": ({"contains": True}, "cat", ZERO_OR_ONE),
    "permutation": ({}, [3, 1, 2], (0, 1)),
    "partial_credit": ({"wrong": 0.1}, [[0, "colour", "red"], [2, "size", "small"]], (-math.inf, 1)),
    "gui_action": ({"frame": "unit"}, {"action": "click", "bbox": BOX, "text": "a b"}, (0, 1)),
    "format": ({}, None, ZERO_OR_ONE),
    "format graded": ({"graded": True}, None, (0, 1)),
    "json_schema": ({"schema": {"type": "array", "items": {"type": "number"}}}, None, ZERO_OR_ONE),
    "length": ({"limit": 50, "of": {"type": "number"}}, 7, (-1, 1)),
    "overlong": ({"limit": 50, "buffer": 20}, None, (-1, 0)),
    "repetition": ({}, None, (-1, 0)),
    "language": ({"script": "latin"}, None, (0, 1)),
    "edit_distance": ({}, "a cat sat on a mat", (0, 1)),
    "bleu": ({}, "a cat sat on a mat", (0, 1 + 1e-9)),
    "rouge": ({}, "a cat sat on a mat", (0, 1)),
}
SLOW = {"bleu": 1_000, "rouge": 1_000}


@pytest.mark.parametrize("case", CASES)
def test_rewards(case):
    options, truth, allowed = CASES[case]
    texts = TEXTS[: SLOW.get(case, 2_000)]
    n = len(texts)
    prompt = Prompt("where is the cat?", id="row", target=truth)
    lengths = torch.tensor([len(text) % 70 for text in texts])
    samples = Samples([prompt] * n, texts=texts, lengths=lengths, sizes=[[(64, 64)]] * n)
    start = time.process_time()
    scores = load_reward(case.split()[0], **options)(samples)
    took = time.process_time() - start
    assert len(scores) == n
    given = {score for score in scores if score is not None}
    assert all(isinstance(score, (int, float)) for score in given)
    if isinstance(allowed, set):
        assert given <= allowed
    else:
        assert allowed[0] <= min(given) <= max(given) <= allowed[1]
    assert took < 20, took
    marks = getattr(load_reward(case.split()[0], **options), "marks", None)
    if marks is not None:
        json.dumps(marks(samples[list(range(0, n, 10))]), allow_nan=False)


PARSERS = [
    parsing.answer_of,
    parsing.loads,
    parsing.json_values,
    parsing.numbers,
    parsing.number_of,
    parsing.count_of,
    parsing.integers,
    parsing.boxes_of,
    parsing.points_of,
    parsing.interval_of,
    parsing.choice_of,
    parsing.plain_words,
    parsing.says_nothing,
    parsing.tool_calls,
    parsing.code_of,
]


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_parsers(parser):
    for text in TEXTS:
        start = time.process_time()
        parser(text)
        assert time.process_time() - start < 2, text[:50]


def test_maths():
    pytest.importorskip("math_verify")
    texts = (NEAR + [text for text in NASTY if len(text) < 20_000])[:30] + TEXTS[60:100]
    samples = Samples([Prompt("?", target="1/2")] * len(texts), texts=texts)
    scores = load_reward("math", seconds=3)(samples)
    assert len(scores) == len(texts)
    assert set(scores) <= {0.0, 1.0, None}
