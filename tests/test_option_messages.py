"""Messages about options that may have one of several types."""

import pytest

from mmrl.components import reward_component
from mmrl.errors import UserError


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"weight": {"start": 0, "end": 1, "steps": 0}}, "'rewards.0.weight.steps' is 0, but should be greater than 0"),
        ({"weight": {"start": 0, "end": 1}}, "'rewards.0.weight.steps' is missing"),
        ({"weight": {"start": 0, "ende": 1, "steps": 3}}, "unknown key 'rewards.0.weight.ende' (did you mean 'end'?)"),
        ({"weight": "much"}, "'rewards.0.weight' is 'much', but should be a number or a mapping"),
        ({"clip": [0, 1, 2]}, "'rewards.0.clip' is [0, 1, 2], but should be a list of two numbers"),
        ({"clip": ["low", 1]}, "'rewards.0.clip.0' is 'low', but should be a number"),
    ],
)
def test_the_branch_that_was_meant_is_named(given, said):
    with pytest.raises(UserError) as caught:
        reward_component({"type": "pixels", **given}, where="run.yaml", path="rewards.0", folders=[])
    assert str(caught.value) == f"run.yaml: {said}"
