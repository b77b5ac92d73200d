"""DiffusionPolicy on tiny instances of a flow-matching (SD3) and a DDPM-type (SD 1.5) pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from zoo import ZOO

from mmrl import Prompt, UserError
from mmrl.policy import Policy
from mmrl.types import Chain
from pipelines import DiffusionPolicy, LoRA

PROMPTS = [Prompt("a red circle left of a blue square"), Prompt("two green triangles")]
PIPELINES = ["StableDiffusion3", "StableDiffusion"]


def make(name: str = "StableDiffusion3", guidance: float = 3.0, **options) -> DiffusionPolicy:
    entry = ZOO[name]()
    options = {"num_steps": 4, "lora": LoRA(rank=2), "batch_size": 4, **options}
    return DiffusionPolicy(entry.pipe, call={**entry.call, "guidance_scale": guidance}, **options)


def nudge(policy: DiffusionPolicy, scale: float = 0.1) -> None:
    """Move every trainable weight by seeded noise."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in policy.parameters:
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_replay_is_exact_for_single_steps_and_windows(name, guidance):
    policy = make(name, guidance)
    nudge(policy)
    rollout = policy.rollout(PROMPTS, group_size=3, seed=1)
    assert isinstance(policy, Policy)
    assert rollout.logp.shape == rollout.mask.shape == (6, 3)
    assert rollout.logp.dtype == torch.float32
    assert rollout.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert rollout.samples.images.shape == (6, 3, 16, 16)
    assert 0 <= rollout.samples.images.min() < rollout.samples.images.max() <= 1
    for steps in ([0], [1], [2], [0, 1], [1, 2], [2, 0], None):
        replay = policy.decisions(rollout, steps)
        columns = [0, 1, 2] if steps is None else steps
        assert (replay.logp - rollout.logp[:, columns]).abs().max() == 0.0


@pytest.mark.parametrize("step", ["flow_sde", "dance", "cps", "wan"])
def test_replay_is_exact_for_every_kind_of_step(step):
    policy = make(step=step, noise_level=0.6, window={"random": 2})
    rollout = policy.rollout(PROMPTS, group_size=2, seed=1, step=3)
    assert rollout.logp.shape == (4, 2)
    assert torch.equal(policy.decisions(rollout).logp, rollout.logp)


def test_replay_under_autocast_is_exact_too():
    policy = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollout = policy.rollout(PROMPTS, group_size=2, seed=1)
        replay = policy.decisions(rollout)
    assert rollout.logp.dtype == replay.mean.dtype == rollout.trace.states.dtype == torch.float32
    assert torch.equal(replay.logp, rollout.logp)


def test_rows_survive_selection_and_joining():
    policy = make()
    first, second = (policy.rollout(PROMPTS, group_size=2, seed=seed) for seed in (1, 2))
    joined = type(first).cat([first, second])[[1, 4, 6, 3]]
    torch.testing.assert_close(policy.decisions(joined).logp, joined.logp, rtol=0, atol=1e-5)


def test_windows_of_different_rollouts_can_be_mixed():
    policy = make(window={"progressive": 1, "every": 1})
    parts = [policy.rollout(PROMPTS, group_size=1, seed=1, step=step) for step in (0, 1)]
    joined = type(parts[0]).cat(parts)
    assert joined.trace.steps.flatten().tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(policy.decisions(joined).logp, joined.logp, rtol=0, atol=1e-5)


def test_log_probs_are_those_of_the_recorded_transitions():
    policy = make(keep_mean=True)
    rollout = policy.rollout(PROMPTS, group_size=2, seed=1)
    replay = policy.decisions(rollout)
    std = replay.std[..., None, None, None].double()
    normal = torch.distributions.Normal(replay.mean.double(), std)
    expected = normal.log_prob(replay.action.double()).flatten(2).mean(2)
    torch.testing.assert_close(rollout.logp.double(), expected.detach(), rtol=0, atol=1e-5)
    assert torch.equal(rollout.mean, replay.mean)
    z = (replay.action - replay.mean) / replay.std[..., None, None, None]
    assert abs(z.std().item() - 1) < 0.1


def test_gradient_reaches_every_adapter_and_only_them():
    policy = make()
    nudge(policy)
    rollout = policy.rollout(PROMPTS, group_size=2, seed=1)
    policy.decisions(rollout).logp.sum().backward()
    unused = [name for name, p in policy.parameters.named.items() if p.grad is None or not p.grad.any()]
    # The text stream ends in the last block of SD3, whose queries for it lead nowhere.
    assert all("transformer_blocks.1.attn.add_q_proj" in name for name in unused)
    trainable = {id(p) for p in policy.parameters}
    for part in policy.pipe.components.values():
        if isinstance(part, torch.nn.Module):
            assert not part.training
            assert all(id(p) in trainable for p in part.parameters() if p.requires_grad)


def test_gradient_of_a_window_is_the_sum_over_its_steps_and_over_micro_batches():
    policy = make()
    nudge(policy)
    rollout = policy.rollout(PROMPTS, group_size=2, seed=1)

    def gradient(parts) -> torch.Tensor:
        for parameter in policy.parameters:
            parameter.grad = None
        for rows, steps in parts:
            policy.decisions(rollout[rows], steps).logp.sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters])

    whole = gradient([([0, 1, 2, 3], None)])
    torch.testing.assert_close(gradient([([0, 1, 2, 3], c) for c in policy.decision_chunks(rollout)]), whole)
    torch.testing.assert_close(gradient([([0, 1], None), ([2, 3], None)]), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PIPELINES)
def test_noise_is_a_function_of_seed_prompt_and_number_only(name):
    images = {size: make(name, batch_size=size).rollout(PROMPTS, 3, seed=1).samples.images for size in (1, 2, 6)}
    torch.testing.assert_close(images[1], images[6], rtol=0, atol=1e-5)
    torch.testing.assert_close(images[2], images[6], rtol=0, atol=1e-5)
    alone = make(name).rollout(PROMPTS[1:], 3, seed=1).samples.images
    torch.testing.assert_close(alone, images[6][3:], rtol=0, atol=1e-5)
    other = make(name).rollout(PROMPTS[1:], 3, seed=2).samples.images
    assert (other - alone).abs().max() > 1e-2
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_a_prompt_given_twice_draws_other_noise():
    images = make().rollout([PROMPTS[0], PROMPTS[0]], 1, seed=1).samples.images
    assert (images[0] - images[1]).abs().max() > 1e-2


def test_same_noise_shares_the_start_but_not_the_steps():
    policy = make(same_noise=True, keep_states="all")
    rollout = policy.rollout(PROMPTS, 2, seed=1)
    start, end = rollout.trace.at(0), rollout.trace.at(4)
    assert torch.equal(start[0], start[1])
    assert not torch.equal(start[0], start[2])
    assert (end[0] - end[1]).abs().max() > 1e-2


def test_shared_prefix_equals_the_unshared_one_and_saves_its_forwards():
    options = {"window": [2], "same_noise": True, "batch_size": 8}
    plain, shared = make(**options), make(shared_prefix=True, **options)
    a, b = plain.rollout(PROMPTS, 4, seed=1), shared.rollout(PROMPTS, 4, seed=1)
    torch.testing.assert_close(a.samples.images, b.samples.images, rtol=0, atol=1e-5)
    torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-5)
    assert torch.equal(shared.decisions(b).logp, b.logp)
    rows = 2  # guidance doubles the batch
    assert plain.counters["network_rows"] == rows * 8 * 4
    assert shared.counters["network_rows"] - rows * 8 == rows * (2 * 2 + 8 * 2)


def test_work_is_counted_and_text_is_encoded_once():
    policy = make(window=[0, 2])
    encoder_runs = []
    policy.pipe.text_encoder.register_forward_hook(lambda *_: encoder_runs.append(1))
    rollout = policy.rollout(PROMPTS, group_size=4, seed=1)
    assert dict(policy.counters) == {
        "prompts_encoded": 2,
        "network_forwards": 2 * 4,
        "network_rows": 2 * 8 * 4,
        "images_decoded": 8,
    }
    encodes = len(encoder_runs)
    policy.decisions(rollout)
    policy.rollout(PROMPTS, group_size=4, seed=2)
    assert policy.counters["network_forwards"] == 2 * 4 + 2 * 2 + 2 * 4
    assert policy.counters["prompts_encoded"] == 2
    assert policy.counters["images_decoded"] == 16
    assert len(encoder_runs) == encodes


def test_an_embedding_does_not_depend_on_its_neighbours():
    policy = make()
    alone = policy.generate(PROMPTS[1:], [2]).images
    pair = policy.generate(PROMPTS, [1, 2]).images
    torch.testing.assert_close(pair[1:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_generate_is_the_plain_pipeline_with_a_deterministic_sampler(name):
    from diffusers import DDIMScheduler

    policy = make(name, lora=None)
    ours = policy.generate(PROMPTS, [1, 2]).images
    pipe = ZOO[name]().pipe
    if name == "StableDiffusion":
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    from mmrl.seeding import derive_seed

    theirs = pipe(
        [prompt.text for prompt in PROMPTS],
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(derive_seed(seed, "start")) for seed in (1, 2)],
        output_type="pt",
        **policy.train.kwargs,
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grad_steps", [1, 2])
@pytest.mark.parametrize("name", PIPELINES)
def test_gradient_through_the_last_steps_agrees_with_finite_differences(name, grad_steps):
    """The derivative with respect to weights that move in the last K of three steps only, along a random direction."""
    steps = 3
    policy = make(name, num_steps=steps)
    nudge(policy)
    draw = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=draw) for p in policy.parameters]
    weights = torch.randn(2, 3, 16, 16, generator=draw, dtype=torch.float64)
    shift, forwards = 0.0, 0

    def move(amount: float) -> None:
        if amount == 0:
            return
        with torch.no_grad():
            for parameter, d in zip(policy.parameters, direction, strict=True):
                parameter.add_(amount * d)

    def before_forward(module, args) -> None:
        nonlocal forwards
        if forwards == steps - grad_steps:
            move(shift)
        forwards += 1

    def score(grad_steps: int = 0) -> torch.Tensor:
        nonlocal forwards
        forwards = 0
        images = policy.chain(PROMPTS, [3, 4], Chain(0, steps, grad_steps)).samples.images
        value = (images.double() * weights).sum()
        move(-shift)
        return value

    network = getattr(policy.pipe, "unet", None) or policy.pipe.transformer
    network.register_forward_pre_hook(before_forward)
    score(grad_steps=grad_steps).backward()
    exact = sum((p.grad * d).sum().item() for p, d in zip(policy.parameters, direction, strict=True))
    shift = 1e-2
    above = score().item()
    shift = -1e-2
    below = score().item()
    assert (above - below) / 2e-2 == pytest.approx(exact, rel=0.05)


def test_gradient_of_fewer_steps_leaves_the_picture_alone():
    policy = make()
    plain = policy.generate(PROMPTS, [1, 2]).images
    for k in (1, 2, 4):
        pictures = policy.chain(PROMPTS, [1, 2], Chain(0, 4, k)).samples.images
        assert torch.equal(pictures.detach(), plain)
        assert pictures.requires_grad
    assert not plain.requires_grad


@pytest.mark.parametrize("name", PIPELINES)
def test_fit_error_vanishes_for_a_perfect_prediction_and_depends_on_the_seed_alone(name):
    policy = make(name)
    rollout = policy.rollout(PROMPTS, 2, seed=1)
    loss = policy.fit(rollout, [1, 2, 3, 4])
    assert loss.shape == (4,)
    loss.sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in policy.parameters)
    with torch.no_grad():
        split = torch.cat([policy.fit(rollout[[i]], [i + 1]) for i in range(4)])
        torch.testing.assert_close(loss, split, rtol=1e-4, atol=1e-5)
        repeated = policy.fit(rollout[[0, 0]], [7, 7])
        assert repeated[0] == pytest.approx(repeated[1].item(), rel=1e-5)
        assert (policy.fit(rollout, [5, 6, 7, 8]) - loss).abs().min() > 0
        policy.velocity = lambda prompts, x, time: noised(policy, rollout, x, time)
        assert policy.fit(rollout, [1, 2, 3, 4]).max() < 1e-6


def noised(policy: DiffusionPolicy, rollout, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
    """The exact target, from the closed form of the noising."""
    x0 = rollout.trace.at(4)
    if policy.seam.is_flow:
        return (x - x0) / time.view(-1, 1, 1, 1)
    alpha = policy.seam.base.alphas_cumprod[(time * 1000).round().long() - 1].view(-1, 1, 1, 1)
    return (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()


def test_pictures_fit_like_the_latents_they_encode_to():
    policy = make()
    rollout = policy.rollout(PROMPTS, 1, seed=1)
    from pipelines import latents

    shapes = [rollout.trace.states.shape[2:]] * 2
    rollout.trace.states[:, -1] = latents.encode(policy.pipe, rollout.samples, shapes, 2)
    samples = rollout.samples
    torch.testing.assert_close(policy.fit(samples, [1, 2]), policy.fit(rollout, [1, 2]))
    targets = [Prompt(p.text, target=image) for p, image in zip(PROMPTS, samples.images, strict=True)]
    supervised = type(samples)(targets)
    torch.testing.assert_close(policy.fit(supervised, [1, 2]), policy.fit(rollout, [1, 2]))


@pytest.mark.parametrize("name", PIPELINES)
def test_velocity_of_mixed_times_equals_one_call_each(name):
    policy = make(name)
    x = policy.rollout(PROMPTS, 2, seed=1).trace.at(4)
    prompts = [PROMPTS[0]] * 2 + [PROMPTS[1]] * 2
    time = torch.tensor([0.2, 0.9, 0.9, 0.5])
    with torch.no_grad():
        together = policy.velocity(prompts, x, time)
        alone = torch.cat([policy.velocity(prompts[i : i + 1], x[i : i + 1], time[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    assert (alone[0] - policy.velocity(prompts[:1], x[:1], time[1:2])[0]).abs().max() > 1e-4


def test_jump_to_x0_from_the_last_step_is_the_picture_itself():
    policy = make(keep_states="all")
    rollout = policy.rollout(PROMPTS, 2, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(policy.jump_to_x0(rollout, 3).images, rollout.samples.images, rtol=0, atol=1e-5)
    early = policy.jump_to_x0(rollout, 1).images
    assert early.requires_grad
    assert early.shape == rollout.samples.images.shape


def test_branches_continue_from_the_recorded_state():
    policy = make(keep_states="all")
    rollout = policy.rollout(PROMPTS, 1, seed=1)
    tree = policy.branch(rollout, step=1, copies=3, seed=9)
    assert tree.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert tree.trace.steps[0].tolist() == [1, 2]
    assert torch.equal(tree.trace.at(1), rollout.trace.at(1).repeat_interleave(3, 0))
    assert (tree.samples.images[0] - tree.samples.images[1]).abs().max() > 1e-3
    torch.testing.assert_close(policy.decisions(tree).logp, tree.logp, rtol=0, atol=1e-5)


def test_reference_is_the_start_for_adapters_and_for_all_weights():
    for lora in (LoRA(rank=2), None):
        policy = make(lora=lora)
        if lora is None:
            policy.parameters.take_snapshot("reference")
        rollout = policy.rollout(PROMPTS, 1, seed=1)
        nudge(policy, 0.05)
        with torch.no_grad():
            moved = policy.decisions(rollout).logp
            with policy.reference():
                assert torch.equal(policy.decisions(rollout).logp, rollout.logp)
            assert torch.equal(policy.decisions(rollout).logp, moved)
        assert (moved - rollout.logp).abs().max() > 1e-4


@pytest.mark.parametrize("name", PIPELINES)
def test_an_exported_adapter_loads_in_plain_diffusers(name, tmp_path: Path):
    policy = make(name, lora=LoRA(rank=2, alpha=3.0))
    before = policy.generate(PROMPTS, [1, 2]).images
    nudge(policy)
    ours = policy.generate(PROMPTS, [1, 2]).images
    assert (ours - before).abs().max() > 1e-3
    policy.export(tmp_path)
    plain = ZOO[name]().pipe
    plain.load_lora_weights(tmp_path)
    call = {key: value for key, value in policy.train.kwargs.items() if key != "guidance_scale"}
    theirs = DiffusionPolicy(plain, num_steps=4, call={**call, "guidance_scale": 3.0}).generate(PROMPTS, [1, 2]).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)


def test_a_fully_trained_model_is_exported_as_a_plain_folder_and_loads(tmp_path: Path):
    policy = make(lora=None)
    scheduler = policy.pipe.scheduler
    nudge(policy, 0.01)
    ours = policy.generate(PROMPTS, [1, 2]).images
    assert policy.pipe.scheduler is scheduler
    policy.export(tmp_path)
    again = DiffusionPolicy(DiffusionPolicy.load(str(tmp_path)), num_steps=4, call=dict(policy.train.kwargs))
    torch.testing.assert_close(again.generate(PROMPTS, [1, 2]).images, ours, rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        policy = make(gradient_checkpointing=checkpointing)
        nudge(policy)
        rollout = policy.rollout(PROMPTS, 1, seed=1)
        replay = policy.decisions(rollout)
        assert torch.equal(replay.logp, rollout.logp)
        replay.logp.sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters]))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_ode_rollouts_have_no_decisions():
    policy = make(step="ode")
    rollout = policy.rollout(PROMPTS, 2, seed=1)
    assert rollout.logp.shape == (4, 0)
    assert policy.fit(rollout, [1, 2, 3, 4]).shape == (4,)


def test_prompts_with_other_inputs_run_in_calls_of_their_own():
    policy = make(guidance=3.0)
    plain = policy.generate([PROMPTS[0], PROMPTS[1], PROMPTS[0]], [1, 2, 3]).images
    special = Prompt(PROMPTS[1].text, inputs={"negative_prompt": "blurry"})
    mixed = policy.generate([PROMPTS[0], special, PROMPTS[0]], [1, 2, 3]).images
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=0, atol=1e-5)
    assert (mixed[1] - plain[1]).abs().max() > 1e-4


def test_ready_made_embeddings_stand_in_for_the_text():
    policy = make("StableDiffusion", guidance=1.0)
    embeds = policy.pipe.encode_prompt(PROMPTS[0].text, "cpu", 1, False)[0].detach()
    given = policy.rollout([Prompt(id="0", inputs={"prompt_embeds": embeds})], 2, seed=1)
    written = policy.rollout([Prompt(PROMPTS[0].text, id="0")], 2, seed=1)
    torch.testing.assert_close(given.samples.images, written.samples.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": {"first": 9}}, ["first", "9"]),
        ({"noise_level": 0.0}, ["noise_level", "0.0"]),
        ({"step": "cps", "noise_level": 1.2}, ["1.2", "at most 1"]),
        ({"step": "ddim"}, ["ddim", "flow_sde"]),
        ({"shared_prefix": True}, ["same_noise"]),
        ({"eval_call": {"guidence_scale": 1.0}}, ["guidence_scale", "guidance_scale"]),
        ({"eval_call": {"generator": 1}}, ["generator", "seed"]),
        ({"lora": LoRA(targets=["nothing"])}, ["nothing", "transformer"]),
    ],
)
def test_options_that_do_not_fit_are_refused_in_a_sentence(options, words):
    with pytest.raises(UserError) as error:
        make(**options)
    for word in words:
        assert word in str(error.value)


def test_a_flow_step_on_a_diffusion_model_is_refused():
    with pytest.raises(UserError, match="dance"):
        make("StableDiffusion", step="dance")


def test_models_that_are_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="nowhere"):
        DiffusionPolicy.load("./nowhere")
    with pytest.raises(UserError, match=r"model_index\.json"):
        DiffusionPolicy.load(str(tmp_path))
    with pytest.raises(UserError, match="builtin:imagination"):
        DiffusionPolicy.load("builtin:imagination")
