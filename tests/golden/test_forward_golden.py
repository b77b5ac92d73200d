"""Forward-process and regression methods against what is known in closed form, on a one-dimensional Gaussian flow.

With reward ``R(x) = x`` the optimum of reward less ``beta`` KL to N(m, s^2) is N(m + s^2 / beta, s^2).
"""

import pytest
import torch
from gaussian_flow import GaussianFlow, context, gradients, train, value
from torch.autograd import grad
from torch.nn.functional import logsigmoid

from mmrl import forward_losses, losses
from mmrl.algorithms.forward_process import AdvantageMatching, CentredReward, DiffusionNFT, GroupPreference
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.algorithms.preference import PreferenceOptimisation
from mmrl.algorithms.reward_difference import RewardDifference
from mmrl.algorithms.reward_weighted import RewardWeighted
from mmrl.algorithms.self_correction import off_path
from mmrl.seeding import generator
from mmrl.types import Denoising, mean_square

MEAN, STD, BETA = 0.5, 0.8, 0.8
OPTIMUM = MEAN + STD**2 / BETA
UNCLIPPED = {"advantage": "mean", "advantage_clip": 50.0}


def draws(n=6, dim=3):
    g = torch.Generator().manual_seed(3)
    target, old, x = (torch.randn(n, dim, generator=g) for _ in range(3))
    time, advantage = torch.rand(n, generator=g), torch.randn(n, generator=g)
    return Denoising(target, x, time, time), old, advantage


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_gradient_on_policy_is_advantage_times_that_of_the_error(beta, adaptive):
    now, v, advantage = draws()
    v.requires_grad_()
    now.prediction = v
    clip = 5.0
    loss = clip * forward_losses.nft_loss(now, v.detach(), forward_losses.optimality(advantage, clip), beta, adaptive)
    found = grad(loss.sum(), v)[0]
    # d/dv of A mean((t (v - target))^2) / W
    error = now.time[:, None] * (v - now.target).detach()
    size = error.abs().mean(1, keepdim=True) if adaptive else 1.0
    expected = advantage[:, None] * 2 * now.time[:, None] * error / 3 / size
    torch.testing.assert_close(found, expected)


def test_nft_off_policy_by_hand():
    at = Denoising(*(torch.tensor([[x]]) for x in (1.0, 0.0)), *(torch.tensor([0.5]),) * 2, torch.tensor([[3.0]]))
    # v+ = .5 * 3 + .5 * 2 = 2.5, v- = 1.5 * 2 - .5 * 3 = 1.5; errors of x0: .5 * 1.5 and .5 * .5
    loss = forward_losses.nft_loss(at, torch.tensor([[2.0]]), torch.tensor([0.75]), beta=0.5, adaptive=False)
    assert loss.item() == pytest.approx((0.75 * 0.75**2 + 0.25 * 0.25**2) / 0.5)


def moments():
    """``E_t`` of ``t^2 / var_t^2`` and ``t^4 / var_t^2``; a mean's velocity changes by ``-t / var_t`` with the mean."""
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    variance = (1 - t) ** 2 * STD**2 + t**2
    return (t**2 / variance**2).mean().item(), (t**4 / variance**2).mean().item()


def test_matching_gradient_points_where_the_policy_gradient_does():
    """By the mean: -1 for the policy gradient, -2 s^2 E[t^2 / var^2] for AWM; by the spread: nothing."""
    options = {"group_size": 1024, **UNCLIPPED}
    found = {}
    for name, algorithm in {
        "pg": PolicyGradient(objective="reinforce", **options),
        "awm": AdvantageMatching(clip_range=50.0, **options),
        "crd": CentredReward(adaptive=False, **options),
        "nft": DiffusionNFT(adaptive=False, **options),
    }.items():
        found[name] = gradients(algorithm, context(GaussianFlow(mean=MEAN, std=STD)))
    second, fourth = moments()
    assert found["pg"][0].item() == pytest.approx(-1, abs=0.02)
    assert found["awm"][0].item() == pytest.approx(-2 * STD**2 * second, rel=0.1)
    assert found["nft"][0].item() == pytest.approx(-2 * STD**2 * fourth, rel=0.1)
    # NFT's gradient is CRD's on-policy, up to the reward's mean that the group's own centring takes away.
    torch.testing.assert_close(found["crd"], found["nft"], rtol=0.02, atol=0.02)
    for name, by_parameter in found.items():
        assert by_parameter[1].abs() < 0.12 * by_parameter[0].abs(), name


def bradley_terry(samples):
    """Reward plus Gumbel noise: the better of two is then the first one with probability sigmoid(R_1 - R_2)."""
    own = generator(3, *(f"{x:.6f}" for x in value(samples)[:2].tolist()))
    u = torch.rand(len(samples), generator=own, dtype=torch.float64)
    return value(samples) - (-u.log()).log().float()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pg", "rwr", "awm", "nft", "prdp", "dpo"])
def test_converges_to_the_tilted_distribution(name):
    """To 0.06 in mean and spread, where the mean moves by 0.8; the noise of 100 steps of 256 samples is half of that.

    NFT weighs rewards by t^2 but its KL by 1, so its beta counts as ``beta E[t^2 / var^2] / E[t^4 / var^2]``.
    """
    size = {"group_size": 64}
    algorithm = {
        "pg": lambda: PolicyGradient(
            objective="reinforce", advantage="mean", kl_coef=BETA, kl="k1", kl_gradient="k2", **size
        ),
        "rwr": lambda: RewardWeighted(beta=BETA, samples_from="reference", **size),
        "awm": lambda: AdvantageMatching(clip_range=50.0, kl_coef=BETA, **UNCLIPPED, **size),
        "nft": lambda: DiffusionNFT(adaptive=False, kl_coef=BETA, **UNCLIPPED, **size),
        "prdp": lambda: RewardDifference(beta=BETA, clip_range=10.0, **size),
        "dpo": lambda: PreferenceOptimisation(beta=BETA, group_size=2),
    }[name]()
    policy = GaussianFlow(mean=MEAN, std=STD, fit_kind="nll" if name == "dpo" else "error")
    lent = context(policy, 128, bradley_terry) if name == "dpo" else context(policy)
    mean, std = train(algorithm, lent, steps=100, lr=0.05).tolist()
    second, fourth = moments()
    optimum = MEAN + STD**2 / BETA * (fourth / second if name == "nft" else 1)
    assert mean == pytest.approx(optimum, abs=0.06)
    assert std == pytest.approx(STD, abs=0.06)


def test_group_preference_has_the_gradient_of_the_sigmoid_loss():
    g = torch.Generator().manual_seed(1)
    error, reference, advantage = (torch.rand(6, generator=g) for _ in range(3))
    advantage -= 0.5
    error.requires_grad_()
    group, beta = torch.tensor([0, 0, 0, 1, 1, 1]), 4.0
    found = grad(forward_losses.group_preference_loss(error, reference, advantage, group, beta).sum(), error)[0]
    margin = (advantage * (reference - error)).reshape(2, 3).mean(1)
    expected = grad(-3 / beta * logsigmoid(beta * margin).sum(), error)[0]
    torch.testing.assert_close(found, expected)


def test_centred_rewards_by_hand():
    ratio, optimal = torch.tensor([0.2, 0.0]), torch.tensor([0.9, 0.1])
    loss = forward_losses.centred_reward_loss(ratio, optimal, torch.zeros(2, dtype=torch.long), beta=2.0, clip=5.0)
    # residuals 2 * .2 - .9 = -.5 and -.1, centred -.2 and .2
    torch.testing.assert_close(loss, torch.full((2,), 0.04 * 5 / 2))
    hot = forward_losses.centred_reward_loss(ratio, optimal, torch.zeros(2, dtype=torch.long), 2.0, 5.0, 1e6)
    torch.testing.assert_close(hot, loss)
    cold = forward_losses.centred_reward_loss(ratio, optimal, torch.zeros(2, dtype=torch.long), 2.0, 5.0, 1e-2)
    # once centred on the best, once on the worst: 0 and .4 apart
    torch.testing.assert_close(cold, torch.full((2,), 0.16 / 2 * 5 / 2))


def test_reward_differences_by_hand():
    ratio, target = torch.tensor([0.5, 0.1, 9.0]), torch.tensor([1.0, 0.0, 5.0])
    group = torch.tensor([0, 0, 1])
    errors = forward_losses.reward_difference_errors(ratio, ratio, target, group)
    torch.testing.assert_close(errors, torch.tensor([(0.4 - 1.0) ** 2]))
    # too far already: the clipped one has the larger error, and no gradient
    ratio = torch.tensor([2.0, 0.0], requires_grad=True)
    near = ratio.clamp(-0.3, 0.3)
    assert grad(forward_losses.reward_difference_errors(ratio, near, target[:2], group[:2]).sum(), ratio)[0][0] == 2.0
    ratio = torch.tensor([0.6, 0.0], requires_grad=True)
    near = ratio.clamp(-0.3, 0.3)
    assert grad(forward_losses.reward_difference_errors(ratio, near, target[:2], group[:2]).sum(), ratio)[0][0] == 0.0


def test_reward_differences_start_as_leave_one_out():
    options = {"group_size": 8}
    lent = (context(GaussianFlow(mean=MEAN, std=STD)) for _ in range(2))
    found = gradients(RewardDifference(beta=0.3, **options), next(lent))
    leave_one_out = PolicyGradient(objective="reinforce", advantage="rloo", advantage_clip=None, **options)
    torch.testing.assert_close(found, gradients(leave_one_out, next(lent)))


@pytest.mark.parametrize("rate", [0.25, 0.75])
def test_token_nft_is_the_loss_of_the_implicit_negative_policy(rate):
    weight = ((1 - rate) / rate) ** 0.5
    ratio = torch.tensor([[0.7], [0.9]], requires_grad=True)
    advantage = torch.tensor([[weight], [-1 / weight]])
    right, wrong = losses.negative_aware_loss(ratio, advantage)[:, 0]
    assert right.item() == pytest.approx(-weight * torch.tensor(0.7).log().item(), rel=1e-5)
    negative = (1 - rate * ratio[1, 0]) / (1 - rate)
    assert wrong.item() == pytest.approx(-weight * negative.log().item(), rel=1e-5)
    expected = grad(-weight * negative.log(), ratio)[0][1]
    torch.testing.assert_close(grad(wrong, ratio)[0][1], expected)
    # where the policy has left a wrong answer far behind the logarithm stays at 0; its gradient does not
    far = torch.tensor([[1.5]], requires_grad=True)
    bounded = losses.negative_aware_loss(far, advantage[1:])
    assert bounded.item() == 0.0
    assert grad(bounded.sum(), far)[0].item() == pytest.approx(1 / weight, rel=1e-5)


def test_token_nft_on_policy_is_grpo():
    logp = torch.randn(5, 4).requires_grad_()
    advantage = torch.tensor([1.3, -0.4, 0.0, -2.0, 0.1])[:, None].expand(5, 4)
    ratio = (logp - logp.detach()).exp()
    found = grad(losses.negative_aware_loss(ratio, advantage).sum(), logp)[0]
    torch.testing.assert_close(found, -advantage)


@pytest.mark.parametrize("weighting", ["uniform", "t", "t2", "huber", "ghuber"])
def test_weighted_matching_by_hand(weighting):
    error, time = torch.tensor([0.16]), torch.tensor([0.5])
    expected = {"uniform": 0.16, "t": 0.08, "t2": 0.04, "huber": 0.2, "ghuber": 0.5 * (0.16**0.25 - 1e-10**0.25) / 0.25}
    found = forward_losses.matching_logp(error, time, weighting)
    assert found.item() == pytest.approx(-expected[weighting], abs=1e-4)


def test_a_group_preference_needs_no_old_policy_and_an_optimal_one_learns_nothing():
    policy = GaussianFlow(mean=MEAN, std=STD)
    assert not GroupPreference().keeps_old
    found = gradients(GroupPreference(group_size=4), context(policy, reward=lambda samples: [1.0] * len(samples)))
    assert found.abs().max() == 0


def test_off_path_states_lead_back_to_the_target():
    """A model that is right stays on the path; one that is wrong is told the velocity that ends at the target."""
    at, _, _ = draws(n=5)
    at.prediction = at.target
    clean, noise = at.x - at.time[:, None] * at.target, at.x + (1 - at.time[:, None]) * at.target
    right = off_path(at, range(5), 0, 10)
    torch.testing.assert_close(right.target, at.target, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right.x, (1 - right.time[:, None]) * clean + right.time[:, None] * noise)
    at.prediction = at.target + 1.0
    wrong = off_path(at, range(5), 0, 10)
    torch.testing.assert_close(wrong.x - wrong.time[:, None] * wrong.target, clean, rtol=1e-4, atol=1e-5)
    assert ((wrong.time >= (at.time - 0.1).clamp(min=0.1) - 1e-6) & (wrong.time <= 1)).all()
    assert mean_square(wrong.target - at.target).min() > 0
