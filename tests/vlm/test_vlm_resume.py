"""A VLM run that is stopped and resumed equals one that is not, with several updates a step and a replay buffer."""

import json
import shutil

import torch
from safetensors.torch import load_file
from table_policy import lines
from zoo.vlms import build_vlm

from mmrl import checkpoints, run
from mmrl.config import parse_config

REWARD = """def vowels(samples):
    return [float(sum(letter in "aeiou" for letter in text) % 2) for text in samples.texts]
"""


def test_resume_is_bit_exact_with_a_replay_buffer(tmp_path):
    from PIL import Image

    model, processor = build_vlm("qwen2_5_vl")
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    Image.new("RGB", (56, 56), "red").save(tmp_path / "red.png")
    (tmp_path / "rewards.py").write_text(REWARD)
    rows = [{"text": "what colour?", "image": str(tmp_path / "red.png")}, {"text": "count"}, {"text": "name it"}]
    config = {
        "seed": 3,
        "pipeline": {"type": "vlm", "model": str(tmp_path / "model"), "max_new_tokens": 5, "batch_size": 4},
        "data": {"prompts": rows, "batch_size": 2},
        "rewards": [{"type": f"{tmp_path / 'rewards.py'}:vowels"}],
        "algorithm": {"type": "grpo", "group_size": 4, "kl_coef": 0.1, "epochs": 2, "minibatches": 2, "replay": {}},
        "trainer": {"steps": 4, "lr": 1e-3, "save_every": 2, "device": "cpu", "tensorboard": False},
        "eval": {"limit": 1},
    }
    for name in ("straight", "stopped"):
        run.train(parse_config(config | {"run_dir": str(tmp_path / name)}))
    first, last = checkpoints.checkpoints(tmp_path / "stopped")
    state = json.loads((first / "state.json").read_text())["training"]["algorithm"]
    assert state["replay"][0]["tokens"]
    shutil.rmtree(last)
    run.resume(tmp_path / "stopped")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "straight")
    other = checkpoints.checkpoints(tmp_path / "straight")[-1]
    for file in sorted(other.glob("*.safetensors")):
        one, two = load_file(file), load_file(last / file.name)
        assert all(torch.equal(one[key], two[key]) for key in one), file.name
