"""A small procedural world of coloured shapes: scenes, pictures, captions and exact verifiers.

The quickstart's base models are trained on it and its verifier is their reward.
"""

from mmrl.world.drawing import draw, save_grid
from mmrl.world.scenes import Object, Scene, place
from mmrl.world.verify import detect, score

__all__ = ["Object", "Scene", "detect", "draw", "place", "save_grid", "score"]
