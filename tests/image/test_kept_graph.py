"""Updates that carry on the rollout's own forwards, against those that run them again."""

import pytest
import torch
from test_diffusion_policy import PROMPTS, make, nudge
from training import training_step

from mmrl import UserError
from mmrl.algorithms.base import Context
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.algorithms.reward_backprop import RewardBackprop
from mmrl.data import PromptSampler
from mmrl.scoring import Scorer
from mmrl.tally import Clock, Tally
from pipelines.branching import Branching


def brightness(samples):
    """Differs within each group but the second, which has no signal."""
    media = samples.videos if samples.images is None else samples.images
    return media.flatten(1).mean(1) * (samples.group % 2 == 0)


brightness.differentiable = True


def gradients(policy, algorithm, micro_batch_size=4, autocast=False):
    """Of one step with one update, and its metrics; the parameters stay as they are."""
    found = {}

    def record(optimizer, *_):
        found.update({name: parameter.grad.clone() for name, parameter in policy.parameters.named.items()})

    optimizer = torch.optim.SGD(list(policy.parameters), lr=0.0)
    optimizer.register_step_pre_hook(record)
    context = Context(policy, Scorer([brightness]), 0, micro_batch_size, Clock(), Tally(), PromptSampler(PROMPTS, 2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        training_step(algorithm, context, optimizer, 0)
    return found, context.tally.result()


def assert_near(found, expected, tolerance=1e-5):
    """Relative to the largest element, since batches of another shape differ in their last bits."""
    scale = max(float(grad.abs().max()) for grad in expected.values())
    assert scale > 0
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("micro_batch_size", [6, 4, 1])
@pytest.mark.parametrize("name", ["StableDiffusion3", "StableDiffusion", "Wan"])
def test_gradients_are_those_of_a_second_forward(name, micro_batch_size):
    found = []
    for keep in (False, True):
        policy = make(name, keep_graph=keep, window={"first": 2})
        nudge(policy)
        algorithm = PolicyGradient(group_size=3, kl_coef=0.1)
        found.append(gradients(policy, algorithm, micro_batch_size))
        counters = policy.counters
    (plain, told), (kept, also) = found
    assert_near(kept, plain)
    assert told["kl"] == pytest.approx(also["kl"], rel=1e-4)
    assert also["ratio/max_abs_dev"] == 0
    # Guidance runs two rows. Six samples of four steps, and the two steps of the group with a signal by the reference.
    assert counters["network_rows"] == 2 * (6 * 4 + 3 * 2)


def test_sampling_is_the_same_bit_for_bit():
    plain, keeping = (make(keep_graph=keep).rollout(PROMPTS, 3, 1) for keep in (False, True))
    assert torch.equal(plain.logp, keeping.logp)
    assert torch.equal(plain.trace.states, keeping.trace.states)
    assert torch.equal(plain.samples.images, keeping.samples.images)
    assert not keeping.logp.requires_grad
    assert not keeping.samples.images.requires_grad


def test_later_updates_run_their_own_forwards():
    found = []
    for keep in (False, True):
        policy = make(keep_graph=keep, guidance=1.0)
        nudge(policy)
        algorithm = PolicyGradient(group_size=4, epochs=2, minibatches=2)
        sampler = PromptSampler(PROMPTS, 2)
        context = Context(policy, Scorer([lambda s: s.images.mean((1, 2, 3))]), 0, 4, Clock(), Tally(), sampler)
        training_step(algorithm, context, torch.optim.SGD(list(policy.parameters), lr=0.1), 0)
        found.append({name: parameter.detach() for name, parameter in policy.parameters.named.items()})
        rows = policy.counters["network_rows"]
    assert_near(found[1], found[0])
    assert rows == 8 * 4 + 3 * 4 * 3  # of the four updates of four samples and three steps, the first is free


def test_nothing_is_kept_of_weights_that_have_changed():
    policy, plain = make(keep_graph=True), make()
    rollout = policy.rollout(PROMPTS, 2, 1)
    for each in (policy, plain):
        nudge(each)
    assert torch.equal(policy.decisions(rollout).logp, plain.decisions(rollout).logp)
    with torch.no_grad():
        assert policy.kept.means(rollout.trace.kept, [0]) is None


def test_copies_of_the_weights_are_asked_themselves():
    policy = make(keep_graph=True)
    nudge(policy)
    rollout = policy.rollout(PROMPTS, 2, 1)
    with policy.reference():
        away = policy.decisions(rollout).logp
    assert not torch.equal(away, rollout.logp)
    policy.parameters.take_snapshot("other")
    policy.parameters.snapshots["other"] = {k: 0 * v for k, v in policy.parameters.snapshots["other"].items()}
    with policy.parameters.swapped("other"):
        assert not torch.equal(policy.decisions(rollout).logp, rollout.logp)
    assert torch.equal(policy.decisions(rollout).logp, rollout.logp)


def test_gradients_under_autocast():
    """Forwards without gradient come first: their low-precision copies of the weights must not be used later."""
    found = []
    for keep in (False, True):
        policy = make(keep_graph=keep, window=[1, 2], guidance=1.0)
        nudge(policy)
        found.append(gradients(policy, PolicyGradient(group_size=3), autocast=True)[0])
    assert_near(found[1], found[0], tolerance=0.02)  # bfloat16 has 8 bits


def test_truncated_backprop_reaches_every_weight_under_autocast():
    policy = make(guidance=1.0)
    nudge(policy)
    whole = gradients(policy, RewardBackprop(grad_steps=1))[0]
    mixed = gradients(policy, RewardBackprop(grad_steps=1), autocast=True)[0]
    assert all(bool(mixed[name].any()) == bool(grad.any()) for name, grad in whole.items())


@pytest.mark.parametrize("options", [{"step": "ode"}, {"branching": Branching()}, {"value_head": True}])
def test_what_it_does_not_go_with_is_refused(options):
    with pytest.raises(UserError, match="keep_graph"):
        make(keep_graph=True, **options)
