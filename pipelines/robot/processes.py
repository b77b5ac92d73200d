"""Environments in worker processes that live for the whole run and may crash or hang without harm to it."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from typing import Any

import numpy as np

from mmrl.errors import UserError
from pipelines.robot.stepping import Chunk, Layout
from pipelines.robot.wire import receive, send

log = logging.getLogger(__name__)

STARTING = 300.0
"""Seconds in which a worker has to have built its environments."""
PATIENCE = 3
"""Failures of a worker in a row, with no episode finished in between, that end the run."""


_START = """
import sys
sys.path += [path for path in sys.argv[2:] if path not in sys.path]
from pipelines.robot.worker import main
main(int(sys.argv[1]))
"""


class WorkerLost(Exception):
    """A worker crashed, hung or said that an environment failed."""


class Worker:
    """One process with some of the environments; started at once, waited for when it is first used.

    Its own interpreter rather than a fork or a spawned copy: a fork of a process with threads may lock up, and a
    spawned one imports the user's script again.
    """

    def __init__(self, spec: str, names: Sequence[int], options: Mapping[str, Any], timeout: float):
        self.what, self.timeout = f"env '{spec}', worker of rows {', '.join(map(str, names))}", timeout
        self.config = {"spec": spec, "names": list(names), "options": dict(options)}
        self.failures = 0
        self.start()

    def start(self) -> None:
        """Begin to build the environments."""
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(theirs.fileno()), *sys.path],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what simulators print is no output of the run
            start_new_session=True,  # Ctrl-C is for the run; workers end with it
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        theirs.close()
        self.layout: Layout | None = None
        self.deadline = time.monotonic() + STARTING
        send(self.pipe, self.config)

    def ready(self) -> Layout:
        """Wait until the environments are built."""
        if self.layout is None:
            words, _ = self.reply()
            self.layout = Layout(**{key: _frozen(value) for key, value in words["layout"].items()})
        return self.layout

    def ask(self, words: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Send a request; its reply has to come within the time limit."""
        self.ready()
        try:
            send(self.pipe, words, arrays)
        except OSError as error:
            raise self._gone("crashed") from error
        self.deadline = time.monotonic() + self.timeout

    def reply(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The reply to the last request.

        Raises:
            WorkerLost: none came, or an environment failed.
            UserError: the worker could not do what it was asked for.
        """
        if not wait([self.pipe], max(0.0, self.deadline - time.monotonic())):
            limit = STARTING if self.layout is None else self.timeout
            raise self._gone(f"gave no answer in {limit:g} s and was killed")
        try:
            words, arrays = receive(self.pipe)
        except (EOFError, OSError) as error:
            raise self._gone("crashed") from error
        if "error" in words:
            raise UserError(words["error"])
        if "fault" in words:
            raise self._gone("", words["fault"])
        return words, arrays

    def stop(self) -> None:
        """End the process, by force if it does not listen."""
        self.pipe.close()
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _gone(self, how: str, sentence: str = "") -> WorkerLost:
        """End what is left of the process; the exception says what happened."""
        if how.startswith("gave"):
            self.process.kill()
        self.stop()
        self.failures += 1
        ended = f" with exit status {self.process.returncode}" if how == "crashed" else ""
        return WorkerLost(sentence or f"{self.what} {how}{ended}")


class Processes:
    """Rows dealt out to workers in turn; a message carries a whole chunk for all rows of a worker.

    A worker that is lost is started again, and the episodes it was in come back as dropped. It ends the run only if it
    fails ``PATIENCE`` times without finishing an episode.

    Args:
        spec, options: as for :class:`pipelines.robot.singles.SingleEnvs`.
        count: rows.
        processes: workers, at most ``count`` of them.
        timeout: seconds that a worker may take for a reset or a chunk of all its rows.
    """

    def __init__(self, spec: str, count: int, processes: int, timeout: float, options: Mapping[str, Any]):
        self.num_envs = count
        size = min(processes, count)
        self.workers = [Worker(spec, range(k, count, size), options, timeout) for k in range(size)]
        self._lost = np.zeros(count, bool)
        try:
            for worker in self.workers:
                self.layout = worker.ready()
        except WorkerLost as lost:
            self.close()
            raise UserError(str(lost)) from lost
        except UserError:
            self.close()
            raise

    def restart(self, rows: np.ndarray, seeds: Sequence[int]) -> dict[str, Any]:
        """Start episodes; a worker that fails in it is started and asked again."""
        seeds = np.asarray(seeds, object)
        seen = _Gathered(self.layout, len(rows))
        left = self._shares(rows)
        while left:
            asked = {}
            for k, places in left.items():
                words = {"verb": "restart", "seeds": seeds[places].tolist()}
                asked[k] = (places, words, {"rows": self._local(rows[places])})
            replies, _ = self._exchange(asked)
            for k, (words, arrays) in replies.items():
                seen.put(left.pop(k), words, arrays)
        self._lost[:] = False
        return seen.observation()

    def step(self, rows: np.ndarray, actions: np.ndarray) -> tuple[dict[str, Any], Chunk]:
        """Execute a chunk in each row."""
        seen, chunk = _Gathered(self.layout, len(rows)), Chunk.empty(*actions.shape[:2])
        chunk.dropped[:] = self._lost[rows]
        asked = {
            k: (places, {"verb": "step"}, {"rows": self._local(rows[places]), "actions": actions[places]})
            for k, places in self._shares(rows, ~chunk.dropped).items()
        }
        replies, lost = self._exchange(asked)
        for k in lost:
            chunk.dropped[asked[k][0]] = True
        for k, (words, arrays) in replies.items():
            places = asked[k][0]
            parts = {name: arrays[f"chunk/{name}"] for name in vars(chunk) if name != "info"}
            info = {name.removeprefix("info/"): values for name, values in arrays.items() if name.startswith("info/")}
            chunk.put(places, Chunk(**parts, info=info))
            seen.put(places, words, arrays)
            if (parts["terminated"] | parts["truncated"]).any():
                self.workers[k].failures = 0
        return seen.observation(), chunk

    def draw(self, rows: np.ndarray) -> np.ndarray:
        """Pictures of some rows; black ones of rows that were lost."""
        asked = {
            k: (places, {"verb": "draw"}, {"rows": self._local(rows[places])})
            for k, places in self._shares(rows, ~self._lost[rows]).items()
        }
        replies, _ = self._exchange(asked)
        pictures = {k: arrays["picture"] for k, (_, arrays) in replies.items()}
        shape = next(iter(pictures.values())).shape[1:] if pictures else (3, 96, 96)
        whole = np.zeros((len(rows), *shape), np.uint8)
        for k, picture in pictures.items():
            whole[asked[k][0]] = picture
        return whole

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.pipe.close()
        for worker in self.workers:
            worker.stop()

    def _exchange(self, asked: Mapping[int, tuple]) -> tuple[dict[int, tuple], list[int]]:
        """Ask workers, all at once, and wait for their replies; those that were lost on the way are started again."""
        replies: dict[int, tuple] = {}
        lost: dict[int, WorkerLost] = {}
        mistakes: list[UserError] = []
        waiting: list[int] = []

        @contextlib.contextmanager
        def noted(k: int) -> Iterator[None]:
            try:
                yield
            except WorkerLost as error:
                lost[k] = error
            except UserError as error:
                mistakes.append(error)

        for k, (_, words, arrays) in asked.items():
            with noted(k):
                self.workers[k].ask(words, arrays)
                waiting.append(k)
        for k in waiting:
            with noted(k):
                replies[k] = self.workers[k].reply()
        for k, error in lost.items():
            worker = self.workers[k]
            self._lost[k :: len(self.workers)] = True
            worker.start()
            if worker.failures < PATIENCE:
                log.warning("%s; it is started again, its episodes are dropped", error)
            else:
                worker.failures = 0
                mistakes.append(UserError(f"{error}; that was failure {PATIENCE} without a finished episode"))
        if mistakes:
            raise mistakes[0]
        return replies, list(lost)

    def _shares(self, rows: np.ndarray, wanted: np.ndarray | None = None) -> dict[int, np.ndarray]:
        """Worker to the places in ``rows`` that are its own."""
        places = np.arange(len(rows)) if wanted is None else np.flatnonzero(wanted)
        owners = rows[places] % len(self.workers)
        return {int(k): places[owners == k] for k in np.unique(owners)}

    def _local(self, rows: np.ndarray) -> np.ndarray:
        return rows // len(self.workers)


class _Gathered:
    """Observations of several workers put together; zeros and empty texts where there are none."""

    def __init__(self, layout: Layout, rows: int):
        self.arrays: dict[str, np.ndarray] = {}
        if layout.state_dim is not None:
            self.arrays["state"] = np.zeros((rows, layout.state_dim), np.float32)
        if layout.image_shape is not None:
            self.arrays["image"] = np.zeros((rows, *layout.image_shape), np.uint8)
        self.texts = [""] * rows
        self.told = False

    def put(self, places: np.ndarray, words: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """What one worker said of its rows."""
        for name, whole in self.arrays.items():
            whole[places] = arrays[f"seen/{name}"]
        for place, text in zip(places, words.get("instruction", ()), strict=False):
            self.texts[place], self.told = text, True

    def observation(self) -> dict[str, Any]:
        """All of it."""
        return {**self.arrays, "instruction": self.texts} if self.told else self.arrays


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
