"""Code that draws: what it may do, and how like the picture is."""

import contextlib
import functools
import importlib.util
import math
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from rewards import load_reward, sandbox_child
from rewards.render import drawing_code
from rewards.render_likeness import beyond_blank, nearness, ssim
from rewards.sandbox import Limits, Sandbox, isolation

DRAWN = "\nimport matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1))\nplt.plot([0, 1])\n"


@pytest.fixture(scope="module")
def python():
    pytest.importorskip("matplotlib")
    sandbox = Sandbox("matplotlib", Limits(seconds=30, file_mb=1, memory_mb=1500, workers=1))
    sandbox.draw([None])
    return sandbox


def run(sandbox, code):
    (picture,) = sandbox.draw([code + DRAWN])
    return picture


def test_code_draws(python):
    assert run(python, "").size == (100, 100)
    (saved,) = python.draw([DRAWN + "plt.savefig('mine.png', dpi=50)\nplt.close()"])
    assert saved.size == (50, 50)
    assert python.draw(["x = 1", "1 / 0", "not python", "", "raise SystemExit", None]) == [None] * 6


def test_each_code_starts_afresh(python):
    run(python, "import builtins\nbuiltins.left = 1\nopen('left.txt', 'w').write('x')\nimport math\nmath.pi = 3")
    clean = (
        "import builtins, os, math\nassert not hasattr(builtins, 'left')\nassert not os.listdir()\nassert math.pi != 3"
    )
    assert run(python, clean) is not None
    first, second = python.draw(["import numpy as np\n" + DRAWN + "plt.plot(np.random.rand(5))"] * 2)
    assert first.tobytes() == second.tobytes()


def test_the_environment_is_clean(python, monkeypatch):
    monkeypatch.setenv("SECRET_KEY", "1")
    assert run(python, "import os\nassert 'SECRET_KEY' not in os.environ\nassert not os.listdir()") is not None


FORBIDDEN = {
    "write outside": "open(r'{outside}', 'w')",
    "append outside": "open(r'{kept}', 'a')",
    "delete outside": "import os\nos.remove(r'{kept}')",
    "rename outside": "import os\nos.rename(r'{kept}', 'here')",
    "make a folder outside": "import os\nos.mkdir(r'{outside}')",
    "delete a tree": "import shutil\nshutil.rmtree(os.path.dirname(r'{kept}'))",
    "low-level write": "import os\nos.close(os.open(r'{outside}', os.O_CREAT | os.O_WRONLY))",
    "socket": "import socket\nsocket.socket()",
    "connect": "import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)",
    "url": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2)",
    "process": "import subprocess\nsubprocess.run(['true'], check=True)",
    "shell": "import os\nif os.system('true') != 0: raise OSError",
    "fork": "import os\nif os.fork() == 0: os._exit(0)",
    "replace": "import os\nos.execv('/bin/true', ['true'])",
    "kill": "import os\nos.kill(os.getppid(), 9)",
    "native code": "import ctypes\nctypes.CDLL(None).getpid()",
    "memory": "x = bytearray(4 << 30)",
    "large file": "f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20))\nf.flush()",
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_what_code_may_not_do(python, what, tmp_path):
    kept, outside = tmp_path / "kept.txt", tmp_path / "outside"
    kept.write_text("kept")
    with socket.create_server(("127.0.0.1", 0)) as server:
        reached = []
        server.settimeout(0.01)
        code = FORBIDDEN[what].format(kept=kept, outside=outside, port=server.getsockname()[1])
        assert run(python, code) is None
        with contextlib.suppress(TimeoutError):
            reached.append(server.accept())
    assert not reached
    assert kept.read_text() == "kept"
    assert not outside.exists()
    # The process that starts the next one is unharmed.
    assert run(python, "") is not None


@pytest.mark.skipif(not isolation(), reason="no namespaces on this system")
def test_files_of_others_cannot_be_read(python, tmp_path):
    """By the kernel, where it has Landlock."""
    (tmp_path / "secret.txt").write_text("secret")
    code = f"open(r'{tmp_path / 'secret.txt'}').read()"
    if run(python, code) is not None:
        pytest.skip("this kernel has no Landlock")


def test_the_kernel_confines_without_the_help_of_python(tmp_path):
    """Landlock alone, with no hook: only the folder can be written, only what is named can be read."""
    (tmp_path / "work").mkdir()
    (tmp_path / "secret.txt").write_text("secret")
    code = """
import os, sys, runpy
child = runpy.run_path(sys.argv[1])
if not child["confine"](["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix]):
    sys.exit(77)
open("mine.txt", "w").write("x")
os.mkdir("sub"), os.rename("mine.txt", "sub/mine.txt"), os.remove("sub/mine.txt")
open(os.path.join(sys.base_prefix, "lib", os.path.basename(os.path.dirname(os.__file__)), "os.py")).read()
for act in (lambda: open("../secret.txt"), lambda: open("../new.txt", "w"), lambda: os.remove("../secret.txt"),
            lambda: os.mkdir("../new"), lambda: os.rename("../secret.txt", "here"), lambda: os.listdir("..")):
    try:
        act()
    except PermissionError:
        continue
    sys.exit(1)
"""
    script = Path(sandbox_child.__file__)
    done = subprocess.run([sys.executable, "-P", "-c", code, script], cwd=tmp_path / "work", capture_output=True)
    if done.returncode == 77:
        pytest.skip("this kernel has no Landlock")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "secret.txt").read_text() == "secret"


@pytest.mark.skipif(not isolation(), reason="no namespaces on this system")
def test_processes_have_no_network():
    """By the kernel; what Python reports of itself forbids sockets before that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 0
        assert subprocess.run([*isolation(), sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode != 0


def test_time_is_limited():
    pytest.importorskip("matplotlib")
    sandbox = Sandbox("matplotlib", Limits(seconds=1, workers=1))
    sandbox.draw([None])
    start = time.monotonic()
    assert sandbox.draw(["while True: pass", "import time\ntime.sleep(60)"]) == [None, None]
    assert time.monotonic() - start < 20
    before = len(os.listdir(sandbox.cache.name))
    assert run(sandbox, "") is not None
    assert len(os.listdir(sandbox.cache.name)) == before


SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="64" height="32"><rect width="{w}" height="32" fill="red"/></svg>'


# A reward starts a process, so equal ones are shared.
reward = functools.cache(lambda **options: load_reward("render", workers=1, **options))


def score(text, target, images=(), **options):
    (found,) = reward(**options)(Samples([Prompt("draw", id="r:1", target=target, images=images)], texts=[text]))
    return found


def test_svg(tmp_path):
    pytest.importorskip("resvg_py")
    answer = f"<think>red</think><answer>```svg\n{SVG.format(w=32)}\n```</answer>"
    truth = torch.ones(3, 32, 64)
    truth[1:, :, :32] = 0
    assert score(answer, truth, language="svg") > 0.97
    assert score(answer, SVG.format(w=32), language="svg", similarity="pixels") == pytest.approx(1)
    assert score(answer, None, images=[truth], language="svg") > 0.97
    other = score(SVG.format(w=16), truth, language="svg", similarity="pixels")
    assert 0 < other < 0.9
    # An empty page is worth nothing, though half of it is right.
    empty = SVG.format(w=0)
    assert score(empty, truth, language="svg", similarity="pixels") == pytest.approx(0, abs=1e-6)
    assert score(empty, truth, language="svg", similarity="pixels", blank_is_zero=False) > 0.4
    for bad in ("", "<svg", "<svg></svg>", answer[:-30], "\x00" * 100, "<svg>" * 1000 + "</svg>"):
        assert score(bad, truth, language="svg") == pytest.approx(0, abs=0.01)
    path = tmp_path / "own.py"
    path.write_text("def red(found, truth):\n    assert found.shape == truth.shape\n    return found[0].mean()\n")
    assert score(answer, truth, language="svg", similarity=f"{path}:red") == pytest.approx(1)


def test_a_process_that_ended_is_replaced(python):
    (painter,) = [python.free.get()]
    painter.process.kill()
    painter.process.wait()
    python.free.put(painter)
    assert run(python, "open('/dev/null', 'w').write('x')") is not None


def test_confinement_can_be_required():
    pytest.importorskip("resvg_py")
    if not isolation():
        with pytest.raises(UserError, match="confine is 'required'"):
            Sandbox("svg", Limits(confine="required"))
        return
    sandbox = Sandbox("svg", Limits(workers=1, confine="required"))
    try:
        (picture,) = sandbox.draw([SVG.format(w=8)])
    except UserError:
        pytest.skip("this kernel has no Landlock")
    assert picture.size == (512, 256)


def test_svg_reads_no_files(tmp_path):
    pytest.importorskip("resvg_py")
    from PIL import Image

    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    link = f'<image href="{tmp_path / "red.png"}" width="8" height="8"/>'
    sandbox = Sandbox("svg", Limits(workers=1))
    (picture,) = sandbox.draw([f'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8">{link}</svg>'], width=8)
    if picture.getpixel((4, 4)) != (255, 255, 255):
        pytest.skip("this kernel has no Landlock")


def test_chart_to_code():
    pytest.importorskip("matplotlib")
    chart = "import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 2))\nplt.bar(['a', 'b'], [1, {height}])"
    prompt = Prompt("draw", id="r:1", target=chart.format(height=2))
    texts = [f"```python\n{chart.format(height=height)}\n```" for height in (2, 4, 2)] + ["no code at all", ""]
    exact, near, again, *none = reward(language="matplotlib", seconds=60)(Samples([prompt] * 5, texts=texts))
    assert exact == again == pytest.approx(1)
    assert 0 < near < 0.99
    assert none == [0, 0]


def test_bad_rows_and_options(tmp_path):
    pytest.importorskip("resvg_py")
    with pytest.raises(UserError, match=r"r:1.*has no ground truth in 'target'"):
        score("x", None, language="svg")
    with pytest.raises(UserError, match=r"r:1.*a picture, or svg code that draws one"):
        score("x", "<svg>", language="svg")
    with pytest.raises(UserError, match=r"r:1.*a picture, or svg code that draws one"):
        score("x", 3, language="svg")
    with pytest.raises(UserError, match=r"r:1.*cannot be read"):
        score("x", str(tmp_path / "none.png"), language="svg")
    with pytest.raises(UserError, match="similarity is 'sim', but should be ssim, pixels or 'module:function'"):
        load_reward("render", language="svg", similarity="sim")


@pytest.mark.skipif(shutil.which("pdflatex") is not None, reason="pdflatex is installed")
def test_tikz_is_refused_without_pdflatex():
    with pytest.raises(UserError, match="needs the program pdflatex"):
        load_reward("render", language="tikz")


@pytest.mark.skipif(
    shutil.which("pdflatex") is None or shutil.which("pdftoppm") is None, reason="pdflatex or pdftoppm is not installed"
)
def test_tikz():
    code = r"\begin{tikzpicture}\fill[red] (0,0) rectangle (2,1);\end{tikzpicture}"
    assert score(f"```latex\n{code}\n```", code, language="tikz", similarity="pixels", seconds=60) == pytest.approx(1)


def test_code_in_an_answer():
    assert drawing_code("see <svg a='1'></svg> there", "svg") == "<svg a='1'></svg>"
    assert drawing_code("```python\nx\n```\n```python\ny\n```", "matplotlib") == "y\n"
    assert drawing_code("plain", "matplotlib") == "plain"
    assert drawing_code(" ", "matplotlib") is None
    inside = r"\begin{tikzpicture}\draw (0,0);\end{tikzpicture}"
    assert inside in drawing_code(f"so: {inside}", "tikz")
    assert drawing_code("so", "tikz") is None


def test_ssim_by_its_definition():
    """Against windows weighed one by one in numpy."""
    rng = np.random.default_rng(0)
    a = rng.random((3, 15, 14))
    b = np.clip(a + 0.2 * rng.standard_normal(a.shape), 0, 1)
    line = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    weight = np.outer(line, line) / line.sum() ** 2
    values = []
    for channel in range(3):
        for i in range(15 - 10):
            for j in range(14 - 10):
                x, y = (p[channel, i : i + 11, j : j + 11] for p in (a, b))
                mx, my = (weight * x).sum(), (weight * y).sum()
                vx, vy = (weight * (x - mx) ** 2).sum(), (weight * (y - my) ** 2).sum()
                both = (weight * (x - mx) * (y - my)).sum()
                top = (2 * mx * my + 0.01**2) * (2 * both + 0.03**2)
                values.append(top / ((mx**2 + my**2 + 0.01**2) * (vx + vy + 0.03**2)))
    found = ssim(torch.from_numpy(a), torch.from_numpy(b))
    assert found == pytest.approx(np.mean(values), abs=1e-10)
    assert ssim(torch.from_numpy(a), torch.from_numpy(a)) == pytest.approx(1)
    tiny = torch.rand(3, 4, 3)
    assert ssim(tiny, tiny) == pytest.approx(1)
    assert nearness(torch.zeros(3, 4, 4), torch.full((3, 4, 4), 0.3)) == pytest.approx(0.7)
    assert beyond_blank(nearness, torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)) == 1
    assert math.isfinite(beyond_blank(ssim, torch.zeros(3, 12, 12), torch.ones(3, 12, 12)))


def test_works_from_several_threads(python):
    found = []
    threads = [threading.Thread(target=lambda: found.append(run(python, ""))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3
    assert None not in found


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package resvg_py: pip install 'mmrl\[render\]'"):
        Sandbox("svg", Limits())
