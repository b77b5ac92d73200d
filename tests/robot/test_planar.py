"""The planar family: physics, seeds, ends, pictures, experts, gymnasium's contract."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from mmrl.errors import UserError
from mmrl.world.drawing import draw
from mmrl.world.scenes import COLOURS, SHAPES, Object, Scene
from pipelines.robot.envs import make_envs
from pipelines.robot.planar import PlanarPush, PlanarReach
from pipelines.robot.planar.base import APART, GRIPPER_RADIUS, TARGET_SIZE, TOLERANCE, WALL, length
from pipelines.robot.planar.chance import normals, permutations, uniforms
from pipelines.robot.planar.push import CONTACT, PUCK_RADIUS

TASKS = pytest.mark.parametrize("kind", [PlanarPush, PlanarReach])


def started(kind, count, **options):
    env = kind(count, **options)
    env.restart(np.arange(count), range(count))
    return env, np.arange(count)


def walk(env, rows, steps, seed=0):
    """Random actions for running rows."""
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (len(rows), 2)).astype(np.float32)
        before = env.places[rows].copy()
        yield before, actions, env.advance(rows, actions)


def test_chance_is_uniform_normal_and_of_its_own_seed_alone():
    seeds = np.arange(4000)
    drawn = uniforms(seeds, 5)
    assert 0 <= drawn.min() < drawn.max() < 1
    assert np.abs(np.histogram(drawn, 20, (0, 1))[0] / drawn.size - 0.05).max() < 0.006
    related = np.corrcoef(np.c_[drawn, uniforms(seeds, 5, stream=1), np.roll(drawn, 1, axis=0)].T)
    assert np.abs(related - np.eye(15)).max() < 0.06
    assert np.array_equal(uniforms(seeds[[7, 3]], 5), drawn[[7, 3]])
    assert np.array_equal(normals(seeds[[7, 3]], 3), normals(seeds, 3)[[7, 3]])
    gauss = normals(seeds, 5)
    assert abs(gauss.mean()) < 0.03
    assert abs(gauss.std() - 1) < 0.02
    assert (np.sort(permutations(seeds, 6), 1) == np.arange(6)).all()
    assert np.abs(np.bincount(permutations(seeds, 4)[:, 0]) / 4000 - 0.25).max() < 0.04


@TASKS
def test_things_start_apart_from_one_another_and_from_the_walls(kind):
    env, _ = started(kind, 500, targets=3)
    points = np.concatenate([env.places, env.goals], 1)
    assert np.abs(points).max() <= 1 - WALL
    gaps = length(points[:, :, None] - points[:, None]) + 4 * np.eye(points.shape[1])
    assert gaps.min() >= APART
    assert np.bincount(env.meant, minlength=3).min() > 120


def test_the_puck_moves_only_by_touch_and_nothing_overlaps_or_leaves_the_table():
    env, rows = started(PlanarPush, 300, max_steps=1000)
    touched = 0
    for before, actions, _ in walk(env, rows, 200):
        gripper, puck = env.places[:, 0], env.places[:, 1]
        assert length(puck - gripper).min() > CONTACT - 1e-5
        assert np.abs(gripper).max() <= 1
        assert np.abs(puck).max() <= 1 - PUCK_RADIUS + 1e-6
        moved = length(puck - before[:, 1]) > 0
        aimed = np.clip(before[:, 0] + np.float32(env.speed) * actions, -1, 1)
        assert (length(before[:, 1] - aimed)[moved] < CONTACT).all()
        assert (length(puck - before[:, 1]) <= env.speed * np.sqrt(2) + 1e-6).all()
        touched += moved.sum()
    assert touched > 100


def test_a_push_through_the_centre_is_a_straight_line():
    env, rows = started(PlanarPush, 1)
    env.places[0] = [[-0.5, 0.2], [-0.25, 0.2]]
    env.goals[0] = [[0.3, 0.2]]
    for step in range(1, 6):
        env.advance(rows, np.array([[1.0, 0.0]]))
        assert np.allclose(env.places[0, 1], [-0.5 + 0.1 * step + CONTACT, 0.2], atol=1e-6)


@TASKS
def test_an_episode_is_the_same_bit_for_bit_in_any_company(kind):
    options = {"image": 24, "targets": 3, "reward": "shaped", "max_steps": 12}
    seeds = [5, 2**40 + 1, 5, 9, 123456789, 77]
    plan = np.random.default_rng(1).uniform(-1, 1, (12, 6, 2)).astype(np.float32)
    plan[:, 2] = plan[:, 0]

    def play(order, room):
        envs = make_envs(f"planar:{kind.__name__[6:].lower()}", room, **options)
        first = envs.reset([seeds[k] for k in order])
        step = envs.step(range(len(order)), torch.from_numpy(plan[:, order].transpose(1, 0, 2).copy()))
        pictures = envs.render(range(len(order)))
        last = step.observation
        return [first.state, first.image, last.state, last.image, step.rewards, step.executed, pictures], [
            *first.instruction,
            *last.instruction,
        ]

    whole, texts = play(range(6), 6)
    for tensor in whole:
        assert tensor[0].equal(tensor[2])
    for order, room in (([4], 1), ([3, 1, 5], 200), ([5, 4, 3, 2, 1, 0], 6)):
        some, told = play(order, room)
        for mine, theirs in zip(some, whole, strict=True):
            assert mine.equal(theirs[order])
        assert told[: len(order)] == [texts[k] for k in order]


def test_success_terminates_and_the_time_limit_truncates_and_finished_rows_stay():
    envs = make_envs("planar:reach", 64, image=None, max_steps=5, speed=0.2)
    env = envs.backend.envs
    envs.reset(range(64))
    offset = env.goal(np.arange(64)) - env.places[:, 0]
    needed = np.maximum(np.ceil((length(offset) - TOLERANCE + 1e-6) / 0.2), 1).astype(int)
    heading = offset / length(offset)[:, None]
    plan = torch.from_numpy(np.repeat(heading[:, None], 8, 1))
    step = envs.step(range(64), plan)
    reached = torch.from_numpy(needed <= 5)
    assert 10 < reached.sum() < 60
    assert step.terminated.equal(reached)
    assert step.success.equal(reached)
    assert step.truncated.equal(~reached)
    assert step.executed.tolist() == np.minimum(needed, 5).tolist()
    assert step.rewards.sum(1).equal(reached.float())
    assert step.rewards[reached].argmax(1).equal(step.executed[reached] - 1)
    assert env.steps.tolist() == step.executed.tolist()
    assert step.info["distance"][reached].max() < TOLERANCE
    with pytest.raises(RuntimeError, match="is over and has to be reset"):
        envs.step([3], plan[:1])


@TASKS
def test_shaped_rewards_sum_to_the_potential_gained_and_sparse_ones_to_success(kind):
    env, rows = started(kind, 50, reward="shaped", targets=1, max_steps=1000)
    start, total = env._potential(rows), np.zeros(50)
    success = np.zeros(50)
    for _, _, (rewards, terminated, _, info) in walk(env, rows, 30):
        total += rewards
        success += info["success"]
        assert (terminated == info["success"]).all()
    assert np.allclose(total, env._potential(rows) - start + success, atol=1e-4)


def test_pictures_equal_those_of_the_shapes_world():
    env, rows = started(PlanarReach, 40, targets=4, named_by="both", image=32)
    pictures = env.observe(rows)["image"]
    for row in rows:
        things = [
            Object(SHAPES[s], list(COLOURS)[c], (x + 1) / 2, (y + 1) / 2, TARGET_SIZE / 2)
            for s, c, (x, y) in zip(env.shapes[row], env.colours[row], env.goals[row].astype(float), strict=True)
        ]
        whole = draw([Scene(tuple(things))], 32)[0].numpy()
        seen = pictures[row] / 255
        x, y = (env.places[row, 0] + 1) / 2 * 32
        grid = np.arange(32) + 0.5
        away = np.hypot(grid[None] - x, grid[:, None] - y) > GRIPPER_RADIUS * 16 + 1
        assert np.abs(seen - whole)[:, away].max() <= 1 / 255
        assert seen[:, int(y), int(x)].max() < 0.5
    assert env.draw(rows[:2], 50).shape == (2, 3, 50, 50)


def test_instructions_name_one_target_alone():
    for named_by in ("colour", "shape", "both"):
        env, rows = started(PlanarReach, 200, targets=4, named_by=named_by, image=None)
        for row, text in zip(rows, env.instructions(rows), strict=True):
            things = [(list(COLOURS)[c], SHAPES[s]) for c, s in zip(env.colours[row], env.shapes[row], strict=True)]
            names = {
                "colour": [f"the {colour} one" for colour, _ in things],
                "shape": [f"the {shape}" for _, shape in things],
                "both": [f"the {colour} {shape}" for colour, shape in things],
            }[named_by]
            assert len(set(names)) == 4
            assert text == f"reach {names[env.meant[row]]}"
        assert env.observe(rows[:3])["state"].shape == (3, 2)  # the state does not tell the target


@TASKS
def test_it_is_a_gymnasium_vector_env_without_autoreset(kind):
    env = kind(3, image=16, targets=2)
    assert env.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    seen, _ = env.reset(seed=[4, 5, 6])
    assert env.observation_space.contains(seen)
    again, _ = env.reset(seed=4)
    assert np.array_equal(seen["state"], again["state"])
    seen, rewards, terminated, truncated, info = env.step(env.action_space.sample())
    assert env.observation_space.contains(seen)
    assert rewards.shape == terminated.shape == truncated.shape == info["success"].shape == (3,)
    kept = env.places[[0, 2]].copy()
    env.reset(seed=[9, 5, 9], options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(env.places[[0, 2]], kept)
    assert env.steps.tolist() == [1, 0, 1]
    assert env.render()[0].shape == (96, 96, 3)


def test_wrong_options_are_one_sentence():
    for options, sentence in (
        ({"targets": 9}, "'targets' is 9, but should be 1 to 5"),
        ({"image": 3}, "'image' is 3, but should be"),
        ({"reward": "dense"}, "'reward' is 'dense', but should be 'sparse' or 'shaped'"),
    ):
        with pytest.raises(UserError, match=sentence):
            make_envs("planar:push", 2, **options)
