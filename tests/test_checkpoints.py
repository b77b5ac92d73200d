"""Checkpoints: exact round trips, and whole or absent whenever the writer dies."""

import os
import random
import signal
import time

import pytest
import torch
from torch import nn

from mmrl import checkpoints
from mmrl.checkpoints import TrainingState
from mmrl.errors import UserError
from mmrl.optim import build_optimizer
from mmrl.policy import Parameters


def make(seed=0, optimizer="AdamW", options=None):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1))
    parameters = Parameters(dict(model.named_parameters()))
    return model, parameters, build_optimizer(optimizer, parameters, lr=1e-2, options=options or {})


def train(model, optimizer, steps, start=0):
    for step in range(start, start + steps):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    ("name", "options"),
    [("AdamW", {}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9}), ("Adafactor", {}), ("RMSprop", {})],
)
def test_training_goes_on_bit_for_bit(tmp_path, name, options):
    straight, straight_parameters, optimizer = make(optimizer=name, options=options)
    straight_parameters.take_snapshot("average")
    train(straight, optimizer, 6)

    first, parameters, optimizer = make(optimizer=name, options=options)
    parameters.take_snapshot("average")
    train(first, optimizer, 3)
    saved = checkpoints.save(tmp_path, parameters, optimizer, TrainingState(step=3, updates=3, seconds=1.5))

    second, parameters, optimizer = make(seed=1, optimizer=name, options=options)
    state = checkpoints.load(saved, parameters, optimizer)
    assert state == TrainingState(step=3, updates=3, seconds=1.5)
    for key, copy in parameters.snapshots["average"].items():
        assert torch.equal(copy, straight_parameters.snapshots["average"][key])
    train(second, optimizer, 3, start=3)
    for a, b in zip(straight.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_the_newest_are_kept(tmp_path):
    _, parameters, optimizer = make()
    for step in (1, 2, 10, 1_000_000):
        checkpoints.save(tmp_path, parameters, optimizer, TrainingState(step=step), keep=2)
    assert [path.name for path in checkpoints.checkpoints(tmp_path)] == ["step-000010", "step-1000000"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.startswith(".")] == []


def test_a_kill_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path):
    """A child saves without pause; it is killed 20 times at random moments and its newest checkpoint must load."""
    draw = random.Random(0)
    _, parameters, optimizer = make()
    train_model, train_parameters, train_optimizer = make(seed=3)
    train(train_model, train_optimizer, 1)
    checkpoints.save(tmp_path, train_parameters, train_optimizer, TrainingState(step=0), keep=2)
    seen = 0
    for _ in range(20):
        child = os.fork()
        if child == 0:
            step = checkpoints.read_state(checkpoints.checkpoints(tmp_path)[-1]).step
            while True:
                step += 1
                checkpoints.save(tmp_path, train_parameters, train_optimizer, TrainingState(step=step), keep=2)
        time.sleep(draw.uniform(0.005, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        newest = checkpoints.checkpoints(tmp_path)[-1]
        state = checkpoints.load(newest, parameters, optimizer)
        assert newest.name == f"step-{state.step:06d}"
        assert state.step >= seen
        seen = state.step
        for key, value in parameters.state().items():
            assert torch.equal(value, train_parameters.state()[key])
    assert seen > 5


def test_errors_say_what_does_not_fit(tmp_path):
    _, parameters, optimizer = make()
    saved = checkpoints.save(tmp_path, parameters, optimizer, TrainingState(step=1))
    other = Parameters({"0.weight": nn.Parameter(torch.zeros(3, 3))})
    with pytest.raises(UserError, match="does not fit this configuration"):
        checkpoints.load(saved, other)
    (saved / "policy.safetensors").unlink()
    with pytest.raises(UserError, match=r"policy\.safetensors"):
        checkpoints.load(saved, parameters)
