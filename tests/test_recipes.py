"""The recipes in configs/: `mmrl check` accepts each, and the rows that come with it suit its rewards."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from mmrl.checks import check
from mmrl.components import build_scorer
from mmrl.config import load_config
from mmrl.types import Samples

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [path for kind in ("image", "video", "vlm") for path in sorted(CONFIGS.glob(f"{kind}/*.yaml"))]
ROBOTS = sorted(CONFIGS.glob("robot/*.yaml"))
PAGE = (CONFIGS.parent / "docs" / "vlms.md").read_text(encoding="utf-8")


def checked(path):
    """The config, and the prompts of its only stage."""
    # Large pictures take long to draw, and one shows as much as 64.
    drawn = "mmrl.world.details" in path.read_text(encoding="utf-8")
    config = load_config(path, ["data.options.count=1"] if drawn else [])
    (found,) = check(config)
    return config, found.train


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_accepted(path):
    config, prompts = checked(path)
    assert prompts
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", config.pipeline.options["model"])
    head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8")).group()
    assert "arXiv" in head


@pytest.mark.parametrize("path", ROBOTS, ids=lambda path: path.stem)
def test_robot_recipes_are_accepted(path):
    text = path.read_text(encoding="utf-8")
    if "pipelines.robot.demonstrations" in text:
        pytest.importorskip("metaworld")
    overrides = ["stages.0.data.options.episodes=1"] if "stages:" in text else []
    for plan in check(load_config(path, overrides)):
        assert plan.train
    assert "arXiv" in re.match(r"(#.*\n)+", text).group()


def as_model_says(value, factor):
    """A row's truth, with coordinates in the frame that the model counts in."""
    if isinstance(value, dict):
        said = {key: as_model_says(item, factor) for key, item in value.items()}
        if "action" in value and "bbox" in value:
            left, top, right, bottom = said.pop("bbox")
            said["point"] = [(left + right) / 2, (top + bottom) / 2]
        return said
    if isinstance(value, list):
        return [as_model_says(item, factor) for item in value]
    return value * factor if isinstance(value, (int, float)) else value


@pytest.mark.parametrize(
    "path",
    # Rows of pairs bring their answers, which no reward looks at.
    [path for path in sorted(CONFIGS.glob("vlm/*.yaml")) if "source: offline" not in path.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_rows_of_vlm_recipes_suit_their_rewards(path):
    config, prompts = checked(path)
    (stage,) = config.stages
    # That one looks at dialogues.
    rewards = [reward for reward in stage.rewards if reward.type != "tool_use"]
    scorer = build_scorer(rewards)
    frames = {reward.options.get("frame") for reward in rewards}
    sizes, right = [], []
    for prompt in prompts:
        pictures = [p if isinstance(p, Image.Image) else Image.open(p) for p in prompt.images]
        sizes.append([(picture.height, picture.width) for picture in pictures])
        answer = as_model_says(prompt.target, 1000 / pictures[0].width if "thousand" in frames else 1)
        answer = prompt.metadata.get("response", answer) if "thousand" not in frames else answer
        answer = answer if isinstance(answer, str) else json.dumps(answer)
        thinking = all(reward.options.get("thinking", True) for reward in rewards)
        right.append(f"<think>I look.</think><answer>{answer}</answer>" if thinking else answer)

    def total(texts):
        count = len(prompts)
        lengths, group = torch.full((count,), 8), torch.arange(count)
        truncated = torch.zeros(count, dtype=torch.bool)
        return scorer(
            Samples(prompts=prompts, texts=texts, truncated=truncated, lengths=lengths, sizes=sizes, group=group)
        ).total

    wrong = total(["<think>I look.</think><answer>no idea</answer>"] * len(prompts))
    assert (total(right) > wrong + 0.5).all()


def test_the_page_lists_the_robot_recipes():
    page = (CONFIGS.parent / "docs" / "robots.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`robot/(\w+)\.yaml`", page)) == {path.stem for path in ROBOTS}


def test_the_page_lists_the_vlm_recipes():
    section = PAGE.split("\n## Recipes\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)\.yaml`", section)) == {path.stem for path in CONFIGS.glob("vlm/*.yaml")}
