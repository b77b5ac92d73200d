"""Whether a mathematical answer equals the true one, by math-verify in a process that can be stopped."""

from __future__ import annotations

import functools
import importlib.util
import json
import queue
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import IO, Annotated

from pydantic import Field

from mmrl.errors import UserError
from rewards.answers import Answer
from rewards.parsing import MOST
from rewards.text import Row

START = 300.0
"""Seconds for the process to import its libraries, which may lie on a slow disk."""


class MathProcess:
    """Asks :mod:`rewards.math_worker`. Works from any thread; a process that is late is stopped and replaced.

    Args:
        seconds: for one comparison, whole seconds, since the library's own limits count in them.
    """

    def __init__(self, seconds: int):
        self.seconds = seconds
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.replies: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
        self.stop = lambda: None

    def right(self, gold: str, answer: str) -> bool | None:
        """Whether ``answer`` equals ``gold``; False if that took too long, None if ``gold`` cannot be read."""
        with self.lock:
            self._start()
            try:
                self.process.stdin.write(json.dumps({"gold": gold, "answer": answer}) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                self.stop()
                return None
            # Each of the library's own limits applies to reading and to comparing; this one is for when they fail.
            read = self._reply(2 * self.seconds + 1)
            if read is None or not read["gold"]:
                return None
            compared = self._reply(4 * self.seconds + 1)
            return False if compared is None else compared["right"]

    def _start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        worker = Path(__file__).with_name("math_worker.py")
        # -P: this folder has modules whose names must not hide the library's.
        command = [sys.executable, "-P", str(worker), str(self.seconds)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.stop = weakref.finalize(self, _end, self.process)
        self.replies = queue.SimpleQueue()
        threading.Thread(target=_listen, args=(self.process.stdout, self.replies), daemon=True).start()
        if self._reply(START) is None:
            raise UserError(
                "reward 'math': the process that runs math-verify did not start; does "
                "'python -c \"import math_verify\"' work?"
            )

    def _reply(self, seconds: float) -> dict | None:
        """The next reply; None, with the process stopped, if it is late or the process has ended."""
        try:
            reply = self.replies.get(timeout=seconds)
        except queue.Empty:
            reply = None
        if reply is None:
            self.stop()
        return reply


def _listen(stream: IO[str], replies: queue.SimpleQueue) -> None:
    for line in stream:
        replies.put(json.loads(line))
    replies.put(None)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdin.close()


@functools.cache
def math_process(seconds: int) -> MathProcess:
    """The one process for a time limit, shared by all rewards of this process."""
    return MathProcess(seconds)


class Math(Answer):
    """1 for an answer that equals the true one as mathematics, else 0: numbers, expressions, sets, equations, matrices.

    Args:
        seconds: for one comparison. An answer that takes longer gets 0.
        tag: the answer stands in ``<tag>``; without such a tag, the whole text after ``</think>`` is it, in which
            ``\\boxed{...}`` is looked for first.
        strict: without such a tag there is no answer.
        column: of the data with the truth instead of ``target``: a number or LaTeX, with or without dollars.

    A sample whose *truth* cannot be read is left out. Needs ``pip install 'mmrl[math]'``. The library runs in a process
    of its own, so that this works from any thread and no answer can hold up the run.
    """

    name = "math"

    def __init__(
        self,
        seconds: Annotated[int, Field(gt=0)] = 5,
        tag: str = "answer",
        strict: bool = False,
        column: str = "",
    ):
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("reward 'math' needs the package math-verify: pip install 'mmrl[math]'")
        self.process = math_process(seconds)
        self.tag, self.strict, self.column = tag, strict, column

    def score(self, row: Row) -> float | None:
        truth = row.text_truth()
        # An answer that is not there is compared all the same, since the truth may be unreadable.
        right = self.process.right(truth, (self.answer(row) or "")[-MOST:])
        return None if right is None else float(right)
