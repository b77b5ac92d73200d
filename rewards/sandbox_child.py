"""Processes in which a model's code draws or scores; :mod:`rewards.sandbox` starts them.

They import nothing of this project.

The first loads the libraries once. For each job, a line of JSON on standard input, it forks a second, which goes to the
job's folder, gives up what the work does not need, runs the code and leaves ``picture.png`` (or ``scores.json``); then
it ends that process and answers with a line. What code does to its own process is gone with it.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path

PICTURE, TURNS, SCORES = "picture.png", "turns.npz", "scores.json"

# Linux's Landlock (man 7 landlock): system calls, rights by version of the interface, and flags.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
NO_NEW_PRIVILEGES = 38
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
FILE_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1, 5: (1 << 16) - 1}
ONLY_FOR_FILES = EXECUTE | WRITE_FILE | READ_FILE | 1 << 14 | 1 << 15
NET_RIGHTS = 0b11
SCOPES = 0b11


def limit(job: dict) -> None:
    """Memory, processor time, size of files, and no core dumps."""
    megabyte = 1 << 20
    for kind, most in (
        (resource.RLIMIT_AS, job["memory_mb"] * megabyte),
        (resource.RLIMIT_CPU, job["seconds"]),
        (resource.RLIMIT_FSIZE, job["file_mb"] * megabyte),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def confine(readable: list[str]) -> bool:
    """Restrict this process, for good, to reading these folders and writing here, and to no TCP; False if it cannot.

    Not every Linux has Landlock, and other systems have not.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return False
    files = FILE_RIGHTS[min(version, 5)]
    # The struct has grown: network rights came with version 4 and scopes with version 6.
    fields = [files] + [NET_RIGHTS] * (version >= 4) + [SCOPES] * (version >= 6)
    attributes = struct.pack(f"={len(fields)}Q", *fields)
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if ruleset < 0:
        return False
    rules = [(path, EXECUTE | READ_FILE | READ_DIR) for path in readable]
    rules += [(".", files & ~EXECUTE), (os.devnull, READ_FILE | WRITE_FILE)]
    for path, rights in rules:
        if not os.path.exists(path):
            continue
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = files & rights & (~0 if os.path.isdir(path) else ONLY_FOR_FILES)
        failed = libc.syscall(
            ADD_RULE, ctypes.c_int(ruleset), ctypes.c_int(1), struct.pack("=Qi", allowed, handle), ctypes.c_uint32(0)
        )
        os.close(handle)
        if failed:
            return False
    libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return libc.syscall(RESTRICT_SELF, ctypes.c_int(ruleset), ctypes.c_uint32(0)) == 0


FORBIDDEN = (
    "socket.",
    "subprocess.",
    "ctypes.",
    "pty.",
    "os.system",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.spawn",
)
FORBIDDEN += (
    "os.kill",
    "signal.",
    "ftplib.",
    "urllib.",
    "http.",
    "smtplib.",
    "webbrowser.",
    "sys.addaudithook",
    "fcntl.",
)
CHANGES = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.link", "os.symlink")
CHANGES += ("os.truncate", "os.utime", "shutil.")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def watch() -> None:
    """Forbid what Python reports of itself: sockets, processes, and changes outside of this folder."""
    here = os.path.realpath(".")

    def outside(path: object) -> bool:
        if isinstance(path, int):
            return False
        found = os.path.realpath(os.fsdecode(path))
        return found != os.devnull and not (found + os.sep).startswith(here + os.sep)

    def hook(event: str, arguments: tuple) -> None:
        if event.startswith(FORBIDDEN):
            raise PermissionError(f"{event} is not allowed here")
        paths = arguments[:2] if event in ("os.rename", "os.link", "os.symlink") else arguments[:1]
        changes = event.startswith(CHANGES) or (event == "open" and arguments[2] & WRITES)
        if changes and any(isinstance(path, (str, bytes, os.PathLike)) and outside(path) for path in paths):
            raise PermissionError(f"{event} outside of the working folder is not allowed here")

    sys.addaudithook(hook)


def draw_svg(job: dict) -> None:
    """SVG by resvg."""
    import resvg_py

    Path(PICTURE).write_bytes(resvg_py.svg_to_bytes(svg_string=job["code"], width=job["width"], background="white"))


def draw_matplotlib(job: dict) -> None:
    """Python that draws with matplotlib: its current figure, or else the newest PNG that it saved."""
    import matplotlib.pyplot as plt

    exec(compile(job["code"], "answer.py", "exec"), {"__name__": "__main__"})
    if plt.get_fignums():
        plt.gcf().savefig(PICTURE, dpi=100, facecolor="white")
        return
    saved = sorted(Path().glob("*.png"), key=os.path.getmtime)
    if saved:
        saved[-1].rename(PICTURE)


def draw_tikz(job: dict) -> None:
    """LaTeX by pdflatex, turned into pixels by pdftoppm."""
    Path("answer.tex").write_text(job["code"], encoding="utf-8", errors="replace")
    latex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "answer.tex"]
    subprocess.run(latex, check=True, stdin=subprocess.DEVNULL)
    subprocess.run(["pdftoppm", "-png", "-r", "100", "-singlefile", "answer.pdf", "picture"], check=True)


def score_turns(job: dict) -> None:
    """Python with a function ``reward(state, action, next_state)``: its values for the turns in ``turns.npz``."""
    import numpy as np

    try:
        scope = {"__name__": "reward", "np": np}
        exec(compile(job["code"], "reward.py", "exec"), scope)
        with np.load(TURNS, allow_pickle=False) as turns:
            columns = [turns[name] for name in ("states", "actions", "executed", "next_states")]
        found = {"scores": [float(scope["reward"](s, a[:n], t)) for s, a, n, t in zip(*columns, strict=True)]}
    except Exception as error:  # noqa: BLE001 - whatever the code raised is what its author has to know
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "reward.py"]
        found = {"error": f"line {lines[-1]}: {error!r}" if lines else repr(error)}
    Path(SCORES).write_text(json.dumps(found), encoding="utf-8")


WORK = {"svg": draw_svg, "matplotlib": draw_matplotlib, "tikz": draw_tikz, "reward": score_turns}


def load(language: str) -> None:
    """What every job needs: libraries and their caches."""
    if language == "svg":
        import resvg_py  # noqa: F401
    elif language == "matplotlib":
        import io
        import random

        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        import numpy as np

        plt.plot([0, 1])
        plt.title("a")
        plt.savefig(io.BytesIO())
        plt.close("all")
        random.seed(0)
        np.random.seed(0)
    elif language == "reward":
        import random
        import zipfile  # noqa: F401 - what reading arrays needs

        import numpy as np

        random.seed(0)
        np.random.seed(0)


def work(job: dict) -> None:
    """The second process: do the job, or fail."""
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    os.chdir(job["folder"])
    limit(job)
    if not confine(job["readable"]) and job["confine"] == "required":
        return
    if job["language"] != "tikz":
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        watch()
    WORK[job["language"]](job)


def serve() -> None:
    """The first process: a fork for each job, until standard input ends."""
    settings = json.loads(sys.stdin.readline())
    sys.path += [path for path in settings["paths"] if path not in sys.path]
    load(settings["language"])
    os.write(1, b"ready\n")
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                work(job)
            finally:
                # Whatever the code raised or asked to be done at its end.
                os._exit(0)
        end = time.monotonic() + job["seconds"]
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            if time.monotonic() > end:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                break
            time.sleep(0.002)
        os.write(1, b"done\n")


if __name__ == "__main__":
    serve()
