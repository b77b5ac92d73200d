"""A reward over HTTP gives what it gives at home."""

import json
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager

import pytest
import torch
from chat_server import chat_server
from reward_samples import smooth_images

from mmrl.errors import UserError
from mmrl.media import to_pil
from mmrl.scoring import RewardError, Scorer
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.remote import serve
from rewards.wire import decode_samples, encode_samples


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("REWARD_KEY", "secret-0123")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@contextmanager
def served(reward, **options):
    with serve(reward, port=0, **options) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def remote(url, **options):
    return load_reward("remote", url=url, backoff=0, request_timeout=20, **options)


def pictures(count=4):
    prompts = [Prompt(f"picture {row}", id=f"p:{row}") for row in range(count)]
    return Samples(prompts, images=smooth_images(count, 12, 8), group=torch.arange(count) // 2)


@pytest.mark.parametrize(("name", "options"), [("pixels", {"measure": "saturation"}), ("jpeg", {}), ("diversity", {})])
def test_as_at_home(name, options):
    reward = load_reward(name, **options)
    with served(reward) as url:
        far = remote(url)
        scores = Scorer([far])(pictures()).each["remote"]
        # smooth_images lie on the grid of eight bits, so that nothing is lost.
        assert torch.equal(scores, Scorer([reward])(pictures()).total)
        alone = far(pictures()[:1])
        assert (alone == [None]) == (name == "diversity")
        assert far(pictures()[:0]) == []
        assert far.counts["retries"] == 0


def test_everything_that_rewards_see_arrives():
    red = to_pil(torch.eye(3)[0][:, None, None].expand(3, 2, 2))
    prompt = Prompt(
        "a",
        id="r:1",
        images=[red],
        videos=[[red, red]],
        messages=[{"role": "user", "content": [{"type": "image", "image": red}]}],
        target={"box": [1, 2.5], "picture": red, "none": None},
        task="t",
        metadata={"answer": "b", "flag": True},
    )
    samples = Samples(
        [prompt, prompt, Prompt("c")],
        texts=["x", "ü", ""],
        truncated=torch.tensor([True, False, True]),
        lengths=torch.tensor([1, 2, 3]),
        sizes=[[(4, 5)], [], [(1, 2), (3, 4)]],
        group=torch.tensor([0, 0, 1]),
    )
    sent = encode_samples(samples)
    assert len(sent["prompts"]) == 2
    got = decode_samples(json.loads(json.dumps(sent)))
    assert got.prompts[0] is got.prompts[1]
    one = got.prompts[0]
    assert (one.text, one.id, one.task, one.metadata) == ("a", "r:1", "t", {"answer": "b", "flag": True})
    assert one.target["box"] == [1, 2.5]
    for picture in (one.images[0], one.videos[0][1], one.target["picture"], one.messages[0]["content"][0]["image"]):
        assert picture.tobytes() == red.tobytes()
    assert (got.texts, got.sizes) == (samples.texts, samples.sizes)
    for key in ("truncated", "lengths", "group"):
        assert torch.equal(getattr(got, key), getattr(samples, key))
    clips = Samples([Prompt("v")], videos=smooth_images(3, 4, 4)[None])
    assert torch.equal(decode_samples(encode_samples(clips)).videos, clips.videos)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (
            Prompt("a", id="r:1", target=object()),
            r"sample 0 \(prompt 'r:1': a\): target is object, which cannot be sent",
        ),
        (Prompt("a", metadata={"x": [1, {2}]}), r"metadata.x\[1\] is set"),
        (Prompt("a", images=["none.png"]), "there is no picture 'none.png'"),
    ],
)
def test_what_cannot_be_sent_is_named(prompt, said):
    with pytest.raises(UserError, match=said):
        remote("http://127.0.0.1:1")(Samples([prompt], texts=["b"]))


def test_rows_apart():
    sizes = []

    def count(samples):
        sizes.append(len(samples))
        return [None if text == "2" else float(text) for text in samples.texts]

    samples = Samples([Prompt("a")] * 5, texts=list("01234"))
    with served(load_function(count)) as url:
        assert remote(url, batch_size=2)(samples) == [0, 1, None, 3, 4]
        assert sorted(sizes) == [1, 2, 2]
        assert remote(url)(samples) == [0, 1, None, 3, 4]
    assert sizes[-1] == 5


def load_function(function):
    from rewards.function import FunctionReward

    return FunctionReward(function)


def test_faults_of_the_reward_stop_or_skip():
    def broken(samples):
        raise ZeroDivisionError("oh")

    samples = pictures()
    with served(load_function(broken)) as url:
        reward = remote(url, retries=1)
        with pytest.raises(
            RewardError, match=r"gave no score for sample 0 \(prompt 'p:0'.* and 3 more: status 500: .*oh"
        ):
            reward(samples)
        assert reward.counts == {"requests": 2, "retries": 1, "failed": 0}
        skipping = remote(url, retries=1, on_failure="skip")
        assert skipping(samples) == [None] * 4
        assert skipping.counts["failed"] == 4
    with served(load_reward("shapes")) as url, pytest.raises(RewardError, match=r"status 422: .*target"):
        # What is the row's fault comes again, and is not left out.
        remote(url, on_failure="skip", retries=3)(Samples([Prompt("a")], images=smooth_images(1, 32, 32)))
    with pytest.raises(RewardError, match=r"URLError: .*refused"):
        remote(url, retries=1)(samples)


def test_the_server_refuses_what_is_none_of_its_business():
    def post(url, body, path="/score", **headers):
        request = urllib.request.Request(url + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    with served(load_reward("pixels"), max_bytes=5000) as url:
        good = encode_samples(pictures(1))
        assert post(url, json.dumps(good).encode())[0] == 200
        for body, said in (
            (b"[", "Expecting"),
            (b"[1]", "does not hold samples"),
            (b"{}", "does not hold samples"),
            (b"[" * 4000, "recursion"),
            (json.dumps(good | {"images": ["AAAA"]}).encode(), "does not hold samples"),
            (json.dumps(good | {"images": ["%"]}).encode(), "no PNG"),
            (json.dumps(good | {"images": []}).encode(), "1 prompts but 0 images"),
            (json.dumps(good | {"prompt_of": [7]}).encode(), "does not hold samples"),
        ):
            status, answer = post(url, body)
            assert status == 422, body[:50]
            assert said in answer["error"]
        assert post(url, b"x" * 6000)[0] == 413
        assert post(url, b"{}", "/other")[0] == 404
        with urllib.request.urlopen(url, timeout=10) as response:
            assert json.load(response) == {"reward": "brightness"}
    with served(load_reward("pixels"), key_env="REWARD_KEY") as url:
        with pytest.raises(RewardError, match="status 401: the key is missing or wrong"):
            remote(url, on_failure="skip")(pictures())
        assert len(remote(url, key_env="REWARD_KEY")(pictures())) == 4


def test_options_are_checked(monkeypatch):
    with pytest.raises(UserError, match="url is 'file:///etc/passwd', but should begin with http"):
        load_reward("remote", url="file:///etc/passwd")
    monkeypatch.delenv("REWARD_KEY")
    with pytest.raises(UserError, match="key_env is 'REWARD_KEY', but there is no such environment variable"):
        load_reward("remote", url="http://x", key_env="REWARD_KEY")


def test_a_broken_answer_stops():
    for body, said in (
        ({"scores": [1]}, "list of 2 scores"),
        ({"scores": ["a", True]}, "list of 2"),
        (b"{", "JSONDecode"),
    ):
        with (
            chat_server(lambda body=body: (200, {}, body), chat=False) as server,
            pytest.raises(RewardError, match=said),
        ):
            remote(server.url, retries=1)(pictures(2))


def test_a_key_is_not_sent_elsewhere():
    with served(load_reward("pixels")) as other:
        moved = (302, {"Location": f"{other}/score"}, {})
        with chat_server(lambda: moved, chat=False) as server, pytest.raises(RewardError, match="status 302"):
            remote(server.url, key_env="REWARD_KEY", on_failure="skip")(pictures(2))


def test_the_command_listens_on_this_machine_alone():
    process = subprocess.Popen(
        [sys.executable, "-m", "rewards.remote", "pixels", "measure=brightness", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        line = process.stderr.readline()
        host, port = re.search(r"reward 'pixels' at http://([\d.]+):(\d+)", line).groups()
        assert host == "127.0.0.1"
        scores = remote(f"http://{host}:{port}")(pictures())
        assert scores == pytest.approx(load_reward("pixels", measure="brightness")(pictures()).tolist())
        others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {host}
        for address in others:
            if not address.startswith("127."):
                with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
                    socket.create_connection((address, int(port)), timeout=2)
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def test_the_command_explains_itself():
    done = subprocess.run(
        [sys.executable, "-m", "rewards.remote", "pixls"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.strip() == "there is no reward 'pixls' (did you mean 'pixels'?)"
