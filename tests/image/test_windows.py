"""SDE windows as a pure function of the training step."""

from __future__ import annotations

import pytest

from mmrl.errors import UserError
from pipelines.windows import window_steps


def test_simple_windows():
    assert window_steps("all", 5) == (0, 1, 2, 3)
    assert window_steps({"first": 2}, 5) == (0, 1)
    assert window_steps({"last": 2}, 5) == (2, 3)
    assert window_steps([3, 1], 5) == (1, 3)


def test_random_windows_are_adjacent_seeded_and_cover_their_range():
    spec = {"random": 2, "within": [1, 5]}
    windows = [window_steps(spec, 10, step, seed=3) for step in range(200)]
    assert set(windows) == {(1, 2), (2, 3), (3, 4)}
    assert windows == [window_steps(spec, 10, step, seed=3) for step in range(200)]
    assert windows != [window_steps(spec, 10, step, seed=4) for step in range(200)]


def test_random_steps_need_not_be_adjacent():
    windows = {window_steps({"random": 2, "contiguous": False}, 5, step) for step in range(200)}
    assert len(windows) == 6
    assert all(a < b for a, b in windows)


def test_progressive_windows_slide_and_roll_back_as_in_mixgrpo():
    spec = {"progressive": 2, "every": 3, "stride": 1}
    starts = [window_steps(spec, 6, step)[0] for step in range(15)]
    assert starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0, 0]
    clamped = [window_steps({**spec, "rollback": False}, 6, step)[0] for step in range(15)]
    assert clamped == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3]
    apart = [window_steps({"progressive": 2, "every": 1, "stride": 2}, 6, step) for step in range(4)]
    assert apart == [(0, 1), (2, 3), (0, 1), (2, 3)]


def test_backward_windows_grow_towards_the_noise_as_in_b2_diffurl():
    spec = {"backward": 2, "every": 3}
    assert [len(window_steps(spec, 6, step)) for step in range(13)] == [2, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5, 5]
    assert window_steps(spec, 6, 4) == (2, 3, 4)
    assert window_steps({**spec, "stride": 2, "until": 3}, 6, 100) == (2, 3, 4)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"first": 5}, ["first", "5", "1 to 4"]),
        ({"last": 0}, ["last", "0", "1 to 4"]),
        ([4], ["4", "0 to 3"]),
        ([-1], ["-1", "0 to 3"]),
        ([1, 1], ["[1, 1]", "once"]),
        ([], ["at least one"]),
        ("al", ["'al'", "all"]),
        ({"frist": 2}, ["first"]),
        ({"random": 2, "witin": [0, 3]}, ["witin", "within"]),
        ({"random": 3, "within": [1, 3]}, ["[1, 3]", "at least 3"]),
        ({"random": 2, "within": [0, 9]}, ["[0, 9]", "[0, 4]"]),
        ({"random": 2, "within": 3}, ["within", "3"]),
        ({"progressive": 2, "every": 0}, ["every", "0"]),
        ({"backward": 2, "stride": 0}, ["stride", "0"]),
        ({"backward": 2, "until": 1}, ["until", "from 2 to 4"]),
        ({"first": "two"}, ["first", "two"]),
    ],
)
def test_a_window_outside_the_steps_is_refused_in_a_sentence(spec, words):
    with pytest.raises(UserError) as error:
        window_steps(spec, 5)
    for word in words:
        assert word in str(error.value)
