"""Runs an unmodified diffusers pipeline under a plan (see :mod:`pipelines.scheduler_seam`).

For the length of one call, four attributes are set on the pipeline instance and removed again: its scheduler, its
``encode_prompt`` (text is encoded once per prompt, one prompt at a time, so that an embedding does not depend on its
neighbours), its ``prepare_latents`` (so that a run can start from a recorded state) and ``encode`` of its VAE (pictures
to edit are encoded once).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.errors import UserError, nearest
from mmrl.types import Prompt
from pipelines.adapters import denoisers
from pipelines.scheduler_seam import Grid, Inspect, Plan, SeamScheduler, base_scheduler

# The only lines that know a pipeline by name: the arguments that switch guidance off, where the usual ones do not, ...
GUIDANCE_OFF = {
    "ZImagePipeline": {"guidance_scale": 0.0},
    "ZImageOmniPipeline": {"guidance_scale": 0.0},
    "Krea2Pipeline": {"guidance_scale": 0.0},
}
# ... the pipelines whose code takes one row a call ...
ONE_ROW = {
    "QwenImageEditPlusPipeline",
    "LTXImageToVideoPipeline",
    "CogVideoXImageToVideoPipeline",
    "HunyuanVideo15Pipeline",
}
# ... and those whose code fails without a step.
NEEDS_A_STEP = {"LatentConsistencyModelPipeline"}

IMAGE_CACHE = 64
# Under what names pipelines and their parts give the samples a second of a waveform.
RATES = ("sample_rate", "sampling_rate")

_RESERVED = {
    "prompt": "prompts are the rows of 'data'",
    "num_inference_steps": "set 'num_steps'",
    "generator": "seeds come from 'seed'",
    "latents": "they are drawn per sample",
    "output_type": "the policy sets it",
    "return_dict": "the policy sets it",
    "callback_on_step_end": "the scheduler seam sees every step",
    "num_images_per_prompt": "set 'group_size'",
    "num_videos_per_prompt": "set 'group_size'",
}


@dataclass(frozen=True, eq=False)
class Call:
    """How the pipeline is called: number of steps and extra keyword arguments."""

    num_steps: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Facts:
    """What a run without steps shows about one prompt under one call.

    Attributes:
        grid: the noise levels.
        latent_shape: shape of one row's state, as the scheduler sees it.
        text_shapes: shapes of the row's text embeddings; rows where they differ cannot share a batch.
        text: float32 ``[D]`` on the CPU, the means over tokens of all these embeddings, end to end.
        prompt: kept so that the identities in the cache key stay taken.
    """

    grid: Grid
    latent_shape: torch.Size
    text_shapes: tuple
    text: Tensor
    prompt: Prompt


class Seam:
    """One pipeline, ready to run under plans.

    Args:
        pipe: a diffusers pipeline; left as it was between calls, except that its progress bar is off. Offloading is set
            up before it comes here.
        text_cache: how many encoded prompts to keep.

    Attributes:
        counters: ``network_forwards``, ``network_rows`` (their batch sizes added up), ``prompts_encoded``,
            ``images_encoded`` (pictures to edit), ``images_decoded``.

    Raises:
        UserError: the pipeline has no denoiser or no scheduler that the seam can take the place of.
    """

    def __init__(self, pipe: Any, text_cache: int = 512):
        self.name = type(pipe).__name__
        if not denoisers(pipe) or not hasattr(pipe, "scheduler") or not hasattr(pipe, "prepare_latents"):
            raise UserError(
                f"pipeline {self.name} has no scheduler seam: it needs a scheduler, prepare_latents and a transformer "
                "or unet"
            )
        self.pipe = pipe
        self.base = base_scheduler(pipe.scheduler, self.name)
        self.counters: Counter = Counter()
        self.call = inspect.unwrap(type(pipe).__call__)
        self.arguments = inspect.signature(self.call).parameters
        if "strength" in self.arguments:
            raise UserError(
                f"pipeline {self.name} has no scheduler seam: it starts part of the way down its own schedule "
                "(argument 'strength'); use the text-to-image or editing pipeline of the model"
            )
        self.encoding = inspect.signature(pipe.encode_prompt) if hasattr(pipe, "encode_prompt") else None
        self.text_cache = text_cache
        self._texts: OrderedDict[str, Any] = OrderedDict()
        self._images: OrderedDict[str, Any] = OrderedDict()
        self._facts: OrderedDict[tuple, Facts] = OrderedDict()
        self._run_device: tuple[torch.device, torch.device] | None = None
        self._view = _view(pipe, self._execution_device)
        pipe.set_progress_bar_config(disable=True)
        for module in denoisers(pipe).values():
            module.register_forward_pre_hook(self._count_forward, with_kwargs=True)

    @property
    def is_flow(self) -> bool:
        """Flow matching, as opposed to DDPM-type."""
        return hasattr(self.base, "sigmas")

    @property
    def is_consistency(self) -> bool:
        """A latent consistency model, whose sampler adds noise again in each step."""
        return self.base.config.get("timestep_scaling") is not None

    @property
    def sample_rate(self) -> int | None:
        """Samples a second of the waveforms that the pipeline makes; None where it does not say."""
        parts = [self.pipe, *(getattr(getattr(self.pipe, name, None), "config", None) for name in ("vocoder", "vae"))]
        return next((rate for part in parts for key in RATES if (rate := getattr(part, key, None))), None)

    @property
    def device(self) -> torch.device:
        """Where the denoiser lives."""
        return next(next(iter(denoisers(self.pipe).values())).parameters()).device

    def check_call(self, kwargs: Mapping[str, Any], key: str) -> None:
        """Raise ``UserError`` when the pipeline's call does not take one of these keyword arguments."""
        for name in kwargs:
            if name in _RESERVED:
                raise UserError(f"{key}.{name} cannot be set: {_RESERVED[name]}")
            if name not in self.arguments:
                raise UserError(f"{key}.{name} is not an argument of {self.name}{nearest(name, self.arguments)}")

    def guidance_off(self) -> dict[str, Any]:
        """Call arguments under which the network's conditional prediction comes out unguided."""
        if self.name in GUIDANCE_OFF:
            return GUIDANCE_OFF[self.name]
        if "true_cfg_scale" in self.arguments:
            return {"true_cfg_scale": 1.0}
        # A network that takes the guidance scale as an input (FLUX.1, FLUX.2) has no guidance to switch off.
        distilled = any(getattr(module.config, "guidance_embeds", False) for module in denoisers(self.pipe).values())
        return {} if distilled or "guidance_scale" not in self.arguments else {"guidance_scale": 1.0}

    def inspection(self) -> Inspect:
        """A plan that runs as little of the pipeline as can be."""
        return Inspect(int(self.name in NEEDS_A_STEP))

    def inspect(self, prompt: Prompt, call: Call) -> Facts:
        """Grid and shapes of ``prompt`` under ``call``; computed once."""
        key = (prompt.text, _identity(prompt), id(call))
        if key not in self._facts:
            plan = self.inspection()
            seen: dict[str, Any] = {"texts": []}
            self.run([prompt], call, plan, [0], seen=seen)
            shapes, text = tuple(_shapes(row) for row in seen["texts"]), _pooled(seen["texts"])
            self._facts[key] = Facts(plan.grid, seen["latents"].shape[1:], shapes, text, prompt)
            _trim(self._facts, 4 * self.text_cache)
        self._facts.move_to_end(key)
        return self._facts[key]

    def batches(self, prompts: Sequence[Prompt], call: Call) -> list[list[int]]:
        """Row numbers that can share one pipeline call: same extra inputs, same shapes of text and latents."""
        groups: dict[tuple, list[int]] = {}
        for row, prompt in enumerate(prompts):
            facts = self.inspect(prompt, call)
            alone = row if self.name in ONE_ROW else None
            groups.setdefault((_identity(prompt), facts.text_shapes, facts.latent_shape, alone), []).append(row)
        return list(groups.values())

    def run(
        self,
        prompts: Sequence[Prompt],
        call: Call,
        plan: Plan,
        seeds: Sequence[int],
        x: Tensor | None = None,
        grad: bool = False,
        decode: bool = False,
        seen: dict[str, Any] | None = None,
    ) -> Tensor:
        """One call of the pipeline for rows that :meth:`batches` puts together.

        Args:
            prompts: N rows.
            call: number of steps and extra arguments.
            plan: what to do at each step; results are collected there.
            seeds: per row, of the noise that the pipeline itself draws (x_T first).
            x: ``[N, ...]`` the state to start from instead of x_T.
            grad: whether the network calls carry gradient (a plan may switch it on later).
            decode: return pictures ``[N, 3, H, W]`` or clips ``[N, F, 3, H, W]`` in [0, 1]; otherwise latents.
            seen: filled with ``latents`` (x_T) and ``texts`` (embeddings of the first row).
        """
        first, count = prompts[0], len(prompts)
        inputs = _inputs(first, self.arguments)
        self.check_call(first.inputs, f"inputs of prompt '{first.id or first.text}'")
        kwargs = {**call.kwargs, **inputs}
        for name, value in kwargs.items():
            if isinstance(value, str) and name.startswith(("negative_prompt", "prompt_")):
                kwargs[name] = [value] * count
            elif isinstance(value, Tensor) and value.shape[:1] == (1,) and ("embeds" in name or "mask" in name):
                kwargs[name] = value.expand(count, *value.shape[1:])
        kwargs["prompt"] = None if "prompt_embeds" in kwargs else [prompt.text for prompt in prompts]
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        with self._installed(plan, count, x, seen), torch.set_grad_enabled(grad):
            output = self.call(
                self._view,
                num_inference_steps=call.num_steps,
                generator=generators,
                output_type="pt" if decode else "latent",
                return_dict=False,
                **kwargs,
            )[0]
        if decode:
            self.counters["images_decoded"] += count
        return output

    @contextlib.contextmanager
    def _installed(self, plan: Plan, count: int, x: Tensor | None, seen: dict[str, Any] | None) -> Iterator[None]:
        # Written past __setattr__, which would record the stand-in in the pipeline's config.
        own = vars(self.pipe)
        scheduler = own["scheduler"]
        own["scheduler"] = stand_in = SeamScheduler(self.base, plan)
        own["prepare_latents"] = self._prepare_latents(self.pipe.prepare_latents, x, seen, stand_in)
        if self.encoding is not None:
            own["encode_prompt"] = self._encode_prompt(self.pipe.encode_prompt, count, seen)
        vae = getattr(self.pipe, "vae", None)
        if hasattr(vae, "encode"):
            vars(vae)["encode"] = self._encode_image(vae.encode)
        try:
            yield
        finally:
            vars(vae or self.pipe).pop("encode", None)
            own["scheduler"] = scheduler
            own.pop("prepare_latents")
            own.pop("encode_prompt", None)

    def _execution_device(self) -> torch.device:
        here = self.device
        if self._run_device is None or self._run_device[0] != here:
            self._run_device = (here, self.pipe._execution_device)
        return self._run_device[1]

    def _prepare_latents(
        self, original: Callable, x: Tensor | None, seen: dict[str, Any] | None, scheduler: SeamScheduler
    ) -> Callable:
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            with torch.no_grad():
                result = original(*args, **kwargs)
            parts = list(result) if isinstance(result, tuple) else [result]
            scheduler.state_dtype = parts[0].dtype
            if seen is not None:
                seen["latents"] = parts[0]
            if x is not None:
                for i, part in enumerate(parts):
                    if isinstance(part, Tensor) and part.shape == x.shape:
                        parts[i] = x.to(part.device, part.dtype)
                        break
                else:
                    raise UserError(f"pipeline {self.name} prepares no latents of the recorded shape {tuple(x.shape)}")
            return tuple(parts) if isinstance(result, tuple) else parts[0]

        return prepare_latents

    def _encode_prompt(self, original: Callable, count: int, seen: dict[str, Any] | None) -> Callable:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            arguments = self.encoding.bind(*args, **kwargs).arguments
            rows = []
            for k in range(count):
                row = {name: _row(name, value, k, count) for name, value in arguments.items()}
                key = _fingerprint(row)
                if key not in self._texts:
                    # Always in the encoder's own precision, so that a cached embedding is the same one whether
                    # training (with autocast) or evaluation (perhaps without) asked for it first.
                    with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                        self._texts[key] = original(**row)
                    self.counters["prompts_encoded"] += 1
                    _trim(self._texts, max(self.text_cache, count))
                self._texts.move_to_end(key)
                rows.append(self._texts[key])
            if seen is not None:
                seen.setdefault("texts", []).append(rows[0])
            return _assemble(rows)

        return encode_prompt

    def _encode_image(self, original: Callable) -> Callable:
        """The VAE's encoder, which sees condition images; like texts, each is encoded once."""

        def encode(*args: Any, **kwargs: Any) -> Any:
            key = _fingerprint([args, kwargs])
            if key not in self._images:
                with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                    self._images[key] = original(*args, **kwargs)
                self.counters["images_encoded"] += 1
                _trim(self._images, IMAGE_CACHE)
            self._images.move_to_end(key)
            return self._images[key]

        return encode

    def _count_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        batch = next(value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, list)))
        self.counters["network_forwards"] += 1
        self.counters["network_rows"] += len(batch)


def _view(pipe: Any, execution_device: Callable[[], torch.device]) -> Any:
    """The same pipeline, sharing all state, that knows its device without a search.

    Diffusers looks through every module of every component for offloading hooks, in each call: a replay of one step is
    one network forward, and the search took 6 % of a forward of 120 ms.
    """
    kind = type(pipe)
    quick = type(kind.__name__, (kind,), {"_execution_device": property(lambda _: execution_device())})
    view = object.__new__(quick)
    object.__setattr__(view, "__dict__", vars(pipe))
    return view


def _inputs(prompt: Prompt, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Extra call arguments of one prompt; its condition images go to ``image`` unless ``inputs`` has one."""
    inputs = dict(prompt.inputs)
    if prompt.images and "image" in arguments and "image" not in inputs:
        images = [_open(image) for image in prompt.images]
        inputs["image"] = images[0] if len(images) == 1 else images
    return inputs


def _open(image: Any) -> Any:
    return _read(str(image)) if isinstance(image, str) or hasattr(image, "__fspath__") else image


@functools.lru_cache(maxsize=256)
def _read(image: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(image) as picture:
            return picture.convert("RGB")
    except (FileNotFoundError, UnidentifiedImageError) as error:
        raise UserError(f"condition image '{image}' cannot be read as a picture: {error}") from error


def _identity(prompt: Prompt) -> tuple:
    """Two prompts with the same identity can share a pipeline call as far as their extra inputs go."""
    return (*sorted((name, id(value)) for name, value in prompt.inputs.items()), *(id(i) for i in prompt.images))


def _row(name: str, value: Any, k: int, count: int) -> Any:
    """Row ``k`` of an argument that has one entry per row; anything else as it is."""
    if name == "batch_size":
        return 1
    if isinstance(value, (list, tuple)) and len(value) == count:
        return [value[k]]
    if isinstance(value, Tensor) and value.shape[:1] == (count,):
        return value[k : k + 1]
    return value


def _fingerprint(value: Any) -> str:
    """Equal for arguments of equal content."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_fingerprint(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_fingerprint(item) for item in value) + "]"
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        return f"{value.dtype}{tuple(value.shape)}{_digest(data.view(torch.uint8).numpy().tobytes())}"
    if hasattr(value, "tobytes"):  # numpy arrays and pictures
        return f"{type(value).__name__}{getattr(value, 'size', '')}{_digest(value.tobytes())}"
    return repr(value)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _shapes(value: Any) -> Any:
    """Shapes of the tensors in a row's text encoding; lists hold rows of any length and have none."""
    if isinstance(value, tuple):
        return tuple(_shapes(item) for item in value)
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _pooled(value: Any) -> Tensor:
    """Means over all but the last axis of the numbers in a row's text encoding, end to end."""
    if isinstance(value, (tuple, list)):
        return torch.cat([torch.zeros(0), *(_pooled(item) for item in value)])
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.float().reshape(-1, value.shape[-1]).mean(0).cpu()
    return torch.zeros(0)


def _assemble(rows: Sequence[Any]) -> Any:
    """Encodings of single rows as the encoding of the batch.

    What has a leading axis of 1 is joined along it; the rest (position ids without a batch axis) is the same for all.
    """
    first = rows[0]
    if isinstance(first, tuple):
        return tuple(_assemble([row[i] for row in rows]) for i in range(len(first)))
    if isinstance(first, list):
        return [item for row in rows for item in row]
    if isinstance(first, Tensor) and first.shape[:1] == (1,):
        return torch.cat(list(rows))
    return first


def _trim(cache: OrderedDict, size: int) -> None:
    while len(cache) > size:
        cache.popitem(last=False)
