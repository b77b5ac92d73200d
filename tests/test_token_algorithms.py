"""Every policy-gradient algorithm on a real, tiny categorical policy: it learns, and its gradient is well defined."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from table_policy import TablePolicy, table_config

from mmrl import run
from mmrl.config import parse_config
from mmrl.errors import UserError
from mmrl.registry import ALGORITHMS

POLICY_GRADIENT = [
    name
    for name, entry in ALGORITHMS.items()
    if entry.target.endswith(":PolicyGradient") and name not in ("grpo_guard", "flow_dppo")
]
OPTIONS = {
    "reinforce": {"group_size": 8},
    "reinforce_plus_plus": {"group_size": 8, "epochs": 2},
    "remax": {"group_size": 8},
    "ppo": {"group_size": 8, "epochs": 2},
    # The lead of the best of many is small.
    "pass_at_k": {"group_size": 16},
}


def train(config):
    return run.train(parse_config(config))


def lines(run_dir):
    found = [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith("time/") and not k.endswith("seconds")} for line in found
    ]


def rewards(run_dir):
    return [line["reward/mean"] for line in lines(run_dir) if "reward/mean" in line]


def weights(run_dir, step):
    return load_file(Path(run_dir) / "checkpoints" / f"step-{step:06d}" / "policy.safetensors")


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_learns(tmp_path, name):
    """Twelve steps raise the share of right words of sampled answers well beyond the 1/6 of chance."""
    algorithm = {"type": name, **OPTIONS.get(name, {})}
    train(table_config(tmp_path / "run", algorithm))
    found = rewards(tmp_path / "run")
    assert found[0] < 0.2
    assert sum(found[-3:]) / 3 > found[0] + 0.2, found
