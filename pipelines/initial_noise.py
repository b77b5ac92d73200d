"""The start of sampling as the policy: a learned distribution of x_T before a frozen model (FIND, arXiv:2407.19453).

The draw of x_T is the one decision of a sample; the deterministic sampler then makes a picture or clip of it. Training
needs no gradient of the network, and no forward of it but the rollout's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.policy import Parameters
from mmrl.seeding import derive_seed, prompt_keys
from mmrl.types import Decisions, Prompt, Rollout
from pipelines import loading
from pipelines.diffusion import DiffusionPolicy
from pipelines.state_value import probe
from pipelines.step_kernel import gaussian_logp
from pipelines.trace import Trace

FILE = "initial_noise.safetensors"


class InitialNoise(nn.Module):
    """The distribution N(mean, std^2) of x_T given a prompt; N(0, 1) before training.

    ``mean = B_0 + sum_k a_k B_k``, with ``a`` a function of the prompt's text. FIND optimises one distribution for
    one prompt, which is what ``B_0`` does where there is but one; with more of them the text decides, as in Noise PPO
    (arXiv:2506.12036), and prompts that were never trained have a distribution too.

    Args:
        row: shape of x_T.
        text_dim: size of the pooled text.
        rank: number of the ``B_k``.
        learn_std: the std, one number a prompt, is learned in the same way; otherwise it stays 1.
    """

    def __init__(self, row: Sequence[int], text_dim: int, rank: int, learn_std: bool):
        super().__init__()
        self.code = nn.Sequential(nn.LayerNorm(text_dim), nn.Linear(text_dim, rank), nn.Tanh()) if text_dim else None
        rank = rank if text_dim else 0
        self.mean = nn.Parameter(torch.zeros(1 + rank, *row))
        self.log_std = nn.Parameter(torch.zeros(1 + rank)) if learn_std else None

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[...]`` and std, one number, for the pooled text ``[text_dim]`` of one prompt."""
        with torch.autocast(self.mean.device.type, enabled=False):
            code = self.mean.new_ones(1)
            if self.code is not None:
                code = torch.cat([code, self.code(text.to(code.device))])
            mean = (code @ self.mean.flatten(1)).view(self.mean.shape[1:])
            return mean, code.new_ones(()) if self.log_std is None else (code @ self.log_std).exp()


class InitialNoisePolicy(DiffusionPolicy):
    """A diffusers pipeline whose initial noise trains; its networks stay as they are.

    The reference is N(0, 1). What is exported is ``initial_noise.safetensors``, the distribution alone.

    Args:
        pipe: the pipeline.
        num_steps: sampling steps in training.
        call: extra arguments of the pipeline's call: height, width, guidance_scale...
        rank: of the map from text to mean (:class:`InitialNoise`).
        learn_std: learn one std a prompt as well.
        weights: an exported ``initial_noise.safetensors`` to start from.
        batch_size: rows per pipeline call.
        vae_tiling: decode pictures in overlapping tiles.
        keep_mean: keep the behaviour means in ``rollout.mean``.
        eval_num_steps, eval_call: for ``generate``; latents must have the shape that they have in training.

    Raises:
        UserError: an option does not fit the pipeline, or ``weights`` is for another one.
    """

    verbs = frozenset({"rollout", "decisions", "generate", "means"})

    def __init__(
        self,
        pipe: Any,
        num_steps: Annotated[int, Field(ge=1)] = 10,
        call: dict[str, Any] | None = None,
        rank: Annotated[int, Field(ge=1)] = 16,
        learn_std: bool = False,
        weights: str | None = None,
        batch_size: Annotated[int, Field(ge=1)] = 8,
        vae_tiling: bool = False,
        keep_mean: bool = False,
        eval_num_steps: Annotated[int, Field(ge=1)] | None = None,
        eval_call: dict[str, Any] | None = None,
    ):
        super().__init__(
            pipe,
            num_steps,
            "ode",
            call=call,
            train=[],
            batch_size=batch_size,
            vae_tiling=vae_tiling,
            keep_mean=keep_mean,
            eval_num_steps=eval_num_steps,
            eval_call=eval_call,
        )
        facts = probe(self.seam, self.train)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.noise = InitialNoise(facts.latent_shape, len(facts.text), rank, learn_std).to(self.device)
        self.parameters = Parameters(dict(self.noise.named_parameters(prefix="initial_noise")))
        if weights is not None:
            self._start_from(Path(weights))
        self._standard = False

    @staticmethod
    def validate(model: str | None = None, weights: str | None = None, **others: Any) -> None:
        """Check what needs no model in memory; raises ``UserError``. ``others`` are options that are not looked at."""
        if model is not None:
            loading.resolve(model)
        if weights is not None and not Path(weights).is_file():
            raise UserError(f"pipeline.weights: '{weights}' is no file; the folder of an exported model has {FILE}")

    @staticmethod
    def offers(*others: Any, **options: Any) -> frozenset[str]:
        """The verbs of a policy with these options."""
        return InitialNoisePolicy.verbs

    @staticmethod
    def forwards_per_sample(num_steps: int, **others: Any) -> dict[str, int]:
        """Network rows that one sample costs per verb."""
        return {"rollout": num_steps, "decisions": 0, "generate": num_steps}

    @property
    def has_frozen_base(self) -> bool:
        """The reference is N(0, 1)."""
        return True

    def to(self, device: torch.device | str) -> InitialNoisePolicy:
        """Move the pipeline and the distribution."""
        super().to(device)
        self.noise.to(device)
        return self

    @torch.no_grad()
    def rollout(self, prompts: Sequence[Prompt], group_size: int, seed: int, step: int = 0) -> Rollout:
        """Draw ``group_size`` initial noises per prompt and sample from each; see :class:`mmrl.policy.Policy`."""
        keys = list(prompt_keys(prompts))
        rows = [(g, k) for g in range(len(prompts)) for k in range(group_size)]
        seeds = [derive_seed(seed, *keys[g], k) for g, k in rows]
        everyone = [prompts[g] for g, _ in rows]
        mean, std = self._distribution(everyone)
        x = self._drawn(everyone, seeds, mean, std)
        rollout = self._sample(everyone, torch.tensor([g for g, _ in rows]), seeds, seeds, (), 0, x)
        states = torch.stack([x, rollout.trace.states[:, -1]], 1)
        ends = torch.tensor([0, self.num_steps]).expand(len(rows), -1)
        before = torch.full((len(rows), 1), -1)
        trace = Trace(states, ends, before, torch.zeros(len(rows), 1, dtype=torch.float64), rollout.trace.seeds)
        logp = gaussian_logp(x, mean, _spread(std, x))[:, None]
        kept = mean[:, None] if self.keep_mean else None
        mask = torch.ones_like(logp, dtype=torch.bool)
        return replace(rollout, logp=logp, mask=mask, trace=trace, mean=kept, std=std[:, None])

    def decisions(self, rollout: Rollout, steps: Sequence[int] | None = None) -> Decisions:
        """Score the recorded draws again, with gradient."""
        x = rollout.trace.states[:, 0].to(self.device)
        mean, std = self._distribution(rollout.samples.prompts)
        logp = gaussian_logp(x, mean, _spread(std, x))
        return Decisions(logp[:, None], x[:, None], mean[:, None], std[:, None], torch.ones_like(std)[:, None])

    def initial_states(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """x_T ``[N, ...]`` drawn from the learned distribution; row k's is a function of ``seeds[k]`` alone."""
        return self._drawn(prompts, seeds, *self._distribution(prompts))

    @contextlib.contextmanager
    def _frozen_base(self) -> Iterator[None]:
        self._standard = True
        try:
            yield
        finally:
            self._standard = False

    def export(self, folder: Path) -> None:
        """Write ``initial_noise.safetensors``, for the option ``weights``."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.noise.state_dict().items()}, Path(folder) / FILE)

    def _start_from(self, path: Path) -> None:
        try:
            self.noise.load_state_dict(load_file(path))
        except RuntimeError as error:
            what = "another pipeline, call, rank or learn_std"
            raise UserError(f"pipeline.weights: '{path}' was learned with {what}") from error

    def _drawn(self, prompts: Sequence[Prompt], seeds: Sequence[int], mean: Tensor, std: Tensor) -> Tensor:
        return mean + _spread(std, mean) * self.start(prompts, seeds)

    def _distribution(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Means ``[N, ...]`` and stds ``[N]``. Each prompt's is computed by itself, whatever batch it is in."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        rows = [self.seam.inspect(prompt, self.train) for prompt in prompts]
        for facts, prompt in zip(rows, prompts, strict=True):
            if facts.latent_shape != self.noise.mean.shape[1:]:
                here, learned = tuple(facts.latent_shape), tuple(self.noise.mean.shape[1:])
                name = prompt.id or prompt.text
                raise UserError(
                    f"prompt '{name}' has latents of shape {here}, but initial noise is learned for {learned}"
                )
            if id(facts) not in found:
                found[id(facts)] = self.noise(facts.text)
        mean, std = (torch.stack(values) for values in zip(*(found[id(facts)] for facts in rows), strict=True))
        return (torch.zeros_like(mean), torch.ones_like(std)) if self._standard else (mean, std)


def _spread(std: Tensor, like: Tensor) -> Tensor:
    return std.view(-1, *[1] * (like.ndim - 1))
