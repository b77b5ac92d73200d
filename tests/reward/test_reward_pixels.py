"""Rewards from pixels against the imaging libraries and by their definitions."""

import colorsys
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageStat
from reward_samples import directional_check, sharp_images, smooth_images

from mmrl.errors import UserError
from mmrl.media import to_pil
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.diversity import group_distances
from rewards.pixels import MEASURES, closeness, contrast, sharpness


def make_samples(images, group=None):
    return Samples([Prompt()] * len(images), images=images, group=group)


def test_brightness_and_contrast_equal_pillow():
    images = sharp_images(3, 20, 30)
    stats = [ImageStat.Stat(to_pil(image).convert("L")) for image in images]
    # Pillow rounds each luma to eight bits.
    brightness = load_reward("pixels")(make_samples(images))
    torch.testing.assert_close(brightness, torch.tensor([s.mean[0] / 255 for s in stats]), atol=0.002, rtol=0)
    spread = load_reward("pixels", measure="contrast")(make_samples(images))
    torch.testing.assert_close(spread, torch.tensor([s.stddev[0] / 255 for s in stats]), atol=0.002, rtol=0)


def test_saturation_equals_colorsys():
    images = sharp_images(3, 20, 30)
    pixels = [image.flatten(1).T.double().tolist() for image in images]
    expected = [np.mean([colorsys.rgb_to_hsv(*rgb)[1] for rgb in picture]) for picture in pixels]
    found = load_reward("pixels", measure="saturation")(make_samples(images))
    torch.testing.assert_close(found, torch.tensor(np.array(expected)).float(), atol=1e-5, rtol=0)
    black = load_reward("pixels", measure="saturation")(make_samples(torch.zeros(1, 3, 4, 4)))
    assert black.item() == 0


def test_sharpness_and_contrast_at_their_ends():
    flat, board = torch.full((1, 3, 8, 8), 0.3), torch.zeros(1, 3, 8, 8)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = 1
    assert sharpness(flat).item() == pytest.approx(0, abs=1e-6)
    assert sharpness(board).item() == pytest.approx(1)
    assert contrast(flat).item() == pytest.approx(0, abs=2e-5)
    assert contrast(board).item() == pytest.approx(0.5)
    blurred = torch.nn.functional.avg_pool2d(sharp_images(1, 16, 16), 3, 1, 1)
    assert sharpness(blurred) < sharpness(sharp_images(1, 16, 16))


@pytest.mark.parametrize("color", ["red", "#ff0000", (1.0, 0.0, 0.0)])
def test_color(color):
    reward = load_reward("pixels", measure="color", color=color)
    red, green = torch.zeros(2, 3, 4, 4)
    red[0], green[1] = 1, 1
    scores = reward(make_samples(torch.stack([red, green, (red + green) / 2])))
    torch.testing.assert_close(scores, torch.tensor([1.0, 1 / 3, 2 / 3]))


def test_target_is_best_where_it_is_met():
    images = torch.full((3, 3, 4, 4), 0.5) * torch.tensor([0.5, 1.0, 2.0])[:, None, None, None]
    scores = load_reward("pixels", measure="brightness", target=0.5)(make_samples(images))
    torch.testing.assert_close(scores, torch.tensor([-0.25, 0.0, -0.5]))


@pytest.mark.parametrize("measure", MEASURES)
def test_gradients_are_exact_and_bounded(measure):
    def function(images):
        return closeness(images, (0.2, 0.5, 0.9)) if measure == "color" else MEASURES[measure](images)

    noise = torch.rand(2, 3, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.autograd.gradcheck(function, noise.requires_grad_(True), eps=1e-7)
    for value in (0.0, 0.5, 1.0):
        flat = torch.full((1, 3, 6, 6), value, requires_grad=True)
        (gradient,) = torch.autograd.grad(function(flat).sum(), flat)
        assert gradient.isfinite().all()
        # Were every pixel to move by one step, the score would move by a bounded number of steps.
        assert gradient.abs().sum() < 600


def test_pixel_errors():
    with pytest.raises(UserError, match=r"color is 'rde', should be a name such as red"):
        load_reward("pixels", measure="color", color="rde")
    with pytest.raises(UserError, match="color is needed for measure=color"):
        load_reward("pixels", measure="color")
    with pytest.raises(UserError, match="for no other measure"):
        load_reward("pixels", color="red")
    with pytest.raises(UserError, match=r"'color.*' is"):
        load_reward("pixels", measure="color", color=(2.0, 0.0, 0.0))
    with pytest.raises(UserError, match=r"'measure' is 'sharpnes'.*did you mean 'sharpness'"):
        load_reward("pixels", measure="sharpnes")


@pytest.mark.parametrize("quality", [30, 95])
def test_jpeg_is_the_size_of_the_file(quality, tmp_path):
    images = torch.cat([smooth_images(2, 40, 40), sharp_images(1, 40, 40)])
    expected = []
    for image in images:
        pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=quality)
        expected.append((tmp_path / "x.jpg").stat().st_size / 1000)
    large = load_reward("jpeg", goal="incompressibility", quality=quality)
    small = load_reward("jpeg", quality=quality)
    torch.testing.assert_close(large(make_samples(images)), torch.tensor(expected))
    torch.testing.assert_close(small(make_samples(images)), -torch.tensor(expected))
    assert not small.differentiable
    assert large(make_samples(images))[2] > large(make_samples(images))[:2].max()


def test_diversity_by_hand():
    black, white, grey = (torch.full((3, 4, 4), v) for v in (0.0, 1.0, 0.5))
    images = torch.stack([black, white, grey, white, white, grey])
    # Groups interleaved; the last sample is alone.
    group = torch.tensor([0, 0, 0, 1, 1, 2])
    scores = load_reward("diversity")(make_samples(images, group))
    torch.testing.assert_close(scores[:5], torch.tensor([0.75, 0.75, 0.5, 0.0, 0.0]))
    assert scores[5].isnan()


def test_diversity_equals_all_pairs():
    images = sharp_images(5, 6, 7)
    scores = load_reward("diversity")(make_samples(images, torch.zeros(5, dtype=torch.long)))
    pairs = [(a - b).double().square().mean().sqrt().item() for a, b in itertools.combinations(images, 2)]
    expected = sum(pairs) / len(pairs)
    assert scores.mean().item() == pytest.approx(expected, rel=1e-5)


def test_gradient_of_diversity():
    group = torch.tensor([0, 0, 1, 1, 1])
    directional_check(lambda images: group_distances(images.flatten(1), group), sharp_images(5, 6, 6))
    same = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(group_distances(same.flatten(1), torch.zeros(2).long()).sum(), same)
    assert gradient.isfinite().all()


def test_diversity_needs_groups():
    with pytest.raises(UserError, match="compares the images or videos of a group"):
        load_reward("diversity")(make_samples(sharp_images(2, 4, 4)))
