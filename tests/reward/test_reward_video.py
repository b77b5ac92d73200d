"""Rewards of clips: against closed forms, the image rewards they are made of, and clips whose motion is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from reward_samples import TEXTS, smooth_images

from mmrl.errors import UserError
from mmrl.scoring import Scorer
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.media import spread


def clips(count=3, frames=8, side=24):
    return smooth_images(count * frames, side, side).unflatten(0, (count, frames))


def samples_of(videos, **fields):
    prompts = [Prompt(TEXTS[k % len(TEXTS)], id=f"row {k}") for k in range(len(videos))]
    return Samples(prompts, videos=videos, **fields)


def picture_scores(reward, videos, frame):
    return reward(Samples(samples_of(videos).prompts, images=videos[:, frame]))


def texture(height, width, seed=0):
    """A smooth random pattern ``[3, H, W]`` in [0, 1]."""
    noise = torch.rand(1, 3, height // 6, width // 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(noise, (height, width), mode="bicubic").clamp(0, 1)[0]


def sliding(step, frames=6, side=64):
    """A window that moves over a pattern by ``step`` pixels from frame to frame."""
    pattern = texture(side, side + 8 * frames + 16)
    return torch.stack([pattern[:, :, k * step : k * step + side] for k in range(frames)])[None]


@pytest.mark.parametrize(("choose", "chosen"), [("middle", [1, 3, 5, 7]), ("first", [0, 2, 4, 6])])
def test_frames_is_the_mean_of_the_image_reward(choose, chosen):
    videos, brightness = clips(), load_reward("pixels", measure="brightness")
    found = load_reward("frames", of={"type": "pixels", "measure": "brightness"}, choose=choose)(samples_of(videos))
    right = torch.stack([picture_scores(brightness, videos, k) for k in chosen]).mean(0)
    torch.testing.assert_close(found, right)


def test_attenuation_weighs_frames_by_their_distance_to_the_middle():
    videos = clips(frames=4)
    options = {"of": {"type": "pixels"}, "segments": 9, "attenuation": 1.0}
    found = load_reward("frames", **options)(samples_of(videos))
    each = torch.stack([picture_scores(load_reward("pixels"), videos, k) for k in range(4)])
    weights = torch.tensor([np.exp(-2.0), np.exp(-1.0), 1.0, np.exp(-1.0)], dtype=torch.float32)
    torch.testing.assert_close(found, (weights[:, None] * each).sum(0) / weights.sum())


def test_random_frames_come_from_every_segment_and_depend_on_the_clip_alone():
    # Frame k has brightness k / 16, so the score tells which frames were seen.
    videos = torch.linspace(0, 15, 16)[None, :, None, None, None].expand(40, -1, 3, 4, 4) / 16
    videos = videos + 1e-4 * torch.arange(40)[:, None, None, None, None]
    reward = load_reward("frames", of={"type": "pixels"}, choose="random", segments=2)
    found = reward(samples_of(videos))
    assert torch.equal(found, reward(samples_of(videos)))
    assert torch.equal(found[5:9], reward(samples_of(videos)[5:9]))
    total = (found * 32).round().long()
    assert len(total.unique()) > 4
    assert total.min() >= 0 + 8
    assert total.max() <= 7 + 15


def test_frames_pass_gradients_groups_and_gaps_on():
    videos = clips(4, 6).requires_grad_()
    reward = load_reward("frames", of={"type": "pixels"}, segments=2)
    assert reward.differentiable
    (gradient,) = torch.autograd.grad(reward(samples_of(videos)).sum(), videos)
    seen = gradient.abs().sum((0, 2, 3, 4)) > 0
    assert seen.tolist() == [False, True, False, False, True, False]
    assert not load_reward("frames", of={"type": "jpeg"}).differentiable
    spread_out = load_reward("frames", of={"type": "diversity"}, segments=2)
    group = torch.tensor([0, 0, 0, 1])
    found = Scorer([spread_out])(samples_of(videos.detach(), group=group)).each["frames_diversity"]
    pictures = [
        load_reward("diversity")(Samples(samples_of(videos).prompts, images=videos[:, k].detach(), group=group))
        for k in (1, 4)
    ]
    torch.testing.assert_close(found, torch.stack(pictures).mean(0), equal_nan=True)
    assert found.isnan().tolist() == [False, False, False, True]


def test_non_differentiable_frames_are_refused_for_backprop():
    scorer = Scorer([load_reward("frames", of={"type": "jpeg"})])
    with pytest.raises(UserError, match="frames_jpeg"):
        scorer(samples_of(clips()), grad=True)


def test_clip_features_of_frames(clip_folder):
    videos = clips(3, 5)
    same = videos[:, :1].expand(-1, 5, -1, -1, -1)
    clip = load_reward("clip", model=clip_folder)
    still = load_reward("video_clip", model=clip_folder)(samples_of(same))
    torch.testing.assert_close(still, picture_scores(clip, videos, 0), atol=1e-5, rtol=1e-4)
    consistency = load_reward("temporal_consistency", model=clip_folder)
    torch.testing.assert_close(consistency(samples_of(same)), torch.ones(3), atol=1e-5, rtol=0)
    features = clip.encoder.images(videos.flatten(0, 1)).unflatten(0, (3, 5))
    cosines = features @ features.transpose(1, 2)
    right = torch.stack([(cosines[:, k, k - 1] + cosines[:, k, 0]) / 2 for k in range(1, 5)]).mean(0)
    torch.testing.assert_close(consistency(samples_of(videos)), right, atol=1e-5, rtol=1e-4)
    videos.requires_grad_()
    for name in ("video_clip", "temporal_consistency"):
        reward = load_reward(name, model=clip_folder, frames=2)
        (gradient,) = torch.autograd.grad(reward(samples_of(videos)).sum(), videos)
        assert (gradient.abs().sum((0, 2, 3, 4)) > 0).tolist() == [k in spread(5, 2) for k in range(5)]


def test_first_frame_against_the_prompts_picture(clip_folder, tmp_path):
    videos = clips(2, 3)
    Image.fromarray((videos[0, 0].permute(1, 2, 0) * 255).round().byte().numpy()).save(tmp_path / "start.png")
    asked = [Prompt("a", id="a", images=[str(tmp_path / "start.png")]), Prompt("b", id="b", images=[videos[0, 0]])]
    found = load_reward("first_frame")(Samples(asked, videos=videos))
    difference = (videos[1, 0] - videos[0, 0]).abs().mean()
    torch.testing.assert_close(found, torch.stack([torch.tensor(1.0), 1 - difference]), atol=3e-3, rtol=0)
    by_model = load_reward("first_frame", model=clip_folder)(Samples(asked, videos=videos))
    assert by_model[0] > 0.99
    assert by_model[0] > by_model[1]
    half = [Prompt("a", images=[torch.nn.functional.avg_pool2d(videos[0, 0], 2)])]
    assert load_reward("first_frame")(Samples(half, videos=videos[:1])) > 0.9
    with pytest.raises(UserError, match="row 'row 0' has no images"):
        load_reward("first_frame")(samples_of(videos))
    with pytest.raises(UserError, match=r"nowhere\.png"):
        load_reward("first_frame")(Samples([Prompt("x", id="x", images=["nowhere.png"])], videos=videos[:1]))


def test_dynamic_degree_is_the_length_of_the_motion():
    pytest.importorskip("cv2")
    degree = load_reward("dynamic_degree", top=0.5)
    found = [degree(samples_of(sliding(step))).item() * 64 for step in (0, 1, 2, 4)]
    np.testing.assert_allclose(found, [0, 1, 2, 4], atol=0.5)
    enough = load_reward("dynamic_degree", enough=2 / 64, top=0.5)
    capped = [enough(samples_of(sliding(step))).item() for step in (1, 4)]
    assert capped[0] == pytest.approx(0.5, abs=0.2)
    assert capped[1] == 1


def test_motion_smoothness_prefers_even_motion():
    pytest.importorskip("cv2")
    smoothness = load_reward("motion_smoothness")
    even = sliding(3, frames=7)
    jerky = even[:, [0, 2, 1, 4, 3, 6, 5]]
    flicker = even * torch.tensor([1.0, 0.6] * 4)[None, :7, None, None, None]
    scores = [smoothness(samples_of(clip)).item() for clip in (even[:, :1].expand(-1, 7, -1, -1, -1), even)]
    assert scores[0] > 0.999
    assert scores[1] > 0.97
    assert max(smoothness(samples_of(clip)).item() for clip in (jerky, flicker)) < scores[1] - 0.03


def test_short_clips_and_other_samples_are_refused(samples, clip_folder):
    pytest.importorskip("cv2")
    short = samples_of(clips(2, 1))
    for name, options in (
        ("temporal_consistency", {"model": clip_folder}),
        ("dynamic_degree", {}),
        ("motion_smoothness", {}),
    ):
        with pytest.raises(UserError, match=name):
            load_reward(name, **options)(short)
    for name, options in (("frames", {"of": {"type": "pixels"}}), ("video_clip", {"model": clip_folder})):
        with pytest.raises(UserError, match="scores videos"):
            load_reward(name, **options)(samples)
    with pytest.raises(UserError, match="'of' needs a 'type'"):
        load_reward("frames", of={"measure": "contrast"})
