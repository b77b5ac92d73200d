"""The loop as a whole: exact resume, gradients that do not depend on how a step is cut, work counters, stages."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import save_pipeline, tiny_config, write_config

from mmrl import run
from mmrl.config import parse_config

# As many threads as this process has: sums over other portions round differently, and bits are compared here.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipeline") / "sd3")


def train(config):
    return run.train(parse_config(config))


def metrics(run_dir):
    """Metric lines without timings, which no two runs share."""
    lines = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and not k.endswith("/seconds")} for line in lines
    ]


def weights(run_dir, step):
    return load_file(Path(run_dir) / "checkpoints" / f"step-{step:06d}" / "policy.safetensors")


def assert_same_checkpoint(one, other):
    assert sorted(path.name for path in one.iterdir()) == sorted(path.name for path in other.iterdir())
    for file in sorted(one.glob("*.safetensors")):
        a, b = load_file(file), load_file(other / file.name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), file.name
    a, b = (json.loads((folder / "state.json").read_text()) for folder in (one, other))
    for state in (a, b):
        state["training"].pop("seconds")
    assert a == b


VARIANTS = {
    "grpo": {"algorithm": {"kl_coef": 0.1, "epochs": 2, "minibatches": 2}, "trainer": {"ema": {"decay": 0.9}}},
    "lora": {
        "pipeline": {"lora": {"rank": 4}, "window": {"random": 2}},
        "algorithm": {"type": "grpo_guard", "clip_range": 1e-3, "epochs": 2},
    },
    "dpo": {"algorithm": {"type": "dpo", "group_size": 4, "refresh_reference": 2}},
    "backprop": {"algorithm": {"type": "alignprop", "distance_coef": 0.1}},
    "steps": {"algorithm": {"type": "spo", "refresh_reference": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kill_and_resume_is_bit_exact(pipeline, tmp_path, variant):
    """Six steps equal three steps, kill -9, resume: weights, optimiser, averages, metrics."""
    changes = {**VARIANTS[variant], "seed": 11}
    straight = tiny_config(pipeline, tmp_path / "straight", **changes)
    train(straight)

    killed = tiny_config(pipeline, tmp_path / "killed", **changes)
    config = write_config(tmp_path / "config.yaml", killed)
    process = subprocess.Popen(
        [sys.executable, "-m", "mmrl", "train", str(config)],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(tmp_path / "killed/checkpoints/step-000003", process)
    process.send_signal(signal.SIGKILL)
    process.wait()

    summary = run.resume(tmp_path / "killed")
    assert summary["steps"] == 6
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "straight")
    for step in (3, 6):
        name = f"checkpoints/step-{step:06d}"
        assert_same_checkpoint(tmp_path / "straight" / name, tmp_path / "killed" / name)


def wait_for(path, process):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_interrupt_writes_a_checkpoint_and_exits_with_130(pipeline, tmp_path):
    config = tiny_config(pipeline, tmp_path / "run", trainer={"steps": 500, "save_every": 0, "eval_every": 0})
    process = subprocess.Popen(
        [sys.executable, "-m", "mmrl", "train", str(write_config(tmp_path / "config.yaml", config))],
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = tmp_path / "run/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not lines.exists() or len(lines.read_text().splitlines()) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "mmrl resume" in error
    done = metrics(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step-{done:06d}/policy.safetensors").is_file()


def one_step(model, tmp_path, name, **changes):
    """Weights after one step of plain gradient descent, whose change is the gradient times the learning rate."""
    sgd = {"steps": 1, "lr": 1.0, "optimizer": "SGD", "max_grad_norm": None, "save_every": 0, "eval_every": 0}
    changes["trainer"] = sgd | changes.get("trainer", {})
    train(tiny_config(model, tmp_path / name, **changes))
    return weights(tmp_path / name, 1)


ALGORITHMS = {
    "sequence": {"kl_coef": 0.5},
    "token": {"aggregation": "token", "advantage": "batch"},
    "gspo": {"objective": "gspo"},
    "dpo": {"type": "dpo", "pairs": "ranked", "noise_draws": 2},
    "draft": {"type": "reward_backprop", "grad_steps": 2, "group_size": 4},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradient_does_not_depend_on_micro_batches(pipeline, tmp_path, name):
    algorithm = {"algorithm": ALGORITHMS[name]}
    whole = one_step(pipeline, tmp_path, "whole", **algorithm, trainer={"micro_batch_size": 8})
    cut = one_step(pipeline, tmp_path, "cut", **algorithm, trainer={"micro_batch_size": 2})
    start = load_file(pipeline / "transformer/diffusion_pytorch_model.safetensors")
    moved = max((whole[key] - start[key.removeprefix("transformer.")]).abs().max() for key in whole)
    worst = max((whole[key] - cut[key]).abs().max() for key in whole)
    assert moved > 1e-4
    assert worst <= 1e-6 * max(1.0, moved.item())


@pytest.mark.parametrize("name", ["token", "dpo"])
def test_gradient_does_not_depend_on_the_number_of_processes(pipeline, tmp_path, name):
    """Two gloo processes, each with half the prompts, take the step that one process takes."""
    changes = {"algorithm": ALGORITHMS[name]}
    sgd = {"steps": 2, "lr": 0.01, "optimizer": "SGD", "max_grad_norm": 1e9, "save_every": 1, "eval_every": 0}
    data = {"shuffle": False, "batch_size": 4}
    alone = tiny_config(pipeline, tmp_path / "alone", **changes, trainer=sgd, data=data)
    train(alone)
    together = tiny_config(pipeline, tmp_path / "together", **changes, trainer=sgd, data=data)
    config = write_config(tmp_path / "together.yaml", together)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    done = subprocess.run(
        [*command, "-m", "mmrl", "train", str(config)], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for step in (1, 2):
        one, two = weights(tmp_path / "alone", step), weights(tmp_path / "together", step)
        assert max((one[key] - two[key]).abs().max() for key in one) < 1e-6
    for line, other in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "together"), strict=True):
        for key in ("reward/mean", "reward/std", "eval/reward"):
            assert line.get(key) == pytest.approx(other.get(key), abs=1e-5)


def test_work_is_done_once(pipeline, tmp_path):
    """Every prompt is encoded once, every picture decoded once, and no forward is run without need."""
    steps, prompts, group, sampled, trained = 3, 2, 4, 4, 3
    summary = train(
        tiny_config(
            pipeline,
            tmp_path / "run",
            trainer={"steps": steps, "save_every": 0, "eval_every": 0},
            eval={"limit": 1},
        )
    )
    counted = summary["counters"]
    assert counted["prompts_encoded"] == 4
    rows = steps * prompts * group
    evaluated = 2
    assert counted["images_decoded"] == rows + evaluated
    # No forward for old log-probs, none for a reference.
    assert counted["network_rows"] == rows * (sampled + trained) + evaluated * sampled


def test_groups_without_signal_cost_no_forward(pipeline, tmp_path):
    constant = Path(tmp_path / "constant.py")
    constant.write_text("def score(images):\n    return [1.0] * len(images)\n")
    summary = train(
        tiny_config(
            pipeline,
            tmp_path / "run",
            rewards=[{"type": f"{constant}:score"}],
            trainer={"steps": 2, "save_every": 0, "eval_every": 0},
            eval={"limit": 1},
        )
    )
    lines = [line for line in metrics(tmp_path / "run") if "reward/mean" in line]
    assert all(line["groups/without_signal"] == 1.0 and line["updates"] == 0 for line in lines)
    assert summary["counters"]["network_rows"] == 2 * 2 * 4 * 4 + 2 * 4
    start = load_file(pipeline / "transformer/diffusion_pytorch_model.safetensors")
    end = weights(tmp_path / "run", 2)
    assert all(torch.equal(end[key], start[key.removeprefix("transformer.")]) for key in end)


def test_stages_chain(pipeline, tmp_path):
    """A supervised stage hands its weights to the next, whose reference they are."""
    pictures = tmp_path / "pictures.py"
    pictures.write_text(
        "import torch\nfrom mmrl import Prompt\n"
        "def rows():\n"
        "    return [Prompt(text=f'picture {i}', target=torch.full((3, 16, 16), i / 4)) for i in range(4)]\n"
    )
    config = tiny_config(pipeline, tmp_path / "run", algorithm={"kl_coef": 0.1})
    config["trainer"] |= {"save_every": 0, "eval_every": 0}
    config["stages"] = [
        {
            "name": "sft",
            "algorithm": {"type": "sft"},
            "data": {"prompts": f"{pictures}:rows"},
            "trainer": {"steps": 2},
        },
        {"name": "rl", "trainer": {"steps": 3, "ema": {"decay": 0.5}}},
    ]
    summary = train(config)
    assert summary["steps"] == 5
    lines = metrics(tmp_path / "run")
    held_out = {line["step"]: line["eval/reward"] for line in lines if "eval/reward" in line}
    assert [summary["eval"][when]["reward"] for when in ("before", "after")] == [held_out[0], held_out[5]]
    assert {name: found["reward"] for name, found in summary["eval"]["stages"].items()} == {
        "sft": held_out[2],
        "rl": held_out[5],
    }
    assert [(line["step"], line["stage"]) for line in lines if "loss" in line] == [
        (1, "sft"),
        (2, "sft"),
        (3, "rl"),
        (4, "rl"),
        (5, "rl"),
    ]
    after_sft = weights(tmp_path / "run", 2)
    reference = load_file(tmp_path / "run/checkpoints/step-000005/snapshot-reference.safetensors")
    assert all(torch.equal(after_sft[key], reference[key]) for key in after_sft)
    assert next(line for line in lines if line["step"] == 3)["kl"] == 0.0


def test_not_a_number_stops_the_run(pipeline, tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("def score(images):\n    return [float('nan')] * len(images)\n")
    config = tiny_config(pipeline, tmp_path / "run", rewards=[{"type": f"{broken}:score"}])
    config["eval"] = {"rewards": ["diversity"]}
    with pytest.raises(run.UserError, match="sample 0"):
        train(config)
