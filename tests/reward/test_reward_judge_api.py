"""The judge behind an endpoint, through the official client, against a real server on this machine."""

import itertools
import logging
import time

import numpy as np
import pytest
import torch
from chat_server import chat_server
from reward_samples import smooth_images

from mmrl.components import reward_component
from mmrl.errors import UserError
from mmrl.media import to_pil
from mmrl.scoring import RewardError, Scorer
from mmrl.types import Prompt, Samples
from rewards import load_reward

pytest.importorskip("openai")

KEY = "sk-secret-0123456789"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    # A proxy of the machine's is not for its own addresses.
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def judge(server, **options):
    return load_reward("judge_api", model="m", base_url=server.url, api_key_env="JUDGE_KEY", backoff=0, **options)


def pictures(*texts):
    return Samples([Prompt(text, id=f"p:{text}") for text in texts], images=smooth_images(len(texts), 8, 12))


def word(text):
    """The prompt in a question of the default form."""
    return text.split(": ")[1].split("?")[0]


def test_scores_pictures_and_request(environment):
    samples = pictures("1", "2", "3")
    shown = {}

    def reply(text, images, request, attempt):
        shown[word(text)] = images
        return f"I like it.\nScore: {2 * int(word(text))}"

    with chat_server(reply) as server:
        reward = judge(server, system="Be fair.", max_tokens=50, options={"top_p": 0.5, "max_tokens": None})
        assert reward(samples) == [2, 4, 6]
    for number, image in enumerate(samples.images):
        (got,) = shown[str(number + 1)]
        assert np.array_equal(np.asarray(got), np.asarray(to_pil(image)))
    headers, request = server.seen[0]
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == f"Bearer {KEY}"
    assert request["model"] == "m"
    assert request["messages"][0] == {"role": "system", "content": "Be fair."}
    assert (request["temperature"], request["top_p"]) == (0, 0.5)
    assert "max_tokens" not in request
    assert reward.counts == {"requests": 3, "retries": 0, "unparsable": 0, "failed": 0}


def test_clips_texts_and_equal_questions():
    count = []

    def reply(text, images, request, attempt):
        count.append(len(images))
        return "No." if "cat" in text else "yes"

    prompt = Prompt("What?", images=[to_pil(smooth_images(1, 8, 8)[0])])
    with chat_server(reply) as server:
        reward = judge(server, verdict="yes_no", frames=3)
        texts = Samples([prompt] * 3, texts=["a cat", "a dog", "a cat"])
        assert reward(texts) == [0, 1, 0]
        assert len(server.seen) == 2
        assert reward(Samples([Prompt("fog")], videos=torch.rand(1, 7, 3, 8, 8))) == [1]
    assert count == [1, 1, 3]


@pytest.mark.parametrize(
    "fault",
    [
        (500, {}, {"error": {"message": "busy"}}),
        (503, {"Retry-After": "0"}, b"<html>"),
        (429, {}, {"error": "slow down"}),
        (200, {}, b'{"choices": [{"mess'),
        (200, {}, b"\xff\xfe\x00"),
        (200, {"Content-Type": "text/html"}, b"<html>"),
        (200, {}, {"hello": 1}),
        (200, {}, {"choices": []}),
        (200, {}, {"choices": [{"message": {"content": 3}}]}),
        (200, {}, [1]),
        0.6,
    ],
)
def test_faults_pass_or_stop_or_skip(fault):
    """Two faults and then an answer; and the sample "bad", for which none ever comes."""

    def reply(text, images, request, attempt):
        return fault if attempt < 2 or "bad" in text else "8"

    with chat_server(reply) as server:
        reward = judge(server, request_timeout=0.25, retries=2)
        assert reward(pictures("fine")) == [8]
        assert reward.counts == {"requests": 3, "retries": 2, "unparsable": 0, "failed": 0}
        with pytest.raises(RewardError, match=r"reward 'judge_api': no verdict on sample 1 \(prompt 'p:bad': bad\)"):
            reward(pictures("good", "bad"))
        skipping = judge(server, request_timeout=0.25, retries=2, on_failure="skip")
        samples = pictures("better", "bad", "best")
        found = Scorer([skipping])(samples)
    assert found.each["judge_api"].nan_to_num(-1).tolist() == [8, -1, 8]
    assert found.metrics()["reward/judge_api/share"] == pytest.approx(2 / 3)
    assert skipping.counts["failed"] == 1


def test_a_refused_key_or_model_stops_in_any_case_and_the_key_is_not_shown(caplog, capfd):
    caplog.set_level(logging.DEBUG)
    for status in (401, 403, 404):
        told = {"error": {"message": f"Incorrect key {KEY} for m"}}
        with chat_server(lambda *_, status=status, told=told: (status, {}, told)) as server:
            reward = judge(server, on_failure="skip", retries=5)
            with pytest.raises(RewardError, match=rf"status {status}: .*Incorrect key \*\*\* for m") as caught:
                reward(pictures("a"))
        assert len(server.seen) == 1
        shown = [str(caught.value), repr(caught.value.__cause__), repr(reward), repr(vars(reward.client)), caplog.text]
        assert not any(KEY in text for text in shown[:3] + shown[4:])
    assert KEY not in "".join(capfd.readouterr())


def test_other_refusals_are_not_repeated():
    with chat_server(lambda *_: (400, {}, {"error": {"message": "picture too large"}})) as server:
        with pytest.raises(RewardError, match=r"status 400: .*picture too large"):
            judge(server, retries=5)(pictures("a"))
        assert judge(server, retries=5, on_failure="skip")(pictures("a")) == [None]
    assert len(server.seen) == 2


def test_unreadable_verdicts_are_asked_for_again_and_do_not_apply():
    def reply(text, images, request, attempt):
        return "Score: 4" if "late" in text and attempt == 2 else "hm" if attempt else ""

    with chat_server(reply) as server:
        reward = judge(server, retries=2, temperature=0.9)
        assert reward(pictures("late", "never")) == [4, None]
    asked = sorted((request["temperature"], request.get("seed", 0)) for _, request in server.seen)
    assert asked == [(0, 0), (0, 0), (0.9, 1), (0.9, 1), (0.9, 2), (0.9, 2)]
    assert reward.counts == {"requests": 6, "retries": 4, "unparsable": 1, "failed": 0}


def test_so_many_requests_at_a_time():
    with chat_server(lambda *_: 0.05) as server:
        reward = judge(server, concurrency=3)
        start = time.perf_counter()
        assert reward(pictures(*"abcdefghi")) == [8] * 9
        assert time.perf_counter() - start >= 0.15
    assert 2 <= server.most <= 3


def test_waits_double_and_heed_the_endpoint():
    times = []

    def reply(text, images, request, attempt):
        times.append(time.perf_counter())
        return (503, {"Retry-After": "0.4"} if attempt == 2 else {}, {}) if attempt < 3 else "8"

    with chat_server(reply) as server:
        reward = load_reward("judge_api", model="m", base_url=server.url, api_key_env=None, backoff=0.05)
        assert reward(pictures("a")) == [8]
    first, second, third = (later - sooner for sooner, later in itertools.pairwise(times))
    assert first >= 0.05
    assert second >= 0.1
    assert third >= 0.4


def test_nobody_there():
    with chat_server(lambda *_: "8") as server:
        reward = judge(server, retries=1)
    with pytest.raises(RewardError, match=r"no verdict on sample 0 .*APIConnectionError"):
        reward(pictures("a"))


def test_the_key_comes_from_the_environment_alone(monkeypatch):
    section = {"type": "judge_api", "model": "m", "api_key_env": "JUDGE_KEY"}
    component = reward_component(section, where="c.yaml", path="rewards.0", folders=[])
    assert KEY not in str(component.dump())
    assert component.dump()["api_key_env"] == "JUDGE_KEY"
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(UserError, match="api_key_env is 'JUDGE_KEY', but there is no such environment variable"):
        load_reward("judge_api", model="m", api_key_env="JUDGE_KEY")
    with pytest.raises(UserError, match="base_url is 'localhost', but should begin with"):
        load_reward("judge_api", model="m", api_key_env=None, base_url="localhost")
    with pytest.raises(UserError, match="api_key"):
        load_reward("judge_api", model="m", api_key=KEY)
