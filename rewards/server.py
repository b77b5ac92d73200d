"""The HTTP side of a reward that is served to others; see :func:`rewards.remote.serve`."""

from __future__ import annotations

import hmac
import json
import logging
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from mmrl.scoring import RewardError, Scorer, Term, reward_name
from mmrl.types import Samples
from rewards.wire import decode_samples

log = logging.getLogger(__name__)


class RewardServer(ThreadingHTTPServer):
    """Scores what is posted to ``/score``, one request at a time.

    Args:
        address: host and port.
        reward: what is served; its scores are checked as in a training run.
        authorisation: the header that requests must bring; empty for none.
        max_bytes: longest request.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], reward: Callable[[Samples], Any], authorisation: str, max_bytes: int):
        super().__init__(address, _Handler)
        self.reward_name = reward_name(reward)
        self._scorer = Scorer([Term(reward, name=self.reward_name)])
        self.authorisation, self.max_bytes = authorisation, max_bytes
        self._scoring = threading.Lock()

    def scores(self, samples: Samples) -> list[float | None]:
        """N scores, None where the reward does not apply."""
        if not len(samples):
            return []
        with self._scoring, torch.no_grad():
            found = self._scorer(samples).each[self.reward_name]
        return [None if score != score else score for score in found.tolist()]


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = 60

    def do_GET(self) -> None:
        if self._allowed():
            self._answer(200, {"reward": self.server.reward_name})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdecimal():
            self._answer(411, {"error": "the request does not say how long it is"})
            return
        if int(length) > self.server.max_bytes:
            self._answer(413, {"error": f"the request has {length} bytes, more than {self.server.max_bytes}"})
            return
        # Read in any case: a client that is cut off while it writes does not get to see the answer.
        body = self.rfile.read(int(length))
        if not self._allowed():
            return
        if self.path != "/score":
            self._answer(404, {"error": f"there is nothing at {self.path}, samples go to /score"})
            return
        try:
            self._answer(200, {"scores": self.server.scores(decode_samples(json.loads(body)))})
        except RewardError as error:
            self._answer(500, {"error": str(error)})
        except (ValueError, RecursionError) as error:
            # A UserError about the samples is a ValueError, as is broken JSON.
            self._answer(422, {"error": str(error)})
        except Exception as error:
            log.exception("reward '%s' failed", self.server.reward_name)
            self._answer(500, {"error": f"{type(error).__name__}: {error}"})

    def _allowed(self) -> bool:
        given, wanted = self.headers.get("Authorization", ""), self.server.authorisation
        if not wanted or hmac.compare_digest(given.encode(), wanted.encode()):
            return True
        self._answer(401, {"error": "the key is missing or wrong"})
        return False

    def _answer(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except (ConnectionError, TimeoutError):
            log.info("a client left before its answer")

    def log_message(self, format: str, *args: Any) -> None:
        """To the log rather than to standard error."""
        log.debug(format, *args)
