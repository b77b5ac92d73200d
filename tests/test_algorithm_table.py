"""The tables of algorithms and modalities: no cell missing, nothing in them that is not so."""

import pytest
from cells import PAGES, recorded, train, with_table
from tiny_run import save_pipeline, tiny_config

from mmrl import run
from mmrl.config import parse_config
from mmrl.coverage import defined, marks, numbers, place, refusal, risen
from mmrl.registry import ALGORITHMS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_has_the_table_of_what_is_recorded(page):
    assert page.read_text(encoding="utf-8") == with_table(page, PAGES[page](recorded())), "python tests/cells.py"


def test_no_cell_is_missing_and_none_is_recorded_that_is_not_defined():
    found = defined(recorded())
    assert [(name, modality) for name, cells in found.items() for modality, runs in cells.items() if not runs] == []
    assert {name: set(cells) for name, cells in recorded().items()} == {
        name: set(cells) for name, cells in found.items() if cells
    }


def test_a_refusal_says_why():
    assert refusal("diffusion_nft", "robot") is None
    assert "forward process" in refusal("diffusion_nft", "vlm")
    assert "Gaussian" in refusal("flow_dppo", "vlm")


def test_an_algorithm_takes_the_pipeline_that_offers_its_verbs():
    assert place("grpo", "robot") == ("robot", None)
    assert place("residual_rl", "robot") == ("residual_robot", None)
    pipeline, reason = place("residual_rl", "image")
    assert pipeline == "diffusion"
    assert "residual_robot" in reason


def test_a_reward_counts_as_risen_beyond_two_standard_errors():
    assert risen(0.5, 0.53, 0.01)
    assert not risen(0.5, 0.52, 0.011)
    gains = {"grpo": {"image": [0.5, 0.53, 0.01], "video": [0.5, 0.52, 0.011]}}
    assert defined(gains)["grpo"] == {"image": True, "video": False, "VLM": False, "robot": False}
    assert "| `grpo` | 0.500 → 0.530 | missing | missing | missing |" in numbers(gains)
    assert "| `grpo` | ✓ | missing | missing | missing |" in marks(gains)
    assert "| `grpo_guard` | missing | missing | – | missing |" in marks(gains)


def test_tables_have_a_row_for_each_algorithm():
    for table in (numbers({}), marks({})):
        rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
        assert rows == [f"`{name}`" for name in ALGORITHMS]


@pytest.mark.parametrize("name", ["grpo", "rwr"])
def test_a_cell_can_be_trained_again(name):
    assert train(name, "robot") == pytest.approx(recorded()[name]["robot"], abs=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "modality"), [("rloo", "image"), ("dgpo", "video"), ("nft", "VLM"), ("diffusion_nft", "robot")]
)
def test_cells_learn(name, modality):
    assert risen(*train(name, modality))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["awm", "crd"])
def test_a_config_trains_on_the_forward_process(tmp_path, name):
    config = tiny_config(save_pipeline(tmp_path / "sd3"), tmp_path / "run", pipeline={"step": "ode", "num_steps": 2})
    config["algorithm"] = {"type": name, "group_size": 8, "noise_draws": 2}
    config["trainer"] |= {"steps": 8, "lr": 5e-3, "save_every": 0, "eval_every": 0}
    found = run.train(parse_config(config))["eval"]
    assert found["after"]["reward"] > found["before"]["reward"]
