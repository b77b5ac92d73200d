"""Every promised pipeline, as a tiny random instance of its real class, through every verb of the policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from zoo import EXTRA, ZOO, Entry

from mmrl import Prompt, Rollout, Samples
from mmrl.errors import UserError
from mmrl.seeding import derive_seed, generator
from mmrl.types import Chain
from pipelines import DiffusionPolicy, LoRA, latents
from pipelines.scheduler_seam import Plan

STEPS = 4
REFUSED = {
    "StableAudio": "EDMDPMSolverMultistepScheduler",
    "FluxImg2Img": "strength",
    "StableDiffusion3Img2Img": "strength",
}
NO_REPLAY = {"LTXImageToVideo": "prepares no latents of the recorded shape"}
WORKING_EXTRA = [name for name in EXTRA if name not in REFUSED and name not in NO_REPLAY]


@dataclass
class Case:
    name: str
    entry: Entry
    policy: DiffusionPolicy
    rollout: Rollout

    @property
    def columns(self) -> int:
        return self.rollout.logp.shape[1]


def make_case(name: str) -> Case:
    entry = {**ZOO, **EXTRA}[name]()
    policy = DiffusionPolicy(entry.pipe, num_steps=STEPS, call=entry.call, batch_size=4)
    prompts = [Prompt(text=text, id=text, inputs=entry.inputs) for text in entry.prompts]
    return Case(name, entry, policy, policy.rollout(prompts, group_size=2, seed=7))


@pytest.fixture(scope="module", params=list(ZOO))
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@pytest.fixture(scope="module", params=WORKING_EXTRA)
def extra_case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


def media(samples: Samples) -> torch.Tensor:
    return samples.images if samples.images is not None else samples.videos


def gradient_norm(case: Case, loss: torch.Tensor) -> float:
    """Norm over all trained weights; each network of the pipeline must get a finite, non-zero share."""
    for parameter in case.policy.parameters:
        parameter.grad = None
    loss.backward()
    grads = [p.grad for p in case.policy.parameters if p.grad is not None]
    for parameter in case.policy.parameters:
        parameter.grad = None
    return float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0


def assert_useful(norm: float) -> None:
    assert 0 < norm < float("inf")


def check_exact_replay(case: Case) -> None:
    rollout = case.rollout
    assert rollout.logp.shape == (len(rollout), STEPS - 1)
    assert torch.isfinite(rollout.logp).all()
    window = case.policy.decisions(rollout)
    assert float((window.logp - rollout.logp).abs().max().detach()) == 0.0
    for column in range(case.columns):
        single = case.policy.decisions(rollout, [column])
        assert float((single.logp[:, 0] - rollout.logp[:, column]).abs().max().detach()) == 0.0
    inner = case.policy.decisions(rollout, [1, 2])
    assert float((inner.logp - rollout.logp[:, 1:]).abs().max().detach()) == 0.0
    assert_useful(gradient_norm(case, window.logp.mean()))


def test_rollout_gives_pictures_that_differ(case: Case) -> None:
    pictures = media(case.rollout.samples)
    assert len(pictures) == 2 * len(case.entry.prompts)
    assert torch.isfinite(pictures).all()
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    distances = torch.cdist(pictures.flatten(1), pictures.flatten(1)) + torch.eye(len(pictures)) * 1e9
    assert distances.min() > 1e-3


def test_replay_is_exact(case: Case) -> None:
    check_exact_replay(case)


def first_order(scheduler: Any) -> Any:
    """A scheduler of diffusers that takes plain Euler (or DDIM) steps on the grid of ``scheduler``."""
    if isinstance(scheduler, (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.CogVideoXDDIMScheduler)):
        return scheduler
    if isinstance(scheduler, diffusers.UniPCMultistepScheduler):
        return type(scheduler).from_config(scheduler.config, solver_order=1, disable_corrector=list(range(STEPS)))
    if isinstance(scheduler, diffusers.DPMSolverMultistepScheduler) and scheduler.config.use_flow_sigmas:
        return type(scheduler).from_config(scheduler.config, solver_order=1)
    return diffusers.DDIMScheduler.from_config(scheduler.config, clip_sample=False)


@torch.no_grad()
def test_ode_samples_equal_the_plain_pipelines(case: Case) -> None:
    """Without noise the seam samples what the untouched pipeline does with a first-order scheduler of diffusers."""
    entry, text = case.entry, case.entry.prompts[0]
    mine = case.policy.generate([Prompt(text=text, inputs=entry.inputs)], seeds=[3])
    own = entry.pipe.scheduler
    entry.pipe.scheduler = first_order(own)
    plain = entry.pipe(
        prompt=text,
        num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(derive_seed(3, "start")),
        output_type="pt",
        **entry.call,
        **entry.inputs,
    )[0]
    entry.pipe.scheduler = own
    assert media(mine).shape == plain.shape
    assert float((media(mine) - plain).abs().max()) < 1e-4


def test_bf16_autocast_replays_within_a_thousandth(case: Case) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        rollout = case.policy.rollout(case.rollout.samples.prompts[::2], group_size=2, seed=8)
        replay = case.policy.decisions(rollout)
    assert replay.logp.dtype == torch.float32
    assert float((replay.logp - rollout.logp).abs().max().detach()) < 1e-3
    assert_useful(gradient_norm(case, replay.logp.mean()))


def test_gradient_checkpointing_changes_nothing(case: Case) -> None:
    fresh = ZOO[case.name]()
    policy = DiffusionPolicy(fresh.pipe, STEPS, call=fresh.call, batch_size=4, gradient_checkpointing=True)
    gradients = []
    for chosen in (case.policy, policy):
        replay = chosen.decisions(case.rollout, [1])
        assert float((replay.logp[:, 0] - case.rollout.logp[:, 1]).abs().max().detach()) == 0.0
        chosen_gradients = torch.autograd.grad(replay.logp.sum(), list(chosen.parameters), allow_unused=True)
        gradients.append(torch.cat([g.flatten() for g in chosen_gradients if g is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def test_fit_has_gradient(case: Case) -> None:
    seeds = list(range(len(case.rollout)))
    error = case.policy.fit(case.rollout, seeds)
    assert error.shape == (len(case.rollout),)
    assert torch.isfinite(error).all()
    assert_useful(gradient_norm(case, error.mean()))


class Finish(Plan):
    """Ends a run at a given latent, so that the pipeline decodes it."""

    def __init__(self, x0: torch.Tensor):
        self.x0 = x0

    def steps(self, total: int) -> list[int]:
        return [total - 1]

    def take(self, index: int, x: torch.Tensor, output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return self.x0


@torch.no_grad()
def test_latents_of_pictures_are_those_the_pipeline_decodes(case: Case) -> None:
    """Encoding scales and packs the VAE's latents; the pipeline's own unpacking and scaling back must undo that."""
    policy, rollout, vae = case.policy, case.rollout[:1], case.entry.pipe.vae
    own = Samples(rollout.samples.prompts, images=rollout.samples.images, videos=rollout.samples.videos)
    shapes = [policy.seam.inspect(own.prompts[0], policy.train).latent_shape]
    seen: dict[str, torch.Tensor] = {}
    encode, decode = vae.encode, vae.decode

    def spy_encode(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = encode(z, *args, **kwargs)
        seen["encoded"] = result.latent_dist.mode() if hasattr(result, "latent_dist") else result.latent
        return result

    def spy_decode(z: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["decoded"] = z
        return decode(z, *args, **kwargs)

    vae.encode = spy_encode
    x0 = latents.encode(case.entry.pipe, own, shapes, batch_size=1)
    del vae.encode
    vae.decode = spy_decode
    policy.seam.run(own.prompts, policy.train, Finish(x0), [0], decode=True)
    del vae.decode
    assert float((seen["encoded"].squeeze() - seen["decoded"].squeeze()).abs().max()) < 1e-4
    assert torch.isfinite(policy.fit(own, [0])).all()


@torch.no_grad()
def test_fit_is_unguided_and_encodes_nothing_twice(case: Case) -> None:
    """Guidance by a second prediction would show as twice the rows; repeated texts and pictures as more encodings."""
    policy, count = case.policy, len(case.rollout)
    policy.fit(case.rollout, list(range(count)))
    before = dict(policy.counters)
    policy.fit(case.rollout, list(range(count)))
    assert policy.counters["network_rows"] - before["network_rows"] == count
    assert policy.counters["prompts_encoded"] == before["prompts_encoded"] <= 2 * len(case.entry.prompts) + 2
    assert policy.counters["images_encoded"] == len(case.entry.inputs)


@torch.no_grad()
def test_jump_to_x0(case: Case) -> None:
    jumped = case.policy.jump_to_x0(case.rollout, 1)
    assert media(jumped).shape == media(case.rollout.samples).shape
    assert torch.isfinite(media(jumped)).all()


def test_backprop_through_the_last_step(case: Case) -> None:
    prompts = case.rollout.samples.prompts[::2]
    samples = case.policy.chain(prompts, [1, 2][: len(prompts)], Chain(0, STEPS, 1)).samples
    assert_useful(gradient_norm(case, media(samples).std()))


@torch.no_grad()
def test_chains_start_from_noise_from_states_and_from_clean_outputs(case: Case) -> None:
    prompts = case.rollout.samples.prompts[::2]
    seeds = [1, 2][: len(prompts)]
    made = case.policy.chain(prompts, seeds, Chain(0, STEPS, 0))
    again = case.policy.chain(prompts, seeds, Chain(0, STEPS, 0), case.policy.start(prompts, seeds))
    assert torch.equal(media(made.samples), media(again.samples))
    cleaned = case.policy.chain(prompts, seeds, Chain(STEPS - 1, STEPS, 0), made)
    assert torch.isfinite(media(cleaned.samples)).all()
    assert not torch.equal(media(cleaned.samples), media(made.samples))


@pytest.mark.parametrize("name", [*ZOO, "Flux2", "Mochi", "WanTwoExperts"])
def test_bf16_weights_replay_exactly(name: str) -> None:
    """The usual way to train a large model: bf16 weights and activations, autocast, checkpointing."""
    entry = {**ZOO, **EXTRA}[name]()
    entry.pipe.to(dtype=torch.bfloat16)
    policy = DiffusionPolicy(entry.pipe, num_steps=STEPS, call=entry.call, gradient_checkpointing=True)
    with torch.autocast("cpu", torch.bfloat16):
        rollout = policy.rollout([Prompt(text=entry.prompts[0], inputs=entry.inputs)], group_size=2, seed=9)
        replay = policy.decisions(rollout, [0, 1])
    assert float((replay.logp - rollout.logp[:, :2]).abs().max().detach()) == 0.0
    replay.logp.mean().backward()
    assert_useful(sum(float(p.grad.float().norm()) for p in policy.parameters if p.grad is not None))


@pytest.mark.parametrize("name", ZOO)
def test_lora_trains_and_loads_in_plain_diffusers(name: str, tmp_path: Path) -> None:
    entry = ZOO[name]()
    prompts = [Prompt(text=entry.prompts[0], inputs=entry.inputs)]
    policy = DiffusionPolicy(entry.pipe, num_steps=STEPS, call=entry.call, lora=LoRA(rank=2))
    rollout = policy.rollout(prompts, group_size=2, seed=5)
    policy.decisions(rollout).logp.mean().backward()
    up = {key: p for key, p in policy.parameters.named.items() if "lora_B" in key}
    assert sum(float(p.grad.norm()) for p in up.values() if p.grad is not None) > 0
    with torch.no_grad():
        for key, p in up.items():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator(5, key)))
        changed = policy.decisions(rollout).logp
        assert float((changed - rollout.logp).abs().max()) > 0
        with policy.reference():
            assert float((policy.decisions(rollout).logp - rollout.logp).abs().max()) == 0.0
        policy.export(tmp_path)
        fresh = ZOO[name]()
        fresh.pipe.load_lora_weights(tmp_path)
        loaded = DiffusionPolicy(fresh.pipe, num_steps=STEPS, call=fresh.call)
        torch.testing.assert_close(media(loaded.generate(prompts, [1])), media(policy.generate(prompts, [1])))


def test_extra_pipelines_replay_exactly(extra_case: Case) -> None:
    check_exact_replay(extra_case)


@pytest.mark.parametrize("name", NO_REPLAY)
def test_what_cannot_be_replayed_says_so(name: str) -> None:
    case = make_case(name)
    with pytest.raises(UserError, match=NO_REPLAY[name]):
        case.policy.decisions(case.rollout)


@pytest.mark.parametrize("name", REFUSED)
def test_refusal_names_the_scheduler(name: str) -> None:
    entry = EXTRA[name]()
    with pytest.raises(UserError, match=REFUSED[name]):
        DiffusionPolicy(entry.pipe, num_steps=STEPS, call=entry.call)
