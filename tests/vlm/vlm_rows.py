"""Rows for tests of language models: pictures, prompts of all kinds, calls of tools."""

import json

import numpy as np
from PIL import Image

from mmrl.types import Prompt


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8))


def mixed_prompts() -> list[Prompt]:
    return [
        Prompt("where is the red circle?", "one", images=[picture(60, 90, 0)]),
        Prompt("how many?", "none"),
        Prompt("compare the first with the second, please", "two", images=[picture(90, 60, 1), picture(60, 60, 2)]),
        Prompt("what moves?", "clip", videos=[[picture(60, 60, k) for k in range(4)]]),
    ]


def call(tool: str, **arguments) -> str:
    return f"<tool_call>{json.dumps({'name': tool, 'arguments': arguments})}</tool_call>"
