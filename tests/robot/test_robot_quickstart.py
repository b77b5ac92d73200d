"""The robot quickstart: a clone that fails more often than not, and practice that mends it.

Full runs of three seeds are in benchmarks/RESULTS.md.
"""

from pathlib import Path

import pytest

from mmrl import run
from mmrl.config import load_config
from mmrl.metrics import read_metrics

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart" / "robot.yaml"


@pytest.mark.slow
def test_practice_mends_a_weak_clone(tmp_path):
    short = ["stages.0.trainer.steps=600", "stages.1.trainer.steps=15", "stages.1.trainer.eval_every=0"]
    quiet = ["eval.limit=200", "trainer.tensorboard=false", "stages.1.trainer.save_every=0"]
    summary = run.train(load_config(CONFIG, [f"run_dir={tmp_path / 'run'}", *short, *quiet]))
    cloned = next(
        line for line in read_metrics(tmp_path / "run") if line["step"] == 600 and "eval/success/mean" in line
    )
    assert cloned["eval/success/mean"] <= 0.45
    assert summary["eval"]["after"]["success"] >= cloned["eval/success/mean"] + 0.1
