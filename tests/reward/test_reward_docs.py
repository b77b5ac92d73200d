"""The page about rewards says what is there, and its examples run."""

import re
from pathlib import Path

import pytest
import torch

from mmrl.types import Prompt, Samples
from rewards import REWARDS, differentiable_rewards, load_reward

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")


def test_table_lists_every_reward():
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\| (yes|no) \|$", PAGE, flags=re.MULTILINE))
    assert set(rows) == set(REWARDS)
    assert {name for name, gradient in rows.items() if gradient == "yes"} == set(differentiable_rewards())


def test_examples_run(samples, tmp_path):
    first, *own = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    exec(compile(first, "docs/rewards.md", "exec"), {"samples": samples})
    path = tmp_path / "page.py"
    path.write_text("\n".join(own))
    red = torch.zeros(1, 3, 2, 2)
    red[:, 0] = 1
    assert load_reward(f"{path}:redness", strength=2.0)(Samples([Prompt()], images=red)).item() == 2
    texts = Samples([Prompt(metadata={"answer": "a b"}), Prompt()], texts=["a b", "c"])
    assert load_reward(f"{path}:exact_answer")(texts)[0] == 1
    assert load_reward(f"{path}:WordCount", unit="letters")(texts) == [3.0, 1.0]


def test_config_of_the_page_is_valid(tmp_path):
    yaml = pytest.importorskip("yaml")
    from mmrl.components import reward_component

    (tmp_path / "my_rewards.py").write_text("def no_text(samples):\n    return [0.0] * len(samples)\n")
    section = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[1])
    for number, item in enumerate(section["rewards"]):
        reward_component(item, where="docs/rewards.md", path=f"rewards.{number}", folders=[tmp_path])
