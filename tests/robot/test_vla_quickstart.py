"""The VLA quickstart: the clone that is shipped, and that practice makes it quicker.

Full runs are in benchmarks/RESULTS.md; the margin here is about half of what a run of this length was seen to gain.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from mmrl import run
from mmrl.config import load_config
from mmrl.types import Samples
from pipelines import RobotPolicy
from pipelines.robot.demonstrations import demonstrations, starts

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quickstart" / "vla.yaml"
FOLDER = ROOT / "pipelines" / "quickstart" / "reach-vla"


def trained(tmp_path, *overrides):
    quiet = ("trainer.save_every=0", "trainer.tensorboard=false", "eval.record=0", "trainer.eval_every=0")
    return run.train(load_config(CONFIG, [f"run_dir={tmp_path / 'run'}", *quiet, *overrides]))["eval"]


def test_the_clone_is_small_and_explains_what_its_expert_did():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 1e6
    robot = RobotPolicy(RobotPolicy.load("builtin:reach-vla"), "planar:reach", envs=16)
    shown = list(demonstrations("planar:reach", 16, 2, noise=0.1, slowness=0.6, seed=99))
    with torch.no_grad():
        loss = robot.fit(Samples(prompts=shown), range(len(shown)))
    # Noise of 0.1 spread over bins 0.18 wide has an entropy of 0.83.
    assert 0.7 < loss.mean() < 1.1


def test_it_sees_what_the_instruction_means():
    robot = RobotPolicy(RobotPolicy.load("builtin:reach-vla"), "planar:reach", envs=200)
    prompts = starts("planar:reach", 200, "eval")
    seen = robot.envs.reset([prompt.inputs["seed"] for prompt in prompts])
    with torch.no_grad():
        context = robot.encoder(robot._normalised(seen))
        action = robot.head.sample(context, torch.zeros(200, 0), deterministic=True).actions[:, 0]
    table = robot.envs.backend.envs
    rows = np.arange(200)
    way = torch.from_numpy(table.goal(rows) - table.places[rows, 0])
    right = torch.cosine_similarity(action, way) > 0.9
    assert right.float().mean() > 0.85


@pytest.mark.slow
def test_practice_makes_it_quicker(tmp_path):
    found = trained(tmp_path, "trainer.steps=20", "eval.limit=200", "data.options.count=320")
    assert found["before"]["success"] > 0.35
    assert found["after"]["success"] > found["before"]["success"] + 0.12
