"""Plain functions as rewards, by module or file, and the errors on the way."""

import subprocess
import sys

import pytest
import torch

from mmrl.errors import UserError
from mmrl.scoring import RewardError, Scorer
from mmrl.types import Prompt, Samples
from rewards import REWARDS, differentiable_rewards, load_reward

CODE = '''
import torch

def by_samples(samples, factor: float = 2.0):
    return factor * samples.images.mean((1, 2, 3))

by_samples.differentiable = True

def exact_answer(completions, answer, **kwargs):
    return [None if a is None else float(c == a) for c, a in zip(completions, answer)]

def optional_answer(completions, answer=None):
    return [float(c == a) for c, a in zip(completions, answer or "??")]

def long_text(completions, prompts, margin: int = 0):
    return [len(c) - len(p) - margin for c, p in zip(completions, prompts)]

def every_column(prompts, **columns):
    assert columns["factor_of_row"] == [1, None], columns
    return torch.arange(len(prompts))

def picture_mean(images, target):
    return [image.mean() * t for image, t in zip(images, target)]

def shown_pictures(images, completions):
    return [float(len(shown)) for shown in images]

def nan_for_second(completions):
    return [1.0, float("nan")]

def neither(first, second):
    return []

class Counter:
    """A class is built with the options and called with the samples."""

    partial = True

    def __init__(self, letter: str):
        self.letter = letter
        self.name = f"count_{letter}"

    def __call__(self, samples):
        return [p.text.count(self.letter) or None for p in samples.prompts]

constant = 3
'''


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(CODE)
    return str(path)


@pytest.fixture
def answers():
    prompts = [Prompt("1 + 1", id="q:1", metadata={"answer": "2"}), Prompt("2 + 2", id="q:2", metadata={"answer": "4"})]
    return Samples(prompts, texts=["2", "five"])


def test_function_of_samples(code, samples):
    reward = load_reward(f"{code}:by_samples", factor=3.0)
    assert reward.name == "by_samples"
    assert reward.differentiable
    torch.testing.assert_close(reward(samples), 3 * samples.images.mean((1, 2, 3)))


def test_trl_signature(code, answers):
    reward = load_reward(f"{code}:exact_answer")
    assert reward(answers).tolist() == [1.0, 0.0]
    answers.prompts[1] = Prompt("?", id="q:2")
    scores = reward(answers)
    assert scores[0] == 1
    assert scores[1].isnan()
    total = Scorer([reward])(answers).total
    assert total[0] == 1
    assert total[1].isnan()


def test_column_takes_the_place_of_a_default(code, answers):
    assert load_reward(f"{code}:optional_answer")(answers).tolist() == [1.0, 0.0]
    without = Samples([Prompt("a"), Prompt("b")], texts=["2", "?"])
    assert load_reward(f"{code}:optional_answer")(without).tolist() == [0.0, 1.0]


def test_options_of_a_function(code, answers):
    assert load_reward(f"{code}:long_text")(answers).tolist() == [-4, -1]
    assert load_reward(f"{code}:long_text", margin=1)(answers).tolist() == [-5, -2]
    with pytest.raises(UserError, match=r"unknown key 'margn' \(did you mean 'margin'\?\)"):
        load_reward(f"{code}:long_text", margn=1)
    with pytest.raises(UserError, match="'margin' is 'much', but should be a whole number"):
        load_reward(f"{code}:long_text", margin="much")


def test_columns_and_media(code, samples):
    pair = Samples([Prompt("a", metadata={"factor_of_row": 1}), Prompt("b")], texts=["x", "y"])
    assert load_reward(f"{code}:every_column")(pair).tolist() == [0, 1]
    prompts = [Prompt(target=t) for t in (1.0, 2.0, 0.5, 0.0)]
    pictures = Samples(prompts, images=samples.images)
    expected = samples.images.mean((1, 2, 3)) * torch.tensor([1.0, 2.0, 0.5, 0.0])
    torch.testing.assert_close(load_reward(f"{code}:picture_mean")(pictures), expected)
    shown = Samples([Prompt(images=["a.png", "b.png"]), Prompt()], texts=["x", "y"])
    assert load_reward(f"{code}:shown_pictures")(shown).tolist() == [2, 0]


def test_class_from_a_file(code, samples):
    reward = load_reward(f"{code}:Counter", letter="b")
    assert reward.name == "count_b"
    scores = Scorer([reward])(samples).each["count_b"]
    assert scores[1] == 1
    assert scores[3].isnan()
    with pytest.raises(UserError, match="'letter' is missing"):
        load_reward(f"{code}:Counter")


def test_function_by_module(samples, tmp_path, monkeypatch):
    (tmp_path / "rewards_by_module.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)
    torch.testing.assert_close(load_reward("rewards_by_module:by_samples")(samples), 2 * samples.images.mean((1, 2, 3)))


def test_nan_in_a_list_is_an_error_that_names_the_sample(code, answers):
    with pytest.raises(RewardError, match=r"'nan_for_second' returned nan for sample 1 \(prompt 'q:2': 2 \+ 2\)"):
        load_reward(f"{code}:nan_for_second")(answers)


def test_missing_column_is_named(code, answers):
    samples = Samples([Prompt("a")], texts=["x"])
    with pytest.raises(
        UserError, match=r"'exact_answer' wants 'answer', which the data does not have \(it has completio"
    ):
        Scorer([load_reward(f"{code}:exact_answer")])(samples)


def test_errors_before_anything_runs(code, tmp_path):
    cases = {
        "pixls": "there is no reward 'pixls' (did you mean 'pixels'?)",
        f"{tmp_path}/nowhere.py:f": "there is no file",
        f"{code}:by_sample": "has nothing called 'by_sample' (did you mean 'by_samples'?)",
        "no_such_module_here:f": "there is no module 'no_such_module_here'",
        f"{code}:constant": "is int, not a function or class",
        f"{code}:neither": "takes the samples as its only required parameter",
        f"{code}:": "should have the form 'module:name' or 'file.py:name'",
    }
    for name, expected in cases.items():
        with pytest.raises(UserError) as caught:
            load_reward(name)
        assert expected in str(caught.value)
        assert "\n" not in str(caught.value)


def test_table_of_names():
    differentiable = differentiable_rewards()
    assert {"clip", "aesthetic", "pickscore", "hpsv2", "pixels", "diversity"} <= set(differentiable)
    assert not {"jpeg", "shapes"} & set(differentiable)
    assert all(description and "\n" not in description for _, description in REWARDS.values())


def test_import_is_light():
    code = (
        "import sys, rewards; rewards.differentiable_rewards(); "
        "heavy = {'diffusers', 'transformers', 'open_clip', 'PIL', 'torchvision'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
