"""Action heads by name: what turns a context into a chunk of actions and scores it again.

Each is built as ``Head(shape, **options)`` with a :class:`pipelines.robot.heads.base.HeadShape`.
"""

HEADS: dict[str, str] = {
    "flow": "pipelines.robot.heads.denoising:FlowHead",
    "diffusion": "pipelines.robot.heads.denoising:DiffusionHead",
    "gaussian": "pipelines.robot.heads.gaussian:GaussianHead",
    "tokens": "pipelines.robot.heads.tokens:TokenHead",
}
