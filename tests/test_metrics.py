import io
import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from mmrl.display import Display, duration
from mmrl.errors import UserError
from mmrl.media import data_uri, grid, save_images, to_pil
from mmrl.metrics import MetricsWriter, read_metrics


def test_lines_are_strict_json_and_gaps_are_null(tmp_path):
    writer = MetricsWriter(tmp_path)
    values = {"reward/mean": 0.1 + 0.2, "kl": math.nan, "loss": math.inf, "stage": "grpo", "n": torch.tensor(3.0)}
    writer.write(1, values)
    writer.close()

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "reward/mean": 0.1 + 0.2, "kl": None, "loss": None, "stage": "grpo", "n": 3.0}
    assert read_metrics(tmp_path) == [line]


def test_rewind_gives_the_file_of_an_uninterrupted_run(tmp_path):
    def line(step):
        return {"reward/mean": step / 7, "note": "é\u2028ü"}

    straight = MetricsWriter(tmp_path / "straight")
    for step in range(1, 7):
        straight.write(step, line(step))
        if step % 2 == 0:
            straight.write(step, {"eval/reward": step / 3})
    straight.close()
    killed = MetricsWriter(tmp_path / "killed")
    for step in range(1, 6):
        killed.write(step, line(step) if step < 4 else {"reward/mean": -1.0})
        if step % 2 == 0:
            killed.write(step, {"eval/reward": step / 3})
    killed.close()
    with (tmp_path / "killed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "reward/me')
    resumed = MetricsWriter(tmp_path / "killed")
    resumed.rewind(3)
    for step in range(4, 7):
        resumed.write(step, line(step))
        if step % 2 == 0:
            resumed.write(step, {"eval/reward": step / 3})
    resumed.close()
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("straight", "killed")]
    assert files[0] == files[1]
    assert not list(tmp_path.glob("*/*.tmp"))


def test_a_killed_process_leaves_whole_lines(tmp_path):
    code = (
        "import sys, itertools; from mmrl.metrics import MetricsWriter; w = MetricsWriter(sys.argv[1])\n"
        "for k in itertools.count(1): w.write(k, {'a': 1 / k, 'b': 'x' * 3000})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    path = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while (not path.exists() or path.stat().st_size < 30_000) and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    writer = MetricsWriter(tmp_path)
    steps = [line["step"] for line in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 9
    writer.rewind(5)
    writer.write(6, {"a": 0.5})
    writer.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_half_written_last_line_is_left_out_and_a_broken_one_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert read_metrics(tmp_path) == [{"step": 1, "a": 1}]
    path.write_text('{"step": 1}\noops\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2: not valid JSON"):
        read_metrics(tmp_path)
    path.write_text('{"a": 1}\n')
    with pytest.raises(UserError, match="integer 'step'"):
        read_metrics(tmp_path)


def test_missing_runs_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(UserError, match="not a run folder"):
        read_metrics(tmp_path)


def test_tensorboard_holds_the_same_numbers_also_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tensorboard=True)
    for step in range(1, 5):
        writer.write(step, {"reward/mean": step / 8, "kl": math.nan, "stage": "grpo"})
    writer.close()
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.rewind(2)
    for step in range(3, 6):
        writer.write(step, {"reward/mean": step / 4})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    found = [(event.step, event.value) for event in events.Scalars("reward/mean")]
    assert found == [(1, 0.125), (2, 0.25), (3, 0.75), (4, 1.0), (5, 1.25)]


def test_wandb_without_its_package_or_key_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"mmrl\[wandb\]"):
        MetricsWriter(tmp_path, wandb_project="p")


def test_pictures_survive_the_way_to_disk(tmp_path):
    pixels = torch.arange(2 * 3 * 5 * 4).reshape(2, 3, 5, 4) % 256
    paths = save_images(pixels / 255, tmp_path / "deep" / "er", ["000-0", "000-1"])
    assert [path.name for path in paths] == ["000-0.png", "000-1.png"]
    for path, expected in zip(paths, pixels, strict=True):
        assert (np.asarray(Image.open(path)) == expected.permute(1, 2, 0).numpy()).all()
    large = np.asarray(to_pil(pixels[1] / 255, scale=3))
    assert (large == np.kron(pixels[1].permute(1, 2, 0).numpy(), np.ones((3, 3, 1), int))).all()
    with pytest.raises(ValueError, match="2 images but 1 names"):
        save_images(pixels / 255, tmp_path, ["a"])


def test_values_outside_the_range_are_clipped():
    picture = to_pil(torch.tensor([-1.0, 2.0, math.nan]).reshape(3, 1, 1))
    assert picture.getpixel((0, 0)) == (0, 255, 0)


def test_grid_places_pictures_row_by_row():
    colours = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    sheet = grid(colours[:, :, None, None].expand(3, 3, 4, 4), columns=2, scale=2, gap=1)
    assert sheet.size == (2 * 9 + 1, 2 * 9 + 1)
    assert [sheet.getpixel(place) for place in ((4, 4), (13, 4), (4, 13), (13, 13))] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 255),
    ]


def test_data_uri_is_exact_when_small_and_bounded_when_large():
    import base64

    def decode(uri):
        return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))

    generator = torch.Generator().manual_seed(0)
    small = to_pil(torch.rand(3, 16, 16, generator=generator))
    uri = data_uri(small, max_side=256, max_bytes=24_000)
    assert uri.startswith("data:image/png;base64,")
    assert (np.asarray(decode(uri)) == np.asarray(small)).all()
    uri = data_uri(to_pil(torch.rand(3, 512, 300, generator=generator)), max_side=128, max_bytes=8_000)
    assert uri.startswith("data:image/jpeg;base64,")
    assert decode(uri).size == (75, 128)


def run_display(display):
    display.start({"pipeline": "tiny [b]", "steps": 80})
    display.stage("grpo", 0, 80)
    first = {"eval/reward": 0.25, "eval/shapes/mean": 0.25, "eval/shapes/std": 0.1, "eval/diversity": 0.5}
    display.evaluation(0, first, None)
    for step in range(1, 81):
        display.phase("rollout", 8, 16)
        display.step(
            step, {"reward/mean": 0.25 + step / 160, "time/rollout": 1.0, "time/update": 2.0, "time/step": 3.1}
        )
    after = {"eval/reward": 0.75, "eval/shapes/mean": 0.75, "eval/diversity": 0.45}
    display.evaluation(80, after, first)
    display.finish({"eval": {"before": first, "after": after}, "steps": 80, "seconds": 250.0, "checkpoint": "x/y"})


def test_without_a_terminal_there_is_one_line_every_few_steps():
    out = io.StringIO()
    run_display(Display(console=Console(file=out, width=200)))
    lines = out.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("grpo step")]
    assert len(steps) == 41
    assert steps[-1] == "grpo step 80/80  reward 0.750 (+0.494)  3.1 s (rollout 1.0, update 2.0)"
    assert "pipeline: tiny [b]" in lines
    assert "evaluation at step 80: reward 0.750 (+0.500), shapes 0.750 (+0.500), diversity 0.450 (-0.050)" in lines
    assert lines[-2:] == ["80 steps in 4 min 10 s", "checkpoint: x/y"]
    assert not any("\x1b" in line for line in lines)


def test_a_terminal_gets_bars_and_a_table():
    out = io.StringIO()
    run_display(Display(console=Console(file=out, width=120, force_terminal=True, color_system=None)))
    text = out.getvalue()
    assert "Held-out evaluation, step 80" in text
    assert "80/80" in text
    assert "+0.500" in text
    assert "tiny [b]" in text


def test_other_ranks_are_silent(capsys):
    run_display(Display(rank=1))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.6, "1 min 0 s"), (250, "4 min 10 s"), (7300, "2 h 1 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_importing_is_light():
    code = "import sys, mmrl.metrics, mmrl.display, mmrl.media, mmrl.report; print([m for m in sys.modules if m in "
    code += "{'PIL', 'matplotlib', 'tensorboard', 'torch.utils.tensorboard', 'diffusers', 'transformers', 'wandb'}])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_last_lines_show_what_each_stage_left():
    out = io.StringIO()
    found = {
        "before": {"eval/reward": 0.0},
        "after": {"eval/reward": 0.75},
        "stages": {"clone": {"eval/reward": 0.25}, "practice": {"eval/reward": 0.75}},
    }
    Display(console=Console(file=out, width=200)).finish({"eval": found, "steps": 8, "seconds": 2.0})
    assert out.getvalue().splitlines()[0] == "reward: 0.000 -> 0.250 (clone) -> 0.750 (+0.750)"
