"""Reward backprop: which stretch of the sampler carries gradient, and what the loss is made of."""

import json
import math

import pytest
import torch
from PIL import Image
from table_policy import table_config
from tiny_run import tiny_config
from zoo import ZOO

from mmrl import Prompt
from mmrl.algorithms.base import Context
from mmrl.algorithms.reward_backprop import RewardBackprop
from mmrl.checks import check
from mmrl.components import algorithm_component, build_algorithm
from mmrl.config import parse_config
from mmrl.errors import UserError
from mmrl.noise_optimisation import optimise_noise
from mmrl.scoring import Scorer, Scores
from mmrl.tally import Clock, Tally
from mmrl.types import Chain, Samples
from pipelines import DiffusionPolicy
from rewards import load_reward

NAMES = ["reward_backprop", "draft", "draft_lv", "alignprop", "refl", "controlnet_pp", "ctrl_u", "instructvideo"]
GREY = torch.full((3, 16, 16), 0.5)


def named(name, **options):
    return build_algorithm(algorithm_component({"type": name, **options}, where="test", path="algorithm"))


def context(num_steps=4, micro_batch_size=4, **options):
    entry = ZOO["StableDiffusion3"]()
    policy = DiffusionPolicy(entry.pipe, num_steps=num_steps, call={**entry.call, "guidance_scale": 1.0}, **options)
    policy.parameters.take_snapshot("reference")
    scorer = Scorer([load_reward("pixels", measure="brightness")])
    return Context(policy, scorer, 7, micro_batch_size, Clock(), Tally())


def gradient(algorithm, lent, prompts, step=0):
    """Of one training step, all parameters in one row."""
    for parameter in lent.policy.parameters:
        parameter.grad = None
    (update,) = algorithm.updates(lent, algorithm.collect(lent, prompts, step), step)
    for micro_batch in update.micro_batches:
        algorithm.loss(lent, micro_batch).backward()
    return torch.cat([p.grad.flatten() for p in lent.policy.parameters if p.grad is not None])


PROMPTS = [Prompt(f"picture {k}", id=str(k), target=GREY) for k in range(2)]


def test_published_chains():
    def places(name, steps, **options):
        algorithm = named(name, **options)
        return {algorithm.chain(steps, 3, step) for step in range(200)}

    assert places("draft", 50) == {Chain(0, 50, 50)}
    assert places("reward_backprop", 50, grad_steps=3) == {Chain(0, 50, 3)}
    assert places("reward_backprop", 2, grad_steps=3) == {Chain(0, 2, 2)}
    assert places("alignprop", 5) == {Chain(0, 5, k) for k in range(1, 6)}
    # ReFL's code: 30 to 39 steps of 40 without gradient, one with.
    assert places("refl", 40) == {Chain(0, k, 1, jump=True) for k in range(31, 41)}
    # Noise levels up to 200 of 1000.
    assert places("controlnet_pp", 20) == {Chain(k, k + 1, 1, jump=True) for k in range(16, 20)}
    assert places("instructvideo", 20) == {Chain(8, 20, 1)}
    assert named("refl").network_calls(40) == (40, 1)
    assert named("draft_lv").network_calls(10) == (12, 3)
    assert named("controlnet_pp").network_calls(20) == (1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"renoise": 2, "grad_steps": 3}, "repeats the sampler's last step"),
        ({"uncertainty": 1.0}, "set group_size to 2 or more"),
        ({"stop": (0.9, 0.5)}, "the first number must be the smaller"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(UserError, match=message):
        RewardBackprop(**options)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_raises_its_reward(name):
    """The picture gets brighter, or the grey target, noised and cleaned, does."""
    lent = context(num_steps=2)
    policy = lent.policy
    # The pull towards the target, which is no brighter, is tested apart.
    algorithm = named(name, group_size=2, fit_coef=0.0)
    source = Samples(PROMPTS) if algorithm.begin else None
    chain = Chain(1 if source else 0, 2, 0)

    def brightness():
        with torch.no_grad():
            return policy.chain(PROMPTS, [11, 12], chain, source).samples.images.mean()

    before = brightness()
    for step in range(4):
        gradient(algorithm, lent, PROMPTS, step)
        with torch.no_grad():
            for parameter in policy.parameters:
                parameter -= 0.005 * parameter.grad.sign()
    assert brightness() > before + 0.001


def test_targets_are_fitted_as_well():
    lent = context()
    algorithm = named("controlnet_pp", fit_coef=3.0)
    assert algorithm.verbs == {"chain", "fit"}
    both = gradient(algorithm, lent, PROMPTS)
    reward = gradient(named("controlnet_pp", fit_coef=0.0), lent, PROMPTS)
    (update,) = algorithm.updates(lent, PROMPTS, 0)
    (part,) = update.micro_batches
    for parameter in lent.policy.parameters:
        parameter.grad = None
    lent.policy.fit(Samples(PROMPTS), part.seeds).mean().backward()
    fit = torch.cat([p.grad.flatten() for p in lent.policy.parameters if p.grad is not None])
    assert torch.allclose(both, reward + 3 * fit, rtol=1e-3, atol=1e-6)


def test_gradient_does_not_depend_on_micro_batches():
    for algorithm in (named("draft_lv"), RewardBackprop(group_size=2, uncertainty=3.0, hinge=1.0, distance_coef=1.0)):
        lent = context()
        whole = gradient(algorithm, lent, PROMPTS)
        lent.micro_batch_size = 1
        assert torch.allclose(gradient(algorithm, lent, PROMPTS), whole, rtol=1e-4, atol=1e-6)
        assert whole.abs().max() > 1e-4


def test_draft_lv_is_the_mean_of_gradients_of_the_last_step():
    lent = context()
    first = gradient(named("reward_backprop"), lent, PROMPTS)
    mean = gradient(named("draft_lv", renoise=1), lent, PROMPTS)
    policy, algorithm = lent.policy, named("draft_lv", renoise=1)
    (update,) = algorithm.updates(lent, algorithm.collect(lent, PROMPTS, 0), 0)
    one, other = [(algorithm.loss(lent, part), part)[1] for part in update.micro_batches]
    assert (one.chain, other.chain) == (Chain(0, 4, 1), Chain(3, 4, 1))
    assert torch.equal(other.source.trace.states, one.made.trace.states)
    for parameter in policy.parameters:
        parameter.grad = None
    again = policy.chain(PROMPTS, other.seeds, other.chain, other.source)
    (-lent.scorer(again.samples, grad=True).total.mean()).backward()
    second = torch.cat([p.grad.flatten() for p in policy.parameters if p.grad is not None])
    assert torch.allclose(mean, (first + second) / 2, rtol=1e-3, atol=1e-6)
    # The last step's level is low, so the same picture comes out, but not quite.
    difference = (again.samples.images - one.made.samples.images).abs().max()
    assert 0 < difference < 0.5


def test_losses_by_hand():
    def losses(algorithm, totals):
        total = torch.tensor(totals)
        return algorithm._per_sample(Scores(total, total[:, None], torch.ones(1), {}, {})).tolist()

    assert losses(RewardBackprop(), [0.5, math.nan]) == [-0.5, 0.0]
    assert losses(RewardBackprop(hinge=2.0), [0.5, 3.0]) == [1.5, 0.0]
    unsure = losses(RewardBackprop(group_size=2, hinge=2.0, uncertainty=0.5), [1.0, 0.4])
    assert unsure == pytest.approx([math.exp(-0.3) * 1.0 + 0.3, math.exp(-0.3) * 1.6 + 0.3])
    three = losses(RewardBackprop(group_size=3, hinge=1.0, uncertainty=1.0), [0.0, 0.3, 0.6])
    assert three[1] == pytest.approx(0.7)


def test_distance_to_the_base_model_starts_at_zero_and_pulls_back():
    lent = context()
    algorithm = RewardBackprop(distance_coef=1.0)
    assert algorithm.verbs == {"chain", "denoise"}
    assert algorithm.needs_reference
    plain = gradient(RewardBackprop(), lent, PROMPTS)
    assert torch.allclose(gradient(algorithm, lent, PROMPTS), plain, atol=1e-6)
    assert lent.tally.result()["distance"] == 0.0
    with torch.no_grad():
        for parameter in lent.policy.parameters:
            parameter += 0.01
    lent.tally = Tally()
    gradient(algorithm, lent, PROMPTS)
    assert lent.tally.result()["distance"] > 0


def test_chains_from_states_targets_and_noise_agree():
    """From x_T it is the sampler; from a target the first state is the noised latent; a jump is the x0 estimate."""
    policy = context().policy
    whole = policy.chain(PROMPTS, [1, 2], Chain(0, 4, 0))
    assert torch.equal(whole.samples.images, policy.generate(PROMPTS, [1, 2]).images)
    x = policy.start(PROMPTS, [1, 2])
    assert torch.equal(policy.chain(PROMPTS, [1, 2], Chain(0, 4, 0), x).samples.images, whole.samples.images)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(policy.chain(PROMPTS, [1, 2], Chain(0, 4, 4), x).samples.images.sum(), x)
    assert slope.abs().sum() > 0
    rollout = policy.rollout(PROMPTS, 1, seed=5)
    jumped = policy.chain(PROMPTS, [1, 2], Chain(1, 2, 1, jump=True), rollout.trace.at(1))
    with torch.no_grad():
        torch.testing.assert_close(jumped.samples.images.detach(), policy.jump_to_x0(rollout, 1).images)


def test_what_cannot_be_differentiated_is_refused_before_anything_is_loaded(tmp_path):
    config = tiny_config("no/such-model", tmp_path / "run", algorithm={"type": "draft"})
    config["rewards"] = [{"type": "jpeg", "goal": "compressibility"}]
    with pytest.raises(UserError, match=r"do not flow through reward 'jpeg' \(they do through aesthetic, clip, "):
        parse_config(config)
    with pytest.raises(UserError, match=r"needs a policy that offers chain.*only through the sampler"):
        parse_config(table_config(tmp_path / "run", {"type": "draft"}))


def test_optimised_noise_beats_the_noise_that_was_drawn():
    lent = context(num_steps=2)
    policy = lent.policy
    found = optimise_noise(policy, lent.scorer, PROMPTS, [1, 2], iterations=6, lr=50.0)
    assert found.totals.shape == (6, 2)
    best = lent.scorer(found.samples).total
    assert torch.equal(best, found.totals.max(0).values)
    assert (best > found.totals[0] + 0.01).all()
    assert torch.equal(found.totals[0], lent.scorer(policy.generate(PROMPTS, [1, 2])).total)
    again = policy.chain(PROMPTS, [1, 2], Chain(0, 2, 0), found.noise)
    assert torch.equal(again.samples.images, found.samples.images)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in policy.parameters)
    # Its norm is pulled to that of a Gaussian's typical sample, the square root of the number of elements.
    size = found.noise[0].numel() ** 0.5
    free, held = (
        optimise_noise(policy, lent.scorer, PROMPTS, [1, 2], iterations=9, lr=50.0, norm_coef=coef, max_grad_norm=9.0)
        for coef in (0.0, 1e-3)
    )
    assert (held.noise.flatten(1).norm(dim=1) - size).abs().max() < (
        free.noise.flatten(1).norm(dim=1) - size
    ).abs().max()


def test_pictures_decoded_in_tiles_carry_gradient():
    lent = context(num_steps=2, vae_tiling=True)
    assert lent.policy.pipe.vae.use_tiling
    assert gradient(named("reward_backprop"), lent, PROMPTS).abs().max() > 0


def test_targets_are_files_beside_the_rows(tmp_path):
    Image.new("RGB", (16, 16), "grey").save(tmp_path / "grey.png")

    def checked(**row):
        (tmp_path / "rows.json").write_text(json.dumps([{"text": "picture", **row}]))
        config = tiny_config("some/model", tmp_path / "run", algorithm={"type": "controlnet_pp"})
        config["algorithm"] = {"type": "controlnet_pp"}
        config["data"] = {"prompts": str(tmp_path / "rows.json"), "batch_size": 1}
        return check(parse_config(config))[0].train[0].target

    assert checked(target="grey.png") == str(tmp_path / "grey.png")
    with pytest.raises(UserError, match=r"row 'rows.json\[0\]': target is 'none.png', but"):
        checked(target="none.png")
    with pytest.raises(UserError, match="target is None"):
        checked()
