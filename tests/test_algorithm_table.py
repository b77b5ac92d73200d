"""The page's table of algorithms and modalities: no cell missing, nothing in it that is not so."""

import json

import pytest
from cells import BEGIN, END, PAGE, RESULTS, train
from tiny_run import save_pipeline, tiny_config

from mmrl import run
from mmrl.config import parse_config
from mmrl.coverage import refusal, refusals, table


def test_the_page_has_the_table_of_the_registry():
    text = PAGE.read_text(encoding="utf-8")
    assert text.split(BEGIN)[1].split(END)[0].strip() == table(json.loads(RESULTS.read_text())), "python tests/cells.py"


MISSING = {("kto", "video")}
"""Forty steps did not raise the reward there; the table says so."""


def test_no_other_cell_is_missing():
    gains = json.loads(RESULTS.read_text())
    found = set()
    for name, why in refusals().items():
        for modality in (modality for modality, reason in why.items() if reason is None):
            before, after = gains[name].get(modality, (0.0, 0.0))
            found |= {(name, modality)} if after <= before else set()
    assert found == MISSING


def test_a_refusal_says_why():
    assert refusal("diffusion_nft", "robot") is None
    assert "forward process" in refusal("diffusion_nft", "VLM")
    assert "Gaussian" in refusal("flow_dppo", "VLM")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modality"),
    [
        ("raft", "image"),
        ("dgpo", "video"),
        ("nft", "VLM"),
        ("prdp", "VLM"),
        ("diffusion_nft", "robot"),
        ("rwr", "robot"),
    ],
)
def test_cells_learn(name, modality):
    before, after = train(name, modality)
    assert after > before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awm", "crd"])
def test_a_config_trains_on_the_forward_process(tmp_path, name):
    config = tiny_config(save_pipeline(tmp_path / "sd3"), tmp_path / "run", pipeline={"step": "ode", "num_steps": 2})
    config["algorithm"] = {"type": name, "group_size": 8, "noise_draws": 2}
    config["trainer"] |= {"steps": 8, "lr": 5e-3, "save_every": 0, "eval_every": 0}
    found = run.train(parse_config(config))["eval"]
    assert found["after"]["reward"] > found["before"]["reward"]
