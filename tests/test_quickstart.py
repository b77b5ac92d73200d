"""The quickstart learns: shortened runs of the shipped configs, judged on held-out prompts by the exact verifier.

The full runs, three seeds each, are in benchmarks/RESULTS.md; margins here are about half of what a run of this length
was seen to gain, so that a broken gradient fails and a different seed does not.
"""

from pathlib import Path

import pytest

from mmrl import run
from mmrl.config import load_config

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart"


def learn(name, tmp_path, steps, *overrides):
    config = load_config(
        QUICKSTART / name,
        [
            f"run_dir={tmp_path / 'run'}",
            f"trainer.steps={steps}",
            "trainer.eval_every=0",
            "trainer.save_every=0",
            "trainer.tensorboard=false",
            "eval.samples_per_prompt=2",
            *overrides,
        ],
    )
    found = run.train(config)["eval"]
    return found["before"], found["after"]


@pytest.mark.slow
def test_flow_grpo_learns(tmp_path):
    before, after = learn("image.yaml", tmp_path, 40)
    assert after["shapes/mean"] > before["shapes/mean"] + 0.04
    # Diversity is the gauge of reward hacking: it must not pay for the score.
    assert after["diversity/mean"] > 0.7 * before["diversity/mean"]


@pytest.mark.slow
def test_online_dpo_learns(tmp_path):
    before, after = learn("image_dpo.yaml", tmp_path, 20)
    assert after["shapes/mean"] > before["shapes/mean"] + 0.02
    assert after["diversity/mean"] > 0.7 * before["diversity/mean"]


@pytest.mark.slow
def test_draft_learns(tmp_path):
    before, after = learn("image_draft.yaml", tmp_path, 20)
    assert after["shapes/mean"] > before["shapes/mean"] + 0.02
    assert after["diversity/mean"] > 0.7 * before["diversity/mean"]
