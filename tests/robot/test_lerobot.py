"""What comes from the LeRobot project: its environments, which run as gymnasium ids."""

import pytest
import torch

from mmrl.errors import UserError
from mmrl.types import Prompt
from pipelines.robot.envs import make_envs
from pipelines.robot.policy import RobotPolicy

PUSHT = "gym_pusht/PushT-v0"


@pytest.mark.parametrize("options", [{}, {"obs_type": "pixels_agent_pos"}, {"image": 32}])
def test_pusht_runs_by_its_id(options):
    pytest.importorskip("gym_pusht")
    envs = make_envs(PUSHT, 2, processes=0, max_steps=4, **options)
    assert envs.action_low.tolist() == [0, 0]
    assert envs.action_high.tolist() == [512, 512]
    seen, again = envs.reset([3, 3]), envs.reset([3, 4])
    assert torch.equal(seen.state[0], seen.state[1])
    assert torch.equal(seen.state[0], again.state[0])
    assert not torch.equal(again.state[0], again.state[1])
    assert seen.state.shape == (2, 2 if "obs_type" in options else 5)
    assert (None if seen.image is None else seen.image.shape[1:]) == {
        "obs_type": (3, 96, 96),
        "image": (3, 32, 32),
    }.get(next(iter(options), ""))
    step = envs.step([0, 1], torch.full((2, 4, 2), 256.0))
    assert step.truncated.all()
    assert ((step.rewards >= 0) & (step.rewards <= 1)).all()
    assert torch.equal(step.info["coverage"] > 0.95, step.success)
    # The hand has gone to where it was sent.
    hand = step.observation.state[:, :2]
    assert (hand - 256).abs().max() < (again.state[:, :2] - 256).abs().max()


def test_a_policy_on_pusht_replays_exactly():
    pytest.importorskip("gym_pusht")
    torch.manual_seed(0)
    head = {"type": "flow", "hidden": [16], "step": "flow_sde"}
    made = RobotPolicy("mlp", PUSHT, head, horizon=4, envs=4, env_options={"processes": 0, "max_steps": 8})
    rollout = made.rollout([Prompt(id="a", text="push the T", inputs={"seed": 1})], 4, seed=0)
    assert torch.equal(made.decisions(rollout).logp, rollout.logp)


def test_a_missing_package_is_named():
    with pytest.raises(UserError, match=r"no env 'gym_nowhere/PushT-v0'.*; those of gym_nowhere need that package"):
        make_envs("gym_nowhere/PushT-v0", 1, processes=0)
