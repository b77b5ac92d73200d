"""Envs over any environment: chunks, ends, seeds, faults in and out of workers."""

from pathlib import Path

import pytest
import torch

from mmrl.errors import UserError
from pipelines.robot.envs import make_envs

HERE = Path(__file__).parent / "odd_envs.py"
WALK, SCENE, TOGETHER = (f"{HERE}:{name}" for name in ("Walk", "Scene", "together"))
WHERE = f"env '{WALK}', "


def actions(n: int, horizon: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, horizon, 2, generator=torch.Generator().manual_seed(seed)) * 4 - 2


def play(envs, seeds, horizon):
    """Whole episodes in chunks of ``horizon``: rewards, final states, ends."""
    plan = actions(len(seeds), 12)
    envs.reset(seeds)
    live, at = torch.arange(len(seeds)), 0
    rewards, final = torch.zeros(len(seeds), 12), torch.zeros(len(seeds), 3)
    ends = torch.zeros(len(seeds), 3, dtype=torch.bool)
    while len(live):
        step = envs.step(live, plan[live, at : at + horizon])
        rewards[live, at : at + horizon] = step.rewards
        final[live] = step.observation.state
        ends[live] = torch.stack([step.terminated, step.truncated, step.success], 1)
        live, at = live[~step.done], at + horizon
    return rewards, final, ends


@pytest.fixture(scope="module")
def workers():
    envs = make_envs(WALK, 5, processes=2, max_steps=6, timeout=2)
    yield envs
    envs.close()


def test_chunks_equal_single_steps_in_this_process_in_workers_and_in_a_vector_env(workers):
    seeds = [3, 8, 5, 14, 1]
    here = make_envs(WALK, 5, processes=0, max_steps=6)
    rewards, final, ends = play(here, seeds, 1)
    lengths = torch.tensor([min(seed % 7 + 2, 6) for seed in seeds])
    assert final[:, 1].equal(lengths.float())
    assert ends[:, 0].tolist() == [seed % 7 + 2 <= 6 for seed in seeds]
    assert ends[:, 1].equal(~ends[:, 0])
    assert rewards.equal(actions(5, 12)[..., 0] * (torch.arange(12) < lengths[:, None]))
    for envs, horizon in ((here, 4), (workers, 1), (workers, 4), (workers, 12)):
        for mine, theirs in zip(play(envs, seeds, horizon), (rewards, final, ends), strict=True):
            assert mine.equal(theirs)
    for mode in ("DISABLED", "NEXT_STEP"):
        whole = make_envs(f"vector:{TOGETHER}", 6, max_steps=6, mode=mode)
        for mine, theirs in zip(play(whole, seeds, 4), (rewards, final, ends), strict=True):
            assert mine.equal(theirs)


def test_a_seed_alone_decides_the_start_and_fewer_rows_than_there_are_may_run(workers):
    first = workers.reset([7, 7, 9]).state
    assert first.tolist() == [[7, 0, 0], [7, 0, 0], [9, 0, 0]]
    step = workers.step([2, 0], actions(2, 3))
    assert step.observation.state[:, 0].tolist() == [9, 7]
    assert step.executed.tolist() == [3, 2]
    assert step.info["steps"].tolist() == [3, 2]
    assert torch.equal(workers.reset([9]).state, first[2:])


def test_success_ends_an_episode_unless_told_otherwise():
    for end in (True, False):
        envs = make_envs(WALK, 1, processes=0, max_steps=9, success=True, end_on_success=end)
        envs.reset([1])
        step = envs.step([0], actions(1, 3))
        assert step.success.item()
        assert step.terminated.item() is end
        assert step.info.keys() == {"pace"}
        envs.close()


def test_nested_observations_become_state_image_and_instruction():
    envs = make_envs(SCENE, 2, processes=1, max_steps=4)
    seen = envs.reset([4, 6])
    assert envs.state_dim == 7
    assert envs.image_shape == (3, 5, 4)
    assert torch.allclose(seen.state[1], torch.tensor([0.1, 0.2, 0.3, 0.4, 0, 1, 0]))
    assert seen.image[0, :, 0, 1].tolist() == [1, 2, 3]
    assert seen.instruction == ["walk 4", "walk 6"]
    assert seen[[1]].instruction == ["walk 6"]
    assert len(seen[[1]]) == 1
    envs.close()


def test_rendered_pictures_are_observed_at_the_size_asked_for(workers):
    envs = make_envs(WALK, 1, processes=0, max_steps=6, image=8)
    envs.reset([3])
    step = envs.step([0], actions(1, 2))
    assert step.observation.image.equal(torch.full((1, 3, 8, 8), 2, dtype=torch.uint8))
    workers.reset([3, 3])
    assert workers.render([1]).shape == (1, 3, 4, 6)


def test_a_worker_that_fails_is_started_again_and_its_episodes_are_dropped(workers, caplog):
    said = {
        13: "row 1 (seed 13) failed in step: RuntimeError: the floor is wet",
        20: "worker of rows 1, 3 crashed with exit status 3",
        27: "worker of rows 1, 3 gave no answer in 2 s and was killed",
        34: "row 1 (seed 34) observed nan at entry 0 of its state; all should be finite",
        41: "row 1 (seed 41) observed shape (2,), but should observe (3,)",
    }
    for seed, sentence in said.items():
        workers.reset([3, seed, 4, 5])
        step = workers.step([0, 1, 2], actions(3, 3))
        assert step.dropped.tolist() == [False, True, False]
        assert step.executed.tolist() == [3, 0, 3]
        assert step.done.tolist() == [False, True, False]
        assert step.observation.state[1].tolist() == [0, 0, 0]
        assert workers.step([3], actions(1, 1)).dropped.tolist() == [True]  # it was in the same worker
        assert caplog.records.pop().message == f"{WHERE}{sentence}; it is started again, its episodes are dropped"
        assert workers.step([0, 2], actions(2, 6)).terminated.all()
        workers.reset([3, 3, 4, 5])
        assert workers.step([0, 1, 2, 3], actions(4, 6)).executed.tolist() == [5, 5, 6, 6]


def test_a_worker_that_fails_again_and_again_ends_the_run_with_its_sentence(workers):
    with pytest.raises(
        UserError, match=r"row 0 \(seed 55\) failed in reset: RuntimeError: no floor; .* failure 3 without"
    ):
        workers.reset([55, 3])
    assert workers.reset([3, 3]).state.tolist() == [[3, 0, 0], [3, 0, 0]]


def test_without_workers_a_fault_is_one_sentence():
    envs = make_envs(WALK, 2, processes=0, max_steps=6)
    said = {
        13: r"row 1 \(seed 13\) failed in step: RuntimeError: the floor is wet",
        34: r"row 1 \(seed 34\) observed nan at entry 0",
        41: r"row 1 \(seed 41\) observed shape \(2,\)",
    }
    for seed, sentence in said.items():
        envs.reset([3, seed])
        with pytest.raises(UserError, match=sentence):
            envs.step([0, 1], actions(2, 3))


def test_a_render_failure_is_one_sentence_and_loses_no_episode(workers):
    for envs in (workers, make_envs(WALK, 2, processes=0, max_steps=6)):
        envs.reset([3, 48])
        with pytest.raises(UserError, match=r"row 1 \(seed 48\) cannot be rendered: OSError: no screen"):
            envs.render([0, 1])
        assert envs.step([0, 1], actions(2, 1)).executed.tolist() == [1, 1]


def test_wrong_actions_are_one_sentence(workers):
    workers.reset([3, 4])
    with pytest.raises(UserError, match=r"got actions of shape \[2, 3\], but should get \[2, H, 2\]"):
        workers.step([0, 1], torch.zeros(2, 3))
    with pytest.raises(UserError, match=r"got actions of shape \[2, 1, 3\]"):
        workers.step([0, 1], torch.zeros(2, 1, 3))
    with pytest.raises(UserError, match=r"row 1 \(seed 4\) got nan as number 0 of action 1"):
        workers.step([0, 1], torch.tensor([0.0, 0, 0, 0, 0, 0, torch.nan, 0]).view(2, 2, 2))
    step = workers.step([0, 1], torch.full((2, 1, 2), 9.0))
    assert step.rewards.flatten().tolist() == [2, 2]  # clipped to the limits
    workers.step([0], actions(1, 6))
    with pytest.raises(RuntimeError, match="row 0 is over"):
        workers.step([0], actions(1, 1))
    with pytest.raises(UserError, match="has room for 1 to 5"):
        workers.reset(range(6))


@pytest.mark.parametrize(
    ("spec", "options", "sentence"),
    [
        ("planar:pusch", {}, r"there is no env 'planar:pusch' \(did you mean 'planar:push'\?\)"),
        ("planar:push", {"targts": 3}, r"unknown key 'targts' \(did you mean 'targets'\?\)"),
        ("Pendulm-v1", {}, r"there is no env 'Pendulm-v1' \(did you mean 'Pendulum-v1'\?\)"),
        ("CartPole-v1", {}, r"takes actions of Discrete\(2\)"),
        ("Pendulum-v1", {"colour": 3}, r"does not take its options \['colour'\]"),
        ("Pendulum-v1", {"max_steps": "x"}, "'max_steps' is 'x', but should be a whole number"),
        (WALK, {}, "has no time limit: give 'max_steps'"),
        (f"{HERE}:together", {"num_envs": 2}, "is a SyncVectorEnv, but should be a gymnasium.Env"),
        (f"vector:{WALK}", {"max_steps": 3}, "does not take its options"),
        (f"vector:{TOGETHER}", {"max_steps": 3, "mode": "SAME_STEP"}, "hides final observations"),
        ("nowhere:Walk", {}, "there is no module 'nowhere'"),
        ("planar:push", {"timeout": 0}, "timeout 0 and processes 0, but should be"),
    ],
)
def test_a_wrong_spec_or_option_is_one_sentence(spec, options, sentence):
    with pytest.raises(UserError, match=sentence):
        make_envs(spec, 2, processes=0, **options)


def test_a_worker_passes_on_what_is_wrong_with_the_config():
    with pytest.raises(UserError, match="has no time limit"):
        make_envs(WALK, 2, processes=2)


def test_missing_packages_name_the_extra(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "metaworld", None)
    monkeypatch.setitem(sys.modules, "metaworld.env_dict", None)
    with pytest.raises(UserError, match=r"needs the package metaworld.*: pip install 'mmrl\[robot\]'"):
        make_envs("metaworld:push-v3", 1, processes=0)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    monkeypatch.setitem(sys.modules, "gymnasium.envs.mujoco.hopper_v5", None)
    with pytest.raises(UserError, match=r"env 'Hopper-v5' needs a package that is missing.*mmrl\[robot\]"):
        make_envs("Hopper-v5", 1, processes=0)
