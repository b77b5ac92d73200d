"""The command line: every command on a tiny real pipeline, exit codes, and how fast it answers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny_run import save_pipeline, tiny_config, write_config
from typer.testing import CliRunner

import mmrl.run
from mmrl.cli import app
from mmrl.config import load_config
from mmrl.plan import step_cost
from mmrl.schema import config_schema, described_options

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def invoke(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)


def refused(*args) -> str:
    """The one line on standard error of a command that ends with status 2."""
    result = invoke(*args)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    return result.stderr.strip()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a pipeline, a config and a finished run of two steps."""
    folder = tmp_path_factory.mktemp("cli")
    save_pipeline(folder / "pipe")
    config = tiny_config(folder / "pipe", folder / "run", trainer={"steps": 2, "save_every": 1, "eval_every": 0})
    write_config(folder / "c.yaml", config)
    result = invoke("train", folder / "c.yaml")
    assert result.exit_code == 0, result.output
    return folder


def test_train_leaves_what_the_readme_says(place):
    run = place / "run"
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "summary.json", "report.html"} <= set(os.listdir(run))
    assert load_config(run / "config.yaml") == load_config(place / "c.yaml")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "reward/mean" in line] == [1, 2]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 2
    assert Path(summary["checkpoint"]).name == "step-000002"


def test_eval_scores_a_run_or_a_config(place):
    last = json.loads((place / "run" / "summary.json").read_text())["eval"]["after"]["reward"]
    result = invoke("eval", place / "run")
    assert result.exit_code == 0
    assert f"reward {last:.3f}" in result.stdout
    before = invoke("eval", place / "c.yaml", "eval.limit=1")
    assert before.exit_code == 0
    assert "evaluation at step 0" in before.stdout


def test_sample_writes_pictures_that_depend_on_the_seed_alone(place):
    files = {}
    for name, seed, n in (("a", 1, 2), ("b", 1, 1), ("c", 2, 1)):
        result = invoke("sample", place / "run", "--prompt", "a cat", "-n", n, "--seed", seed, "--out", place / name)
        assert result.exit_code == 0
        files[name] = [Path(line) for line in result.stdout.split("\n") if line]
    assert [Image.open(path).size for path in files["a"]] == [(16, 16)] * 2
    a, b, c = (np.asarray(Image.open(files[name][0])).astype(int) for name in "abc")
    # One of 255 levels: a batch of two and a batch of one may sum in another order.
    assert abs(a - b).max() <= 1
    assert abs(a - c).max() > 1
    assert refused("sample", place / "run", "--prompt", " ") == "error: --prompt is empty"


def test_report_and_resume(place, tmp_path):
    import shutil

    run = tmp_path / "moved"
    shutil.copytree(place / "run", run)
    (run / "report.html").unlink()
    assert invoke("report", run).exit_code == 0
    assert (run / "report.html").stat().st_size > 1000
    result = invoke("resume", run, "trainer.steps=3")
    assert result.exit_code == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 3
    assert (run / "checkpoints" / "step-000003").is_dir()
    assert not (place / "run" / "checkpoints" / "step-000003").exists()


def test_train_does_not_touch_an_earlier_run(place):
    before = (place / "run" / "metrics.jsonl").read_bytes()
    assert invoke("train", place / "c.yaml", "trainer.steps=1").exit_code == 0
    assert (place / "run-2" / "summary.json").is_file()
    assert (place / "run" / "metrics.jsonl").read_bytes() == before


def test_check_prints_the_config_the_cost_and_what_trains(place):
    result = invoke("check", place / "c.yaml", "trainer.steps=9")
    assert result.exit_code == 0
    text = result.stdout
    assert yaml.safe_load(text.partition("One training step")[0])["trainer"]["steps"] == 9
    assert "parameters that train: 24,176" in text
    assert "known once the model is loaded" in invoke("check", place / "c.yaml", "--no-load").stdout
    assert not (place / "run-3").exists()


def test_cost_of_a_step(place):
    def cost(*overrides):
        config = load_config(place / "c.yaml", overrides)
        return step_cost(config, config.stages[0])

    # 2 prompts x 4 samples x 4 steps, of which the last is not trained.
    grpo = cost("algorithm.kl_coef=0.1", "algorithm.epochs=2")
    assert (grpo["samples"], grpo["rollout forwards"], grpo["update forwards"]) == (8, 32, 48)
    assert (grpo["reference forwards"], grpo["optimiser steps"]) == (48, 2)
    # The first of two minibatches need not run the forwards of the rollout again.
    assert cost("algorithm.epochs=2", "algorithm.minibatches=2", "pipeline.keep_graph=true")["update forwards"] == 36
    assert cost("algorithm=dpo")["update forwards"] == 2 * 2
    assert cost("algorithm={type: dpo, pairs: ranked, group_size: 6}")["update forwards"] == 2 * 6
    backprop = cost("algorithm={type: reward_backprop, grad_steps: 2}")
    assert (backprop["sampling forwards"], backprop["of these with gradient"]) == (8, 4)
    steps = cost("algorithm={type: spo, candidates: 3, steps_per_rollout: 2}")
    assert (steps["rollout forwards"], steps["candidate forwards"], steps["update forwards"]) == (8, 24, 8)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.stps=3", "unknown key 'trainer.stps' (did you mean 'steps'?)"),
        ("trainer.lr=fast", "'trainer.lr' is 'fast', but should be a number"),
        ("algorithm.group_size=1", "algorithm.group_size is 1"),
        ("rewards=[shpaes]", "there is no reward 'shpaes' (did you mean 'shapes'?)"),
        ("data.prompts=missing.txt", "there is no file or folder"),
        ("data.prompts=empty.txt", "has no prompts in it"),
        ("data.prompts=broken.jsonl", "broken.jsonl:2: broken JSON"),
        ("data.prompts=textless.jsonl", "textless.jsonl:1: the row has no text"),
        ("data.eval_prompts=pictures.jsonl", "pictures.jsonl:1: "),
        ("trainer.optimizer=AdmW", "torch has no optimizer 'AdmW' (did you mean 'AdamW'?)"),
        ("trainer.optimizer_options={betsa: 1}", "trainer.optimizer_options.betsa"),
        ("trainer.optimizer_options={betas: [2, 3]}", "AdamW refuses them: Invalid beta"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_any_model_loads(place, monkeypatch, override, expected):
    def loads(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(mmrl.run, "build_policy", loads)
    (place / "empty.txt").write_text("\n")
    (place / "broken.jsonl").write_text('{"text": "a"}\n{"text": ')
    (place / "textless.jsonl").write_text('{"target": 1}')
    (place / "pictures.jsonl").write_text('{"text": "a", "image": "c.yaml"}')
    for command in ("train", "check"):
        line = refused(command, place / "c.yaml", override, f"run_dir={place / 'bad'}")
        assert line.startswith(f"error: {place / 'c.yaml'} with ")
        assert expected in line
    assert not (place / "bad").exists()


def test_bad_folders_and_usage(place, tmp_path):
    assert "is not a run folder" in refused("resume", tmp_path)
    assert "is not a run folder" in refused("sample", tmp_path, "--prompt", "a")
    assert "does not exist" in refused("train", tmp_path / "c.yaml")
    assert "is not a run folder" in refused("report", tmp_path)
    (tmp_path / "config.yaml").write_text((place / "run" / "config.yaml").read_text())
    assert "has no checkpoint yet" in refused("eval", tmp_path)
    assert invoke("trian").exit_code == 2
    assert invoke("sample", place / "run").exit_code == 2


def test_list_and_schema():
    listed = invoke("list").stdout
    for name in ("diffusion", "grpo", "reward_backprop", "shapes", "pickscore"):
        assert f" {name} " in listed
    schema = json.loads(invoke("schema").stdout)
    assert schema == json.loads(json.dumps(config_schema()))
    variants = {v["title"]: v for v in schema["$defs"]["algorithm"]["anyOf"] if "title" in v}
    options = variants["grpo_guard"]["properties"]
    assert options["clip_range"]["default"] == 2e-6
    assert options["group_size"]["description"] == "samples per prompt."
    assert "steps" in schema["properties"]["trainer"]["properties"]
    rewards = {v["title"]: v for v in schema["$defs"]["reward"]["anyOf"] if "title" in v}
    assert {"weight", "mode"} <= rewards["shapes"]["properties"].keys()


def references(node):
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def test_schema_accepts_real_configs_and_refuses_misspelt_ones(place):
    schema = config_schema()
    assert all(ref.removeprefix("#/$defs/") in schema["$defs"] for ref in references(schema))
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(schema)
    config = load_config(place / "c.yaml").dump()
    assert not list(validator.iter_errors(config))
    config["trainer"]["stps"] = 3
    assert list(validator.iter_errors(config))


def test_descriptions_of_options_come_from_docstrings():
    def function(a, b, c):
        """Line.

        Args:
            a: first
                thing.
            b, c: others.

        Returns:
            d: nothing.
        """

    assert described_options(function) == {"a": "first thing.", "b": "others.", "c": "others."}


def test_help_is_fast_and_imports_are_light():
    code = "import sys, mmrl.cli; print(*(m for m in ('torch', 'pydantic', 'yaml', 'numpy') if m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
    code = (
        "import sys, mmrl, mmrl.config, mmrl.data, rewards, pipelines; from mmrl import Prompt; "
        "print(*(m for m in ('diffusers', 'transformers', 'peft', 'PIL', 'matplotlib') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert done.stdout == "\n"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "mmrl", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


def test_interrupt_saves_a_checkpoint_and_ends_with_130(place):
    run = place / "interrupted"
    command = [sys.executable, "-m", "mmrl", "train", place / "c.yaml", f"run_dir={run}", "trainer.steps=100000"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as process:
        end = time.monotonic() + 120
        while not (run / "checkpoints" / "step-000001").exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    assert f"continue with: mmrl resume {run}" in errors
    assert "Traceback" not in errors
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    latest = max(path.name for path in (run / "checkpoints").iterdir())
    assert latest == f"step-{max(line['step'] for line in metrics):06d}"
