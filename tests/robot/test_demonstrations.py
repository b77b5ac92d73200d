"""Scripted experts, their knobs, and starts as prompts."""

import numpy as np
import pytest
import torch

from mmrl.data import load_prompts
from mmrl.errors import UserError
from pipelines.robot.demonstrations import demonstrations, starts
from pipelines.robot.envs import make_envs


def success(env: str, **knobs) -> float:
    """Share of 200 demonstrations that succeed."""
    kept = demonstrations(env, 200, 4, keep="success", options={"image": None}, **knobs)
    return len({prompt.id.split("-")[1] for prompt in kept}) / 200


def test_experts_succeed_and_their_knobs_weaken_them():
    for env, noisy, slow in (("planar:push", (0.25, 0.6), (0.6, 0.95)), ("planar:reach", (0.6, 0.9), (0.3, 0.65))):
        assert success(env) >= 0.99
        assert noisy[0] < success(env, noise=1.0) < noisy[1]
        assert slow[0] < success(env, slowness=0.6) < slow[1]


def test_turns_hold_what_was_seen_and_done():
    prompts = list(demonstrations("planar:reach", 3, 3, noise=0.3, seed=4, options={"image": 16}))
    again = list(demonstrations("planar:reach", 3, 3, noise=0.3, seed=4, options={"image": 16}))
    assert [prompt.id for prompt in prompts] == [prompt.id for prompt in again]
    envs = make_envs("planar:reach", 1, image=16)
    for mine, theirs in zip(prompts, again, strict=True):
        seen = mine.target["observation"]
        assert mine.target["actions"].shape == (3, 2)
        assert mine.target["actions"].equal(theirs.target["actions"])
        assert seen["state"].shape == (2,)
        assert seen["image"].equal(theirs.target["observation"]["image"])
    # Playing the recorded actions back from the same start gives the recorded observations.
    first = [prompt for prompt in prompts if prompt.id.startswith("demonstration-0-")]
    seen = envs.reset([first[0].metadata["seed"]])
    for prompt in first:
        assert prompt.text == seen.instruction[0]
        assert seen.state[0].equal(prompt.target["observation"]["state"])
        assert seen.image[0].equal(prompt.target["observation"]["image"])
        step = envs.step([0], prompt.target["actions"][None])
        seen = step.observation
    assert step.success.item()


def test_starts_of_different_splits_share_no_seed_and_know_their_instruction():
    train, evaluation = (starts("planar:reach", 300, split=split) for split in ("train", "eval"))
    seeds = [{prompt.inputs["seed"] for prompt in prompts} for prompts in (train, evaluation)]
    assert not seeds[0] & seeds[1]
    assert min(map(len, seeds)) == 300
    assert max(map(max, seeds)) < 2**31
    envs = make_envs("planar:reach", 300)
    assert envs.reset([prompt.inputs["seed"] for prompt in train]).instruction == [prompt.text for prompt in train]
    assert starts("planar:reach", 2, seed=1)[0].inputs != train[0].inputs
    assert starts("planar:reach", 2)[1].inputs == train[1].inputs


def test_they_are_data_of_a_config():
    options = {"env": "planar:push", "count": 5}
    prompts = load_prompts("pipelines.robot.demonstrations:starts", options=options)
    assert [prompt.id for prompt in prompts] == [f"train-{k}" for k in range(5)]
    options = {"env": "planar:push", "episodes": 2, "horizon": 4}
    turns = load_prompts("pipelines.robot.demonstrations:demonstrations", options=options)
    assert turns[0].target["actions"].shape == (4, 2)
    assert torch.isfinite(torch.stack([turn.target["actions"] for turn in turns])).all()


def test_what_cannot_be_demonstrated_is_one_sentence():
    with pytest.raises(UserError, match="env 'Pendulum-v1' has no scripted expert"):
        list(demonstrations("Pendulum-v1", 1, 4))
    with pytest.raises(UserError, match="none of 3 demonstrations of env 'planar:push' succeeded"):
        list(demonstrations("planar:push", 3, 4, noise=8.0, keep="success"))
    with pytest.raises(UserError, match=r"slowness is 2 and noise 0.0, but should be"):
        list(demonstrations("planar:push", 3, 4, slowness=2))


def test_meta_world_is_its_seed_bit_for_bit_and_its_experts_succeed():
    pytest.importorskip("metaworld")
    envs = make_envs("metaworld:push-v3", 2, processes=0, max_steps=150)
    plan = torch.from_numpy(np.random.default_rng(0).uniform(-1, 1, (2, 20, 4)).astype(np.float32))
    runs = []
    for seeds in ([5, 6], [6, 5]):
        seen = envs.reset(seeds)
        step = envs.step([0, 1], plan[[0, 0]])
        runs.append({seed: (seen.state[k], step.observation.state[k], step.rewards[k]) for k, seed in enumerate(seeds)})
    assert envs.state_dim == 39
    assert seen.instruction == ["push", "push"]
    assert not runs[0][5][0].equal(runs[0][6][0])
    for seed in (5, 6):
        for mine, theirs in zip(runs[0][seed], runs[1][seed], strict=True):
            assert mine.equal(theirs)
    envs.close()
    kept = list(demonstrations("metaworld:push-v3", 1, 10, keep="success", options={"max_steps": 150}))
    assert len(kept) < 12
    assert kept[0].text == "push"


def test_mujoco_pictures_are_each_its_own_environments():
    pytest.importorskip("mujoco")
    envs = make_envs("gymnasium:Reacher-v5", 3, processes=1, image=32)
    seen = envs.reset([1, 2, 1])
    assert seen.image.shape == (3, 3, 32, 32)
    assert seen.image[0].equal(seen.image[2])
    assert not seen.image[0].equal(seen.image[1])
    assert seen.image.float().std() > 5
    envs.close()


def test_goals_are_part_of_the_state_in_fetch():
    pytest.importorskip("gymnasium_robotics")
    pytest.importorskip("mujoco")
    envs = make_envs("FetchReach-v4", 1, processes=0)
    state = envs.reset([3]).state
    assert envs.state_dim == 3 + 3 + 10
    assert state[0, :3].equal(state[0, 6:9])  # achieved goal and place of the gripper
    assert envs.step([0], torch.zeros(1, 50, 4)).truncated.item()
    envs.close()
