"""Similarity of an episode's pictures to goals, against the formulas of the papers in plain CLIP calls."""

import pytest
import torch
from reward_samples import smooth_images

from mmrl.errors import UserError
from mmrl.types import Episode, Prompt, Samples
from rewards import load_reward

GOAL, BASELINE, NEGATIVE = "a red cube", "an arm", "a crash"


@pytest.fixture
def filmed() -> Samples:
    """Two episodes of three and of one turn."""
    frames = (smooth_images(6, 24, 24) * 255).round().to(torch.uint8)
    episodes = [
        Episode(torch.zeros(c, 1), torch.ones(c, dtype=torch.long), torch.zeros(c, 1, 1), False, True, frames=part)
        for c, part in ((3, frames[:4]), (1, frames[4:]))
    ]
    return Samples([Prompt("a blue ball", id="start-0"), Prompt("a green cup", id="start-1")], episodes=episodes)


def vectors(clip_folder, filmed, texts):
    """Unit vectors of the pictures ``[6, D]`` and of texts; other tests hold the encoder to the library."""
    encoder = load_reward("clip", model=clip_folder).encoder
    frames = torch.cat([episode.frames for episode in filmed.episodes])
    return encoder.images(frames / 255).double(), encoder.texts(texts).double()


def test_without_a_baseline_it_is_the_cosine(clip_folder, filmed):
    s, (g0, g1) = vectors(clip_folder, filmed, ["a blue ball", "a green cup"])
    expected = [s[:4] @ g0, s[4:] @ g1]
    reward = load_reward("goal_similarity", model=clip_folder, batch_size=5)
    for found, one in zip(reward.potentials(filmed), expected, strict=True):
        assert torch.allclose(found, one, atol=1e-6)
    assert reward(filmed).tolist() == pytest.approx([(one[-1] - one[0]).item() for one in expected], abs=1e-6)
    assert [len(turns) for turns in reward.turns(filmed)] == [3, 1]
    each = load_reward("goal_similarity", model=clip_folder, of="each")
    assert each(filmed).tolist() == pytest.approx([one[1:].sum().item() for one in expected], abs=1e-6)
    last = load_reward("goal_similarity", model=clip_folder, of="last")
    assert last.turns(filmed)[0] == [0.0, 0.0, pytest.approx(expected[0][-1].item(), abs=1e-6)]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_projection_on_the_baseline(clip_folder, filmed, alpha):
    s, (g, b) = vectors(clip_folder, filmed, [GOAL, BASELINE])
    # The projection as a matrix, as in the paper.
    way = (g - b)[:, None]
    matrix = alpha * way @ way.T / (way.T @ way) + (1 - alpha) * torch.eye(len(g))
    expected = 1 - ((s - g) @ matrix).square().sum(1) / 2
    reward = load_reward("goal_similarity", model=clip_folder, goal=GOAL, baseline=BASELINE, alpha=alpha)
    assert torch.allclose(torch.cat(reward.potentials(filmed)), expected, atol=1e-6)


def test_contrasting_goals(clip_folder, filmed):
    s, (g, n) = vectors(clip_folder, filmed, [GOAL, NEGATIVE])
    reward = load_reward("goal_similarity", model=clip_folder, goal=GOAL, negative=NEGATIVE, negative_weight=0.25)
    assert torch.allclose(torch.cat(reward.potentials(filmed)), 0.75 * s @ g - 0.25 * s @ n, atol=1e-6)


def test_as_a_potential(clip_folder, filmed):
    goal = {"type": "goal_similarity", "model": clip_folder, "goal": GOAL}
    shaping = load_reward("shaping", potential=goal, discount=0.5)
    first, second = load_reward(**{"name": goal.pop("type")}, **goal).potentials(filmed)
    assert shaping.turns(filmed)[1] == pytest.approx([-second[0].item()])
    assert shaping.turns(filmed)[0][0] == pytest.approx((0.5 * first[1] - first[0]).item())


def test_what_is_missing_is_said(clip_folder, filmed):
    reward = load_reward("goal_similarity", model=clip_folder)
    filmed.prompts[1] = Prompt(id="start-1")
    with pytest.raises(UserError, match="prompt 'start-1' has no text"):
        reward(filmed)
    filmed.episodes[1].frames = None
    with pytest.raises(UserError, match=r"sample 1 \(prompt 'start-1'.* kept none: set pipeline.frames"):
        reward(filmed)
