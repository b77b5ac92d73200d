"""Pictures, and gradients checked by finite differences."""

import pytest
import torch

from mmrl.seeding import generator

TEXTS = ["a red circle", "two blue squares", "a green ring left of a yellow star", "fog"]
SIZE = 32


def smooth_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Pictures [count, 3, height, width] of a few waves, on the grid of eight bits, away from black and white."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    rng = generator(seed, "pictures")
    waves = torch.zeros(count, 3, height, width)
    for _ in range(3):
        a, b, c = (torch.rand(count, 3, 1, 1, generator=rng) * 6 - 3 for _ in range(3))
        waves += torch.sin(a * x + b * y + c)
    return ((0.5 + 0.12 * waves) * 255).round() / 255


def sharp_images(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Random pictures of full contrast on the grid of eight bits."""
    return (torch.rand(count, 3, height, width, generator=generator(seed, "sharp")) * 255).round() / 255


def directional_check(function, images: torch.Tensor, step: float = 2e-3, tolerance: float = 0.02) -> None:
    """The gradient of ``function(images).sum()`` against central differences along itself and a random direction."""
    images = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(images).sum(), images)
    assert gradient.abs().max() > 0
    rng = generator(3, "direction")
    for direction in (gradient, gradient + gradient.std() * torch.randn(gradient.shape, generator=rng)):
        direction = direction / direction.abs().max()
        with torch.no_grad():
            up, down = (function(images + sign * step * direction).double().sum() for sign in (1, -1))
        expected = (gradient * direction).double().sum().item()
        assert ((up - down) / (2 * step)).item() == pytest.approx(expected, rel=tolerance)


def character_tokenizer():
    """A CLIP tokenizer with one token a letter."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    vocab = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=48)
