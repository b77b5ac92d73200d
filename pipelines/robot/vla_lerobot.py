"""Flow policies of LeRobot (pi0, pi0.5, SmolVLA) as networks of a robot policy.

LeRobot's releases want other versions of torch than mmrl does, so it is no dependency and its test is skipped without
it; the page docs/robots.md says what was tried. The seam is what its flow policies share: ``predict_action_chunk``
reads the observation into a prefix, then calls ``model.denoise_step`` for every step with it, a noisy chunk and a time,
which is 1 for noise.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmrl.errors import UserError
from pipelines.robot.networks import Spaces, TimeEmbedding

if TYPE_CHECKING:
    from pipelines.robot.envs import Observation


TRAINED = re.compile(r"lm_expert|gemma_expert|action_|time_mlp")
"""Parameters of what denoises, in the policies named above."""


class LeRobotEncoder(nn.Module):
    """A LeRobot flow policy. What reads the observation stays as it is; what denoises actions trains.

    Args:
        spaces: of the environment.
        policy: folder or hub id of a LeRobot policy, e.g. ``lerobot/smolvla_base``.
        camera: name of the camera that the environment's picture stands for.

    Raises:
        UserError: LeRobot is not installed, or the policy is none of its flow policies.
    """

    def __init__(self, spaces: Spaces, policy: str, camera: str = "image"):
        super().__init__()
        if spaces.image_shape is None:
            raise UserError("network 'lerobot' reads pictures, but the environment shows none: set its image size")
        try:
            from lerobot.configs.policies import PreTrainedConfig
            from lerobot.policies.factory import get_policy_class, make_pre_post_processors
        except ModuleNotFoundError as error:
            raise UserError(
                f"network 'lerobot' needs the package {error.name}; LeRobot pins versions of torch that mmrl does not "
                "work with, so install mmrl beside it without dependencies (pip install --no-deps), at your own risk"
            ) from error
        config = PreTrainedConfig.from_pretrained(policy)
        self.policy = get_policy_class(config.type).from_pretrained(policy).eval()
        if not hasattr(getattr(self.policy, "model", None), "denoise_step"):
            raise UserError(f"'{policy}' is of type {config.type}: only flow policies such as smolvla and pi0 fit here")
        for name, parameter in self.policy.named_parameters():
            parameter.requires_grad_(TRAINED.search(name) is not None)
        self.before, after = make_pre_post_processors(config, policy)
        self.camera = f"observation.images.{camera}"
        self.context_dim = spaces.state_dim
        self.scale = LeRobotScale(after, spaces.action_dim)

    @torch.no_grad()
    def forward(self, observation: Observation) -> Given:
        """What the policy hands to each denoising step, for n observations."""
        batch = self.before(
            {
                "observation.state": observation.state,
                self.camera: observation.image.float() / 255,
                "task": list(observation.instruction),
            }
        )
        return Given(_arguments_of_first_step(self.policy, batch), observation.state)

    def chunk_network(self, horizon: int, action_dim: int, time_width: int) -> DenoiseStep:
        """What a denoising head asks; raises ``UserError`` if the policy was made for another horizon."""
        size = self.policy.config.chunk_size
        if horizon != size:
            raise UserError(
                f"pipeline.horizon is {horizon}, but this LeRobot policy plans {size} actions: set it to that"
            )
        return DenoiseStep(self.policy.model, self.policy.config.max_action_dim, time_width)


class LeRobotScale:
    """Between actions as a LeRobot policy normalises them and those of the environment; an affine map per number."""

    def __init__(self, after: Callable[[Tensor], Tensor], action_dim: int):
        self.offset, one = (after(torch.full((1, action_dim), float(x)))[0].cpu() for x in (0, 1))
        self.factor = one - self.offset

    def clipped(self, actions: Tensor) -> Tensor:
        """The environment clips."""
        return actions

    def to_env(self, actions: Tensor) -> Tensor:
        """As the environment takes them."""
        return actions * self.factor + self.offset

    def from_env(self, actions: Tensor) -> Tensor:
        """The inverse."""
        return (actions - self.offset) / self.factor


class Given:
    """Arguments of ``denoise_step`` with n rows each."""

    def __init__(self, arguments: Mapping[str, Any], state: Tensor):
        self.arguments, self.state = dict(arguments), state

    def __len__(self) -> int:
        return len(self.state)

    def repeat_interleave(self, repeats: int, dim: int = 0) -> Given:
        """Each row so many times, as for a tensor."""
        return Given(_repeated(self.arguments, repeats), self.state.repeat_interleave(repeats, dim))

    def pooled(self) -> Tensor:
        """The state, for value heads."""
        return self.state


class DenoiseStep(nn.Module):
    """``network(context, x, time) -> [n, H, D]`` by the policy's own network, which thinks in more numbers than D.

    ``time`` embeds times for networks of the noise alone.
    """

    def __init__(self, model: nn.Module, width: int, time_width: int):
        super().__init__()
        self.model, self.width = model, width
        self.time = TimeEmbedding(time_width).requires_grad_(False)

    def forward(self, context: Given, x: Tensor, time: Tensor) -> Tensor:
        """Velocity for noisy chunks ``x`` at times ``[n]``; what is beyond D stays at its mean, 0."""
        wide = nn.functional.pad(x, (0, self.width - x.shape[-1]))
        # Caches are written to by the step that reads them.
        given = {name: copy.deepcopy(value) for name, value in context.arguments.items()}
        return self.model.denoise_step(**given, x_t=wide, timestep=time)[..., : x.shape[-1]]


class _Stop(Exception):
    pass


def _arguments_of_first_step(policy: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Run a policy up to its first denoising step; what it would hand to it, but for chunk and time."""
    model, found = policy.model, {}
    own = inspect.signature(model.denoise_step)

    def stop(*args: Any, **kwargs: Any) -> None:
        found.update(own.bind_partial(*args, **kwargs).arguments)
        raise _Stop

    model.denoise_step = stop
    try:
        policy.predict_action_chunk(dict(batch))
    except _Stop:
        pass
    finally:
        del model.denoise_step
    return {name: value for name, value in found.items() if name not in ("x_t", "timestep")}


def _repeated(value: Any, repeats: int) -> Any:
    if isinstance(value, Tensor):
        return value.repeat_interleave(repeats, 0)
    if isinstance(value, Mapping):
        return {key: _repeated(item, repeats) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_repeated(item, repeats) for item in value]
    if hasattr(value, "batch_repeat_interleave"):
        value = copy.deepcopy(value)
        value.batch_repeat_interleave(repeats)
    return value
