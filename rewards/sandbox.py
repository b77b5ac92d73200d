"""Runs code that draws or scores, written by a model, in a process that can do little else.

What is guaranteed where: ``docs/text-rewards.md``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from mmrl.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Language = Literal["svg", "matplotlib", "tikz"]
Kind = Literal["svg", "matplotlib", "tikz", "reward"]
Found = TypeVar("Found")

MOST_PIXELS = 4096 * 4096
LIBRARIES = {"svg": ("resvg_py",), "matplotlib": ("matplotlib", "numpy"), "tikz": (), "reward": ("numpy",)}
PROGRAMS = {"svg": (), "matplotlib": (), "tikz": ("pdflatex", "pdftoppm"), "reward": ()}
WORK = {kind: f"drawing {kind}" for kind in ("svg", "matplotlib", "tikz")} | {"reward": "running reward code"}
SAMPLE = {
    "svg": '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>',
    "matplotlib": "import matplotlib.pyplot as plt\nplt.plot([0, 1], [0, 1])\nplt.title('a')",
    "tikz": r"\documentclass{standalone}\usepackage{tikz}\begin{document}\tikz\fill (0,0) circle (1);\end{document}",
}
# Fonts, libraries and what programs look up at their start; no home folders.
READABLE = ("/usr", "/lib", "/lib64", "/bin", "/etc/fonts", "/etc/ld.so.cache", "/etc/localtime", "/etc/texmf")
READABLE += ("/var/lib/texmf", "/var/cache/fontconfig", "/dev/null", "/dev/urandom", "/System/Library/Fonts")


@dataclass(frozen=True)
class Limits:
    """What one piece of code may use.

    Attributes:
        seconds: of wall clock, and of processor time.
        memory_mb: address space.
        file_mb: largest file.
        workers: pieces at a time.
        confine: whether to refuse to run where the kernel cannot confine the process (Landlock and namespaces).
    """

    seconds: int = 10
    memory_mb: int = 2048
    file_mb: int = 16
    workers: int = 2
    confine: Literal["auto", "required"] = "auto"


@functools.cache
def isolation() -> tuple[str, ...]:
    """The command that starts a process without network and with process ids of its own; empty where there is none."""
    if shutil.which("unshare") is None:
        return ()
    for flags in (("-rnpf", "--kill-child"), ("-rn",)):
        command = ("unshare", *flags, "--")
        tried = subprocess.run([*command, "true"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=30)
        if tried.returncode == 0:
            return command
    return ()


class Worker:
    """One process that runs one piece of code after the other, see :mod:`rewards.sandbox_child`; replaced when it ends.

    Args:
        language: of the code.
        paths: folders of the libraries.
        cache: folder for caches of fonts, which only the process that loads the libraries can write.
    """

    def __init__(self, language: Kind, paths: Sequence[str], cache: str):
        self.language, self.paths, self.cache = language, list(paths), cache
        self.process: subprocess.Popen | None = None
        self.end = lambda: None

    def work(self, job: dict) -> None:
        """Have one job done; one that ended the process, or met its end, gets a second process and no third."""
        for _ in range(2):
            if self.process is None or self.process.poll() is not None:
                self._start()
            with contextlib.suppress(BrokenPipeError):
                self._say(job)
                if self.process.stdout.readline() == "done\n":
                    return
            self.end()

    def _say(self, message: dict) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _start(self) -> None:
        # -P: this folder has modules whose names must not hide those of libraries.
        script = str(Path(__file__).with_name("sandbox_child.py"))
        self.process = subprocess.Popen(
            [*isolation(), sys.executable, "-E", "-P", "-B", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.cache,
            env=self._environment(),
            text=True,
            start_new_session=True,
        )
        self.end = weakref.finalize(self, _end, self.process)
        self._say({"language": self.language, "paths": self.paths})
        if self.process.stdout.readline() != "ready\n":
            raise UserError(f"{WORK[self.language]} does not work on this machine: its libraries could not be loaded")

    def _environment(self) -> dict[str, str]:
        """Nothing of ours but where programs are."""
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL", "NUMEXPR")}
        places = {"HOME": self.cache, "MPLCONFIGDIR": self.cache, "MPLBACKEND": "Agg"}
        return {"PATH": os.environ.get("PATH", os.defpath), "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"} | threads | places


def _end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            stream.close()


class Sandbox:
    """Runs code of one language.

    Raises:
        UserError: what the language needs is not installed, or the system cannot confine processes and has to.
    """

    def __init__(self, language: Kind, limits: Limits):
        absent = [name for name in LIBRARIES[language] if importlib.util.find_spec(name) is None]
        if absent:
            raise UserError(f"{WORK[language]} needs the package {', '.join(absent)}: pip install 'mmrl[render]'")
        absent = [name for name in PROGRAMS[language] if shutil.which(name) is None]
        if absent:
            raise UserError(
                f"drawing {language} needs the program {' and '.join(absent)}, which is not installed on this machine"
            )
        if os.name != "posix":
            raise UserError(f"{WORK[language]} from a model needs a POSIX system to limit what the code can do")
        if limits.confine == "required" and not isolation():
            raise UserError(
                "confine is 'required', but this system does not let processes have a network namespace (unshare -rn)"
            )
        self.language, self.limits = language, limits
        self.cache = tempfile.TemporaryDirectory(prefix="mmrl-fonts-")
        self.paths = sorted({str(Path(_origin(name)).parent) for name in LIBRARIES[language]})
        self.free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for _ in range(limits.workers):
            self.free.put(Worker(language, self.paths, self.cache.name))
        self.checked = False

    def draw(self, codes: Sequence[str | None], width: int = 512) -> list[Image | None]:
        """A picture for each code; None for None and for code that fails, draws nothing, or needs more than it may.

        Args:
            width: in pixels, of SVG pictures.

        Raises:
            UserError: a drawing of our own fails, so that no code could be blamed.
        """
        if not self.checked:
            if self._one(SAMPLE[self.language], 8, seconds=120) is None:
                raise UserError(
                    f"drawing {self.language} does not work on this machine: not even a sample could be drawn"
                    + (", or the kernel cannot confine it" if self.limits.confine == "required" else "")
                )
            self.checked = True
        with ThreadPoolExecutor(self.limits.workers) as pool:
            return list(pool.map(lambda code: None if code is None else self._one(code, width), codes))

    def _one(self, code: str, width: int, seconds: int | None = None) -> Image | None:
        return self.run({"code": code, "width": width}, lambda folder: _read(folder / "picture.png"), seconds=seconds)

    def run(
        self,
        job: Mapping[str, Any],
        read: Callable[[Path], Found],
        prepare: Callable[[Path], None] = lambda folder: None,
        seconds: int | None = None,
    ) -> Found:
        """What ``read`` finds in the folder in which a job was done, or had to be stopped.

        Args:
            job: its ``code``, and what else the language takes.
            prepare: puts into the folder what the code reads.
            seconds: in place of the limit.
        """
        with tempfile.TemporaryDirectory(prefix="mmrl-work-") as name:
            folder = Path(name)
            prepare(folder)
            limits = {
                "seconds": seconds or self.limits.seconds,
                "memory_mb": self.limits.memory_mb,
                "file_mb": self.limits.file_mb,
                "confine": self.limits.confine,
                "readable": [*READABLE, *self.paths, sys.prefix, sys.base_prefix, self.cache.name],
            }
            worker = self.free.get()
            try:
                worker.work({"language": self.language, "folder": name, **job, **limits})
            finally:
                self.free.put(worker)
            return read(folder)


def _origin(name: str) -> str:
    """The folder of a package, whose parent is what has to be on the path."""
    return str(Path(importlib.util.find_spec(name).origin).parent)


def _read(path: Path) -> Image | None:
    """The picture as RGB, on white; None if it is not there, no PNG, or too large."""
    from PIL import Image, UnidentifiedImageError

    if path.is_symlink() or not path.is_file():
        return None
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                return None
            layer = picture.convert("RGBA")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    ground = Image.new("RGBA", layer.size, "white")
    return Image.alpha_composite(ground, layer).convert("RGB")
