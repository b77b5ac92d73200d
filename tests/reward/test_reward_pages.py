"""The page about rewards of texts: its configs are valid, its tables complete."""

import re
from pathlib import Path

import pytest

from mmrl.components import reward_component
from mmrl.data import load_prompts
from rewards import REWARDS
from rewards.geometry import Frame

PAGE = (Path(__file__).parents[2] / "docs" / "text-rewards.md").read_text(encoding="utf-8")


def test_configs_are_valid():
    yaml = pytest.importorskip("yaml")
    sections = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]
    assert len(sections) == 3
    for section in sections:
        for number, item in enumerate(section["rewards"]):
            reward_component(item, where="docs/text-rewards.md", path=f"rewards.{number}", folders=[])


def test_puzzles_of_the_page(tmp_path):
    yaml = pytest.importorskip("yaml")
    (block,) = (b for b in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL) if "puzzles" in b)
    data = yaml.safe_load(block)["data"]
    options = data["options"] | {"folder": None, "count": 1, "side": 48, "save_to": str(tmp_path)}
    assert len(load_prompts(data["prompts"], options=options)) == 1


def test_tables():
    table = PAGE.split("## The truth")[1].split("## Frames")[0]
    named = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", table, flags=re.MULTILINE))))
    with_truth = {
        name
        for name, (target, _) in REWARDS.items()
        if re.match(r"rewards\.(geometry_|answers|math_answers|text_overlap|render)", target)
    }
    assert named == with_truth
    frames = PAGE.split("## Frames")[1].split("## Length")[0]
    assert set(re.findall(r"^\| `(\w+)`", frames, flags=re.MULTILINE)) == set(Frame.__args__)
