"""Questions of the shapes world: the detector, which knows only the picture and the words, finds the same answers."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from mmrl.data import load_prompts
from mmrl.errors import UserError
from mmrl.types import Samples
from mmrl.world import detect, draw, score
from mmrl.world.captions import ASKED_COLOURS, PLURALS, is_held_out
from mmrl.world.questions import SIDE, TASKS, answer, ask, careless, picture, response, rows
from mmrl.world.scenes import RELATIONS, holds
from rewards import load_reward

ANSWERED = ("ground", "count", "relation", "colour")
REWARDS = {
    "ground": ("iou", {"frame": "pixels"}),
    "count": ("number", {}),
    "relation": ("exact", {}),
    "colour": ("exact", {}),
}


def asked(task, count, split="train", seed=0):
    rng = np.random.default_rng(seed)
    return [ask(task, rng, split) for _ in range(count)]


def seen(scene):
    """What the detector sees in the scene, drawn large and evenly lit."""
    found = detect(draw([scene], 128))[0]
    assert found.count == len(scene.objects)
    return found.objects


def the(objects, words):
    colour, shape = words.split()
    (one,) = [o for o in objects if (o.colour, o.shape) == (colour, shape)]
    return one


@pytest.mark.parametrize("split", ["train", "eval"])
def test_boxes_are_where_the_detector_sees_the_shape(split):
    for question, scene in asked("ground", 30, split):
        words = re.fullmatch(r"Where is the (\w+ \w+)\?", question.text)[1]
        o = the(seen(scene), words)
        edges = [o.x - o.size, o.y - o.size, o.x + o.size, o.y + o.size]
        np.testing.assert_allclose(answer(question, scene), np.array(edges) * SIDE, atol=1.1)


def test_numbers_are_what_the_detector_counts():
    numbers = []
    for question, scene in asked("count", 40):
        words = re.fullmatch(r"How many (.+) are there\?", question.text)[1].split()
        colours = [w for w in words if w in ASKED_COLOURS]
        shapes = [shape for shape, plural in PLURALS.items() if plural in words]
        matching = [
            o for o in seen(scene) if (not colours or o.colour in colours) and (not shapes or o.shape in shapes)
        ]
        numbers.append(answer(question, scene))
        assert numbers[-1] == len(matching)
    assert {1, 2, 3} <= set(numbers)


def test_relations_are_what_the_detector_finds():
    verdicts = []
    for question, scene in asked("relation", 60):
        a, relation, b = re.fullmatch(
            rf"Is the (\w+ \w+) ({'|'.join(RELATIONS)}) the (\w+ \w+)\?", question.text
        ).groups()
        a, b = the(seen(scene), a), the(seen(scene), b)
        verdicts.append(answer(question, scene))
        assert verdicts[-1] == ("yes" if holds(relation, (a.x, a.y), (b.x, b.y)) else "no")
    assert 15 < verdicts.count("yes") < 45


def test_colours_are_of_the_only_shape_in_that_place():
    for question, scene in asked("colour", 30):
        pattern = rf"What colour is the shape ({'|'.join(RELATIONS)}) the (\w+ \w+)\?"
        relation, words = re.fullmatch(pattern, question.text).groups()
        objects = seen(scene)
        anchor = the(objects, words)
        there = [o for o in objects if o is not anchor and holds(relation, (o.x, o.y), (anchor.x, anchor.y))]
        assert [o.colour for o in there] == [answer(question, scene)]


def test_judged_captions_are_right_when_the_verifier_says_so():
    for split in ("train", "eval"):
        for row in rows(60, tasks=("judge",), split=split):
            assert row["text"].startswith("Does the picture show ")
            assert row["text"].endswith("? Answer yes or no.")
            assert row["response"] == row["target"]
    targets = [row["target"] for row in rows(200, tasks=("judge",))]
    assert 70 < targets.count("yes") < 130


def test_pictures_of_the_judge_show_their_caption_or_do_not():
    """Words to target to verifier, for captions whose words tell the target without doubt: single objects."""
    checked = 0
    for row in rows(300, tasks=("judge",)):
        words = re.fullmatch(r"Does the picture show (?:a|one) (\w+) (\w+)\? Answer yes or no\.", row["text"])
        if words:
            target = {"objects": [{"colour": words[1], "shape": words[2]}], "relation": None}
            pixels = torch.tensor(np.asarray(row["images"][0])).permute(2, 0, 1)[None] / 255
            assert (score(pixels, [target], strict=True)[0] == 1) == (row["target"] == "yes")
            checked += 1
    assert checked > 30


def test_held_out_pairs_are_in_no_training_picture_and_in_every_held_out_one():
    def pairs(scene):
        kinds = [{"colour": o.colour, "shape": o.shape} for o in scene.objects]
        return [
            is_held_out({"objects": [a, b], "relation": None}) for i, a in enumerate(kinds) for b in kinds[:i] if a != b
        ]

    for task in ANSWERED:
        assert not any(held for _, scene in asked(task, 60) for held in pairs(scene))
        assert all(any(pairs(scene)) for _, scene in asked(task, 60, "eval"))


@pytest.mark.parametrize("task", ANSWERED)
def test_true_responses_earn_full_marks_and_careless_ones_less(task):
    name, options = REWARDS[task]
    reward, form = load_reward(name, **options), load_reward("format")
    scores = {}
    for share, loose in ((0.0, 0), (1.0, 6)):
        prompts = load_prompts(
            "mmrl.world.questions:rows", options={"count": 40, "tasks": [task], "share": share, "loose": loose}
        )
        texts = [prompt.metadata["response"] for prompt in prompts]
        samples = Samples(prompts, texts=texts, sizes=[[(SIDE, SIDE)]] * 40)
        assert torch.as_tensor(form(samples)).eq(1).all()
        scores[share] = torch.as_tensor(reward(samples)).float().mean().item()
    assert scores[0.0] == 1
    assert scores[1.0] < 0.8


def test_careless_boxes_hold_the_true_ones():
    rng = np.random.default_rng(0)
    for question, scene in asked("ground", 30):
        true, drawn = answer(question, scene), careless(question, scene, rng, 0.5, 6, SIDE)
        out = np.array(drawn) - true
        assert (out[:2] <= 0).all()
        assert (out[2:] >= 0).all()
        assert np.abs(out).max() <= 6
        assert min(drawn) >= 0
        assert max(drawn) <= SIDE


def test_responses_name_the_places_they_rest_on():
    question, scene = asked("relation", 1)[0]
    places = re.findall(r"\((\d+), (\d+)\)", response(question, scene, "no"))
    wanted = [
        next(o for o in scene.objects if o.colour == k["colour"] and o.shape == k["shape"])
        for k in (question.kind, question.other)
    ]
    assert [(int(x), int(y)) for x, y in places] == [(round(o.x * SIDE), round(o.y * SIDE)) for o in wanted]


def test_rows_are_a_function_of_the_seed():
    def told(seed, split="train"):
        return [(row["text"], str(row["target"]), row["images"][0].tobytes()) for row in rows(24, seed, TASKS, split)]

    assert told(0) == told(0)
    assert told(0) != told(1)
    assert told(0) != told(0, "eval")
    assert len({row["id"] for row in rows(24, tasks=TASKS)}) == 24


def test_light_fades_to_the_right_and_downwards():
    pixels = np.asarray(picture(asked("ground", 1)[0][1])).astype(int)
    red, blue = pixels[0, :, 0], pixels[:, 0, 2]
    assert red[0] > red[-1] + 50
    assert blue[0] > blue[-1] + 50


def test_unknown_tasks_are_refused_by_name():
    with pytest.raises(UserError, match=r"'grounding'.*ground"):
        list(rows(1, tasks=("grounding",)))
