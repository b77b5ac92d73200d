"""Functions written for TRL, unchanged: chat completions, columns as keywords, None, async."""

import asyncio

import pytest

from mmrl.errors import UserError
from mmrl.scoring import RewardError, Scorer
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.function import ChatText, FunctionReward

CODE = '''
import asyncio
import re


def accuracy_reward(completions, solution, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    return [None if s is None else float(c == s) for c, s in zip(contents, solution)]


def format_reward(completions, **kwargs):
    """As in TRL: for chats and for plain text."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [1.0 if re.fullmatch(r"<think>.*</think>", text, re.DOTALL) else 0.0 for text in texts]


def last_message(prompts, completions, **kwargs):
    return [float(p[-1]["content"] + "!" == c[-1].get("content")) for p, c in zip(prompts, completions)]


async def waits(completions, solution, delay: float = 0.01):
    await asyncio.sleep(delay)
    return [float(len(c)) for c in completions]


async def fails(completions):
    await asyncio.sleep(0)
    return [1 / len(c) for c in completions]


async def of_samples(samples):
    return [float(len(text)) for text in samples.texts]
'''


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "trl_rewards.py"
    path.write_text(CODE)
    return str(path)


@pytest.fixture
def answers():
    prompts = [
        Prompt(text, id=f"q:{text}", metadata={"solution": s}) for text, s in (("a", "4"), ("b", "x"), ("", None))
    ]
    return Samples(prompts, texts=["4", "b!", ""])


def test_chat_completions(code, answers):
    scores = load_reward(f"{code}:accuracy_reward")(answers)
    assert scores[:2].tolist() == [1, 0]
    assert scores[2].isnan()
    assert load_reward(f"{code}:last_message")(answers).tolist() == [0, 1, 0]
    thought = Samples([Prompt("?")], texts=["<think>\n</think>"])
    assert load_reward(f"{code}:format_reward")(thought).tolist() == [1]


def test_async_functions(code, answers):
    reward = load_reward(f"{code}:waits", delay=0.02)
    assert Scorer([reward])(answers).total.tolist() == [1, 2, 0]
    assert load_reward(f"{code}:of_samples")(answers).tolist() == [1, 2, 0]
    with pytest.raises(RewardError, match=r"'fails' failed on sample 2 \(prompt 'q:': \): ZeroDivisionError"):
        Scorer([load_reward(f"{code}:fails")])(answers)

    async def notebook():
        return reward(answers).tolist()

    assert asyncio.run(notebook()) == [1, 2, 0]


def test_missing_column_is_named(code):
    with pytest.raises(UserError, match="'waits' wants 'solution', which the data does not have"):
        load_reward(f"{code}:waits")(Samples([Prompt("a")], texts=["x"]))


def test_chat_text_is_a_text():
    text = ChatText("hello")
    assert text == "hello"
    assert text[0] == "h"
    assert text[-1] == "o"
    assert text[1:3] == "el"
    assert text[0]["role"] == "assistant"
    assert text[0]["content"] == text[-1]["content"] == "hello"
    assert "".join(text) == "hello"
    assert text[0].get("tool_calls") is None
    assert ChatText("")[0]["content"] == ""
    with pytest.raises(IndexError):
        text[7]


def test_results_are_checked(answers):
    def too_few(completions):
        return [1.0]

    with pytest.raises(RewardError, match="returned 1 scores for 3 samples"):
        FunctionReward(too_few)(answers)
