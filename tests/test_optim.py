"""Schedules, averages and optimisers by name."""

import pytest
import torch
from torch import nn

from mmrl.errors import UserError
from mmrl.optim import average_decay, build_optimizer, learning_rate
from mmrl.policy import Parameters


def test_schedules_by_hand():
    assert [learning_rate(1.0, "constant", 4, step, 10) for step in (0, 1, 3, 4, 9)] == [0.25, 0.5, 1, 1, 1]
    assert [learning_rate(1.0, "linear", 0, step, 10) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]
    assert learning_rate(1.0, "linear", 2, 6, 10) == pytest.approx(0.5)
    assert [learning_rate(1.0, "cosine", 0, step, 10) for step in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


def test_average_warms_up():
    assert average_decay(0.9, 0, warmup=True) == pytest.approx(0.1)
    assert average_decay(0.9, 1000, warmup=True) == 0.9
    assert average_decay(0.9, 0, warmup=False) == 0.9


def test_average_by_hand_and_swap():
    weight = nn.Parameter(torch.tensor([1.0]))
    parameters = Parameters({"weight": weight})
    parameters.take_snapshot("average")
    with torch.no_grad():
        weight.fill_(3.0)
    parameters.update_average("average", 0.75)
    with parameters.swapped("average"):
        assert weight.item() == pytest.approx(0.75 * 1 + 0.25 * 3)
    assert weight.item() == 3.0


def test_unknown_names_are_refused():
    parameters = [nn.Parameter(torch.zeros(1))]
    with pytest.raises(UserError, match="did you mean 'AdamW'"):
        build_optimizer("AdamWW", parameters, 1e-3, {})
    with pytest.raises(UserError, match=r"weight_dekay.*weight_decay"):
        build_optimizer("AdamW", parameters, 1e-3, {"weight_dekay": 0.1})
