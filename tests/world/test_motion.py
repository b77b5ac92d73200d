"""Moving shapes: clips show what they are asked to, and the verifier tells right clips from wrong ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from mmrl.world.motion import (
    DIRECTIONS,
    FRAMES,
    PARTS,
    SHAPES,
    SPEEDS,
    all_targets,
    caption,
    check_target,
    clips,
    film,
    is_held_out,
    place,
    rows,
    vocabulary,
)
from mmrl.world.motion_verify import marks_of, motion, score
from mmrl.world.scenes import COLOURS
from rewards import load_reward

TARGETS = all_targets()
OTHER = {
    "colour": dict(zip(COLOURS, [*list(COLOURS)[1:], next(iter(COLOURS))], strict=True)),
    "shape": dict(zip(SHAPES, [*SHAPES[1:], SHAPES[0]], strict=True)),
    "direction": {"left": "right", "right": "left", "up": "down", "down": "up"},
    "speed": {"slowly": "fast", "fast": "slowly"},
}


@pytest.fixture(scope="module")
def true_clips():
    rng = np.random.default_rng(11)
    return film([place(target, rng) for target in TARGETS])


def test_true_clips_are_right(true_clips):
    assert true_clips.shape == (len(TARGETS), FRAMES, 3, 16, 16)
    assert np.mean(score(true_clips, TARGETS)) >= 0.97
    assert np.mean(score(true_clips, TARGETS, strict=True)) >= 0.97
    noisy = (true_clips + 0.06 * torch.randn(true_clips.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    assert np.mean(score(noisy, TARGETS)) >= 0.97


@pytest.mark.parametrize("part", PARTS)
def test_one_wrong_part_costs_its_mark_and_no_other(part, true_clips):
    chosen = slice(0, None, 7)
    wrong = [{**target, part: OTHER[part][target[part]]} for target in TARGETS[chosen]]
    for marks in marks_of(true_clips[chosen], wrong):
        assert marks[part] < 0.2
        assert all(value > 0.9 for name, value in marks.items() if name != part)
    assert max(score(true_clips[chosen], wrong, strict=True)) == 0


def test_score_falls_with_the_number_of_wrong_parts(true_clips):
    means = []
    for count in range(len(PARTS) + 1):
        asked = [{**t, **{part: OTHER[part][t[part]] for part in PARTS[:count]}} for t in TARGETS[::5]]
        means.append(np.mean(score(true_clips[::5], asked)))
    assert all(a > b + 0.2 for a, b in itertools.pairwise(means))


def test_score_falls_with_every_spoilt_frame(true_clips):
    some, asked = true_clips[::16], TARGETS[::16]
    means = []
    for spoilt in range(FRAMES + 1):
        clip = some.clone()
        clip[:, FRAMES - spoilt :] = 0.96
        means.append(np.mean(score(clip, asked)))
    assert all(a > b for a, b in itertools.pairwise(means[:-2]))
    assert means[-1] == 0


def test_what_moves_wrongly_is_not_rewarded(true_clips):
    asked = [t for t in TARGETS if t["speed"] == "fast"][::8]
    rows_ = [TARGETS.index(t) for t in asked]
    still = true_clips[rows_][:, :1].expand(-1, FRAMES, -1, -1, -1)
    shuffled = true_clips[rows_][:, torch.tensor([3, 0, 4, 1, 2])]
    backwards = true_clips[rows_].flip(1)
    for clip in (still, backwards):
        assert all(m["direction"] == 0 for m in marks_of(clip, asked))
    # In any order some frames lie near any line, so chance earns a little.
    assert np.mean([m["direction"] + m["speed"] for m in marks_of(shuffled, asked)]) < 0.7
    # Two shapes in a picture are not what any caption asks for.
    two = torch.minimum(true_clips[rows_], true_clips[rows_].flip(-1).flip(-2).roll(1, 0))
    assert np.mean(score(two, asked)) < 0.7


def test_names_of_motions():
    assert motion(np.array([-0.2, 0.0])) == ("left", "slowly")
    assert motion(np.array([0.02, 0.5])) == ("down", "fast")
    assert motion(np.array([0.3, 0.3])) == ("", "slowly")
    assert motion(np.array([0.01, -0.02])) == ("", "")
    for name, way in DIRECTIONS.items():
        for speed, (low, high) in SPEEDS.items():
            assert motion(0.5 * (low + high) * np.array(way)) == (name, speed)


def test_splits_do_not_share_requests_and_captions_use_known_words():
    train, held_out = list(rows(400)), list(rows(60, "eval"))
    assert not any(is_held_out(row["target"]) for row in train)
    assert all(is_held_out(row["target"]) for row in held_out)
    assert 20 <= sum(map(is_held_out, TARGETS)) <= 40
    words = {word for row in train + held_out for word in row["text"].split()}
    assert words <= set(vocabulary())
    assert len({caption(TARGETS[0], np.random.default_rng(k)) for k in range(20)}) == 4


def test_clips_show_their_captions_unless_mistold():
    told, asked = list(clips(24)), list(rows(24))
    assert [prompt.text for prompt in told] == [row["text"] for row in asked]
    assert min(score(torch.stack([prompt.target for prompt in told]), [row["target"] for row in asked])) > 0.9
    mixed = list(clips(200, mistold=0.5, untold=0.1))
    truth = [row["text"] for row in rows(200)]
    assert 0.3 < np.mean([prompt.text not in (text, "") for prompt, text in zip(mixed, truth, strict=True)]) < 0.6
    assert 0.03 < np.mean([prompt.text == "" for prompt in mixed]) < 0.2


def test_reward_and_its_refusals(true_clips):
    prompts = [Prompt(text="x", target=target) for target in TARGETS[:4]]
    found = load_reward("moving_shapes")(Samples(prompts, videos=true_clips[:4]))
    assert found.shape == (4,)
    assert found.min() > 0.9
    with pytest.raises(UserError, match="scores videos"):
        load_reward("moving_shapes")(Samples(prompts, images=true_clips[:4, 0]))
    with pytest.raises(UserError, match=r"direction 'lft'.*left"):
        check_target({**TARGETS[0], "direction": "lft"}, "row 1")
    with pytest.raises(UserError, match="moving shapes need one like"):
        check_target(None, "row 1")
