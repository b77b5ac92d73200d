"""A judge behind an OpenAI-compatible endpoint, asked through the official client."""

from __future__ import annotations

import logging
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from typing import Annotated, Any, Literal

from pydantic import Field

from mmrl.errors import UserError
from mmrl.media import data_uri
from mmrl.scoring import RewardError, describe_sample
from mmrl.types import Samples
from rewards.judges.score import score_questions
from rewards.judges.subjects import Case, cases_of, questions
from rewards.judges.verdicts import check_pattern, parse_score, parse_yes_no
from rewards.judges.yes import QUESTIONS as YES_QUESTIONS
from rewards.judges.yes import Count
from rewards.weights import first_line

log = logging.getLogger(__name__)

# Wrong key, no rights, no such model: the next sample would fare no better, so these stop the run in any case.
_HOPELESS = (401, 403, 404)
# Worth another try; any other refusal would come again.
_PASSING = (408, 409, 425, 429)
_LONGEST_WAIT = 60.0


class _Failed(Exception):
    """The endpoint gave no answer.

    Attributes:
        hopeless: no sample would fare better.
        passing: another try may fare better.
        wait: seconds that the endpoint asks to wait for.
    """

    def __init__(self, message: str, hopeless: bool = False, passing: bool = True, wait: float | None = None):
        super().__init__(message)
        self.hopeless, self.passing, self.wait = hopeless, passing, wait


class JudgeApi:
    """The verdict of a model behind a chat/completions endpoint: a number, or yes (1) or no (0).

    Pictures and frames travel as PNG in base64. The first answer is asked for at temperature 0; a verdict that cannot
    be read is asked for again at ``temperature`` with other seeds, and then is None, "does not apply". Equal questions
    are asked once.

    Args:
        model: name that the endpoint knows.
        base_url: of the endpoint, up to and with ``/v1``.
        api_key_env: name of the environment variable that holds the key; null for an endpoint without one. The key
            itself is never in a config, a log or a message.
        verdict: ``score`` or ``yes_no``.
        question: as for ``judge_score`` or ``judge_yes``.
        system: what the judge is told first.
        range: of a score. A number outside is no verdict.
        pattern: of a score, as for ``judge_score``.
        retries: further requests for a verdict that cannot be read, and for an answer that fails to come: a timeout, no
            connection, status 408, 409, 429 or 5xx, or something that is no answer.
        backoff: seconds before the first new try after a failure; doubles with each. A Retry-After of up to a minute
            counts instead.
        request_timeout: seconds for one request.
        concurrency: requests at a time.
        on_failure: what to do about a sample for which no answer came: ``stop`` the run, or ``skip`` it, which makes it
            None. A refused key or an unknown model (status 401, 403, 404) stops in any case.
        temperature: of the new tries for a verdict.
        max_tokens: longest answer.
        options: further keywords of the request, e.g. ``{max_completion_tokens: 64}``; null takes one of ours out.
        frames: of a clip that are looked at, evenly spread.

    Attributes:
        counts: ``requests`` sent, ``retries`` among them, ``unparsable`` verdicts and ``failed`` cases, over all calls.

    Raises:
        UserError: the client is not installed; the variable is not set; the question names an unknown field; the range
            is empty; the pattern is no regular expression with one group.
    """

    name = "judge_api"
    differentiable = False

    def __init__(
        self,
        model: str,
        base_url: str = "https://api.openai.com/v1",
        api_key_env: str | None = "OPENAI_API_KEY",
        verdict: Literal["score", "yes_no"] = "score",
        question: str | None = None,
        system: str = "",
        range: tuple[float, float] = (0.0, 10.0),
        pattern: str | None = None,
        retries: Annotated[int, Field(ge=0)] = 3,
        backoff: Annotated[float, Field(ge=0)] = 1.0,
        request_timeout: Annotated[float, Field(gt=0)] = 60.0,
        concurrency: Count = 8,
        on_failure: Literal["stop", "skip"] = "stop",
        temperature: Annotated[float, Field(gt=0)] = 0.7,
        max_tokens: Count = 256,
        options: dict[str, Any] | None = None,
        frames: Count = 4,
    ):
        where = f"reward '{self.name}'"
        if verdict == "score":
            self.questions = score_questions(question, range, self.name)
        else:
            self.questions = questions({kind: question or text for kind, text in YES_QUESTIONS.items()}, self.name)
        check_pattern(pattern, where)
        self.client, self._key = _client(base_url, api_key_env, request_timeout, where)
        self._read: Callable[[str], float | None] = (
            parse_yes_no if verdict == "yes_no" else lambda text: parse_score(text, *range, pattern)
        )
        self.request = {"model": model, "max_tokens": max_tokens, **(options or {})}
        self.base_url, self.system, self.frames = base_url, system, frames
        self.retries, self.backoff, self.temperature = retries, backoff, temperature
        self.concurrency, self.on_failure = concurrency, on_failure
        self.counts = {"requests": 0, "retries": 0, "unparsable": 0, "failed": 0}
        self._counting = threading.Lock()

    def __call__(self, samples: Samples) -> list[float | None]:
        """N scores, or None where no verdict could be read or, with ``on_failure: skip``, had.

        Raises:
            RewardError: no answer for a sample, which the message names.
        """
        cases = cases_of(self.questions, samples, self.frames, self.name)
        jobs = self._start(list(dict.fromkeys(cases)))
        for row, case in enumerate(cases):
            error = jobs[case].exception()
            if isinstance(error, _Failed):
                raise RewardError(f"reward '{self.name}': no verdict on {describe_sample(samples, row)}: {error}")
            if error is not None:
                raise error
        return [jobs[case].result() for case in cases]

    def _start(self, cases: Sequence[Case]) -> dict[Case, Future]:
        """Ask about all, so many at a time; after a failure those that are still waiting give up."""
        stopped = threading.Event()
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix=self.name) as pool:
            jobs = {case: pool.submit(self._ask, case, stopped) for case in cases}
            wait(jobs.values(), return_when=FIRST_EXCEPTION)
            stopped.set()
        return jobs

    def _ask(self, case: Case, stopped: threading.Event) -> float | None:
        """The verdict on one case; None if there is none to be had."""
        messages = _messages(case, self.system)
        failures = unread = 0
        while not stopped.is_set():
            self._count("requests")
            if failures + unread:
                self._count("retries")
            try:
                text = self._request(messages, unread)
            except _Failed as error:
                failures += 1
                if error.hopeless or failures + unread > self.retries or not error.passing:
                    if error.hopeless or self.on_failure == "stop":
                        raise
                    self._count("failed")
                    log.warning("reward '%s': a sample is left out: %s", self.name, error)
                    return None
                stopped.wait(error.wait if error.wait is not None else self.backoff * 2 ** (failures - 1))
                continue
            found = self._read(text)
            if found is not None:
                return found
            unread += 1
            if failures + unread > self.retries:
                self._count("unparsable")
                return None
        return None

    def _request(self, messages: list[dict[str, Any]], unread: int) -> str:
        """What the model answers; raises ``_Failed`` whatever goes wrong on the way."""
        import openai

        own = {"temperature": self.temperature, "seed": unread} if unread else {"temperature": 0.0}
        request = {key: value for key, value in {**own, **self.request}.items() if value is not None}
        try:
            answer = self.client.chat.completions.create(messages=messages, **request)
        except openai.APIStatusError as error:
            passing = error.status_code in _PASSING or error.status_code >= 500
            said = f"status {error.status_code}: {self._without_key(error.message)}"
            # The endpoint may have repeated the key, so that its own words are not kept as the cause.
            raise _Failed(said, error.status_code in _HOPELESS, passing, _retry_after(error)) from None
        except (openai.OpenAIError, ValueError) as error:
            # ValueError is what broken JSON raises.
            said = f"{type(error).__name__}: {first_line(error)}"
            raise _Failed(self._without_key(said)) from None
        return _text_of(answer)

    def _without_key(self, text: str) -> str:
        return (text.replace(self._key, "***") if self._key else text)[:300]

    def _count(self, name: str) -> None:
        with self._counting:
            self.counts[name] += 1


def _client(base_url: str, api_key_env: str | None, timeout: float, where: str) -> tuple[Any, str]:
    """The client and the key, which is empty for an endpoint without one."""
    try:
        import openai
    except ModuleNotFoundError as error:
        raise UserError(f"{where} needs the client of OpenAI-compatible endpoints: pip install 'mmrl[api]'") from error
    key = ""
    if api_key_env is not None:
        key = os.environ.get(api_key_env, "")
        if not key:
            raise UserError(
                f"{where}: api_key_env is '{api_key_env}', but there is no such environment variable "
                "(api_key_env: null for an endpoint without a key)"
            )
    if not base_url.startswith(("http://", "https://")):
        raise UserError(f"{where}: base_url is '{base_url}', but should begin with http:// or https://")
    # Its own retries would not know of answers that are no answers, nor be counted.
    return openai.OpenAI(api_key=key or "none", base_url=base_url, timeout=timeout, max_retries=0), key


def _messages(case: Case, system: str) -> list[dict[str, Any]]:
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_uri(part.image)}}
        for part in case
    ]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    return [{"role": "system", "content": system}, *turns] if system else turns


def _text_of(answer: Any) -> str:
    """The text of a chat completion; the client does not check that it got one."""
    choices = getattr(answer, "choices", None)
    message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
    if message is None or not isinstance(getattr(message, "content", None), str | None):
        raise _Failed("it sent something that is no chat completion")
    return message.content or ""


def _retry_after(error: Any) -> float | None:
    """Seconds that the endpoint asks to wait for, if it says so and they are not too many."""
    said = error.response.headers.get("retry-after", "")
    if re.fullmatch(r"\d{1,4}(\.\d+)?", said) is None:
        return None
    return float(said) if float(said) <= _LONGEST_WAIT else None
