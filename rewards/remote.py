"""A reward on another machine, over HTTP: JSON with pictures as PNG in base64, nothing pickled.

The server, which listens on this machine only unless told otherwise:

    python -m rewards.remote clip model=openai/clip-vit-large-patch14 --port 8100

and in the config ``{type: remote, url: "http://127.0.0.1:8100"}``. Pictures are rounded to eight bits on the way.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl.errors import UserError
from mmrl.scoring import RewardError, describe_sample
from mmrl.types import Samples
from rewards.wire import encode_samples

log = logging.getLogger(__name__)

_PASSING = (408, 425, 429)


class _Failed(Exception):
    """No scores came; ``passing`` if another try may fare better."""

    def __init__(self, message: str, passing: bool):
        super().__init__(message)
        self.passing = passing


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A server that sends its clients elsewhere would have the key sent there too."""

    def redirect_request(self, *_: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirects)


class Remote:
    """The scores of a server, see :mod:`rewards.remote`.

    Args:
        url: of the server, e.g. ``http://127.0.0.1:8100``; ``/score`` is put behind it.
        key_env: environment variable with the key that the server asks for; the key itself is never in a config.
        batch_size: samples per request; all of a call when not given, as rewards that compare a group need it.
        concurrency: requests at a time.
        request_timeout: seconds without a byte from the server after which a request has failed.
        retries: further tries after a timeout, no connection, or status 408, 425, 429 or 5xx.
        backoff: seconds before the first of them; doubles with each.
        on_failure: what to do about samples for which no scores came: ``stop`` the run, or ``skip`` them, which makes
            them None, "does not apply". What the server refuses (status 3xx and 4xx) stops in any case.

    Attributes:
        counts: ``requests`` sent, ``retries`` among them and ``failed`` samples, over all calls.

    Raises:
        UserError: the url is none of http, or the environment variable is not set.
    """

    name = "remote"
    differentiable = False

    def __init__(
        self,
        url: str,
        key_env: str | None = None,
        batch_size: Annotated[int, Field(gt=0)] | None = None,
        concurrency: Annotated[int, Field(gt=0)] = 4,
        request_timeout: Annotated[float, Field(gt=0)] = 300.0,
        retries: Annotated[int, Field(ge=0)] = 3,
        backoff: Annotated[float, Field(ge=0)] = 1.0,
        on_failure: Literal["stop", "skip"] = "stop",
    ):
        if not url.startswith(("http://", "https://")):
            raise UserError(f"reward 'remote': url is '{url}', but should begin with http:// or https://")
        self.url = url.rstrip("/") + "/score"
        self._headers = {"Content-Type": "application/json"} | _authorisation(key_env)
        self.batch_size, self.concurrency, self.timeout = batch_size, concurrency, request_timeout
        self.retries, self.backoff, self.on_failure = retries, backoff, on_failure
        self.counts = {"requests": 0, "retries": 0, "failed": 0}
        self._counting = threading.Lock()

    def __call__(self, samples: Samples) -> list[float | None]:
        """N scores, or None where the server's reward does not apply or, with ``on_failure: skip``, did not come.

        Raises:
            RewardError: no scores came, or not one number per sample.
            UserError: a row holds something that cannot be sent.
        """
        size = self.batch_size or max(len(samples), 1)
        starts = range(0, len(samples), size)
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix="remote") as pool:
            parts = list(pool.map(lambda start: self._scores(samples[start : start + size]), starts))
        return [score for part in parts for score in part]

    def _scores(self, part: Samples) -> list[float | None]:
        body = json.dumps(encode_samples(part), allow_nan=False).encode()
        for attempt in range(self.retries + 1):
            with self._counting:
                self.counts["requests"] += 1
                self.counts["retries"] += attempt > 0
            try:
                return self._request(body, len(part))
            except _Failed as error:
                if error.passing and attempt < self.retries:
                    time.sleep(self.backoff * 2**attempt)
                    continue
                many = "" if len(part) == 1 else f" and {len(part) - 1} more"
                where = f"reward 'remote': {self.url} gave no score for {describe_sample(part, 0)}{many}: {error}"
                if self.on_failure == "stop" or not error.passing:
                    raise RewardError(where) from None
                log.warning("%s; left out", where)
                with self._counting:
                    self.counts["failed"] += len(part)
        return [None] * len(part)

    def _request(self, body: bytes, count: int) -> list[float | None]:
        request = urllib.request.Request(self.url, body, self._headers, method="POST")
        try:
            with _opener.open(request, timeout=self.timeout) as response:
                answer = json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                said = _reason(error.read())
            raise _Failed(f"status {error.code}: {said}", error.code >= 500 or error.code in _PASSING) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            # No connection, a timeout, a broken answer: all of them pass. Broken JSON is a ValueError.
            raise _Failed(f"{type(error).__name__}: {error}", True) from error
        scores = answer.get("scores") if isinstance(answer, dict) else None
        numbers = isinstance(scores, list) and all(
            score is None or (isinstance(score, (int, float)) and not isinstance(score, bool)) for score in scores
        )
        if not numbers or len(scores) != count:
            raise _Failed(f"it answered something else than a list of {count} scores", False)
        return scores


def serve(
    reward: Callable[[Samples], Any],
    host: str = "127.0.0.1",
    port: int = 8100,
    key_env: str | None = None,
    max_bytes: int = 2**30,
) -> Any:
    """A server for a reward; call its ``serve_forever()``, and ``shutdown()`` from another thread.

    ``POST /score`` takes :func:`rewards.wire.encode_samples` and gives ``{"scores": [...]}`` with null for "does not
    apply"; ``GET /`` says which reward it is. Faulty samples are answered with status 422, other errors of the reward
    with 500, each with ``{"error": sentence}``. One request is scored at a time.

    Args:
        host: whom to listen to: "127.0.0.1" is this machine, "0.0.0.0" everybody.
        port: 0 takes a free one, see ``server.server_address``.
        key_env: environment variable with a key that requests must bring.
        max_bytes: longest request.
    """
    from rewards.server import RewardServer

    key = _authorisation(key_env).get("Authorization", "")
    if host not in ("127.0.0.1", "localhost", "::1") and not key:
        log.warning("the reward listens on %s without a key: whoever reaches this machine can use it", host)
    return RewardServer((host, port), reward, key, max_bytes)


def _authorisation(key_env: str | None) -> dict[str, str]:
    if key_env is None:
        return {}
    key = os.environ.get(key_env, "")
    if not key:
        raise UserError(f"reward 'remote': key_env is '{key_env}', but there is no such environment variable")
    return {"Authorization": f"Bearer {key}"}


def _reason(body: bytes) -> str:
    """The sentence in an error's answer."""
    try:
        said = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        said = body.decode(errors="replace")
    return str(said)[:500]


def main(arguments: Sequence[str] | None = None) -> None:
    """``python -m rewards.remote NAME [option=value ...] [--host --port --key-env]``."""
    import argparse

    from mmrl.overrides import apply_override, parse_override
    from rewards import load_reward

    parser = argparse.ArgumentParser(prog="python -m rewards.remote", description="Serve a reward over HTTP.")
    parser.add_argument("reward", help="a name of 'mmrl list', or file.py:name")
    parser.add_argument("options", nargs="*", metavar="option=value", help="of the reward")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--key-env", help="environment variable with a key that requests must bring")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options: dict[str, Any] = {}
    try:
        for text in given.options:
            apply_override(options, *parse_override(text))
        with serve(load_reward(given.reward, **options), given.host, given.port, given.key_env) as server:
            log.info("reward '%s' at http://%s:%d", given.reward, *server.server_address[:2])
            server.serve_forever()
    except UserError as error:
        parser.exit(2, f"{error}\n")
    except KeyboardInterrupt:
        parser.exit(0)


if __name__ == "__main__":
    main()
