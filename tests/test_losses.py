"""Policy-gradient losses against numbers worked out by hand and against their definitions."""

import math

import pytest
import torch

from mmrl import losses


def test_clip_by_hand():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantage = torch.tensor([[1.0, -1.0, 1.0, -1.0, 2.0]])
    loss = losses.clipped_loss(ratio, advantage, clip_low=0.2, clip_high=0.3)
    # min(rA, clip(r)A): 1.3; -1.5; 0.5; -0.8; 2.2
    assert torch.allclose(loss, -torch.tensor([[1.3, -1.5, 0.5, -0.8, 2.2]]))
    stopped = losses.clipped_fraction(ratio, advantage, 0.2, 0.3)
    assert stopped.tolist() == [[1.0, 0.0, 0.0, 1.0, 0.0]]


def test_clip_gradient_is_zero_exactly_where_it_is_counted():
    ratio = torch.tensor([0.5, 0.9, 1.1, 1.9] * 2, requires_grad=True)
    advantage = torch.tensor([1.0] * 4 + [-1.0] * 4)
    losses.clipped_loss(ratio, advantage, 0.2, 0.2).sum().backward()
    stopped = losses.clipped_fraction(ratio.detach(), advantage, 0.2, 0.2)
    assert ((ratio.grad == 0).float() == stopped).all()


def test_dual_clip_bounds_only_negative_advantages():
    ratio = torch.tensor([10.0, 10.0])
    advantage = torch.tensor([-1.0, 1.0])
    loss = losses.clipped_loss(ratio, advantage, 0.2, 0.2, dual_clip=3.0)
    assert loss.tolist() == pytest.approx([3.0, -1.2])


def test_cispo_weight_is_detached_and_clamped():
    logp = torch.tensor([[0.7, -0.2]], requires_grad=True)
    old = torch.zeros(1, 2)
    ratio = (logp - old).exp()
    losses.cispo_loss(logp, ratio, torch.tensor([[2.0, 2.0]]), 0.0, 1.5).sum().backward()
    assert logp.grad[0, 0].item() == pytest.approx(-2 * 1.5)
    assert logp.grad[0, 1].item() == pytest.approx(-2 * math.exp(-0.2))


def test_sequence_ratio_ignores_masked_decisions():
    logp = torch.tensor([[0.3, 0.5, 9.0]])
    old = torch.tensor([[0.1, 0.1, 0.0]])
    mask = torch.tensor([[True, True, False]])
    assert losses.sequence_log_ratio(logp, old, mask)[0].tolist() == pytest.approx([0.3] * 3)


def gaussian_logp(action, mean, std):
    per_element = torch.distributions.Normal(mean, std).log_prob(action)
    return per_element.flatten(2).mean(2)


def test_guard_ratio_equals_its_published_form():
    torch.manual_seed(0)
    action, mean, old_mean = torch.randn(3, 4, 2, 2, 5, dtype=torch.float64).unbind(0)
    std = torch.rand(4, 2, dtype=torch.float64) + 0.1
    wide = std[..., None, None]
    logp, old_logp = gaussian_logp(action, mean, wide), gaussian_logp(action, old_mean, wide)
    bias = (mean - old_mean).square().flatten(2).mean(2) / (2 * std**2)
    published = (logp - old_logp + bias) * std
    assert torch.allclose(losses.guard_log_ratio(action, mean, old_mean, std), published, atol=1e-12)


def test_gaussian_kl_equals_torch_distributions():
    torch.manual_seed(0)
    mean, other = torch.randn(2, 3, 2, 7, dtype=torch.float64).unbind(0)
    std = torch.rand(3, 2, dtype=torch.float64) + 0.1
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(mean, std[..., None]), normal(other, std[..., None])).mean(2)
    assert torch.allclose(losses.gaussian_kl(mean, other, std), exact, atol=1e-12)
    assert torch.allclose(losses.gaussian_kl(other, mean, std), exact, atol=1e-12)


def test_sampled_kl_estimates_the_kl_of_two_categoricals():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    exact = (p * (p / q).log()).sum()
    for estimator in ("k1", "k3"):
        expectation = (p * losses.sampled_kl(p.log(), q.log(), estimator)).sum()
        assert expectation.item() == pytest.approx(exact.item(), abs=1e-12)
    near = torch.tensor([0.49, 0.31, 0.2], dtype=torch.float64)
    exact = (p * (p / near).log()).sum().item()
    assert (p * losses.sampled_kl(p.log(), near.log(), "k2")).sum().item() == pytest.approx(exact, rel=0.05)


def test_kl_gradients():
    """k2's gradient is that of the KL on-policy; k1's has zero mean."""
    logits = torch.tensor([0.3, -0.1, 0.5], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    logp = logits.log_softmax(0)
    exact = torch.autograd.grad((logp.exp() * (logp - q.log())).sum(), logits, retain_graph=True)[0]
    weights = logp.detach().exp()
    k2 = torch.autograd.grad((weights * losses.sampled_kl(logp, q.log(), "k2")).sum(), logits, retain_graph=True)[0]
    k1 = torch.autograd.grad((weights * losses.sampled_kl(logp, q.log(), "k1")).sum(), logits)[0]
    assert torch.allclose(k2, exact, atol=1e-12)
    assert torch.allclose(k1, torch.zeros(3, dtype=torch.float64), atol=1e-12)


def test_dppo_drops_only_what_moves_further_away():
    ratio = torch.tensor([1.1, 1.1, 0.9, 0.9, 1.1])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    divergence = torch.tensor([2.0, 2.0, 2.0, 2.0, 0.5])
    loss = losses.divergence_masked_loss(ratio, advantage, divergence, threshold=1.0)
    assert loss.tolist() == pytest.approx([0.0, 1.1, -0.9, 0.0, -1.1])


@pytest.mark.parametrize("how", ["sequence", "token", "constant"])
def test_aggregation_does_not_depend_on_how_the_step_is_cut(how):
    torch.manual_seed(0)
    mask = torch.rand(6, 5) > 0.4
    mask[:, 0] = True
    values = torch.randn(6, 5)
    totals = {"rows": 6, "decisions": int(mask.sum()), "max_decisions": 5}
    whole = (losses.aggregation_weights(mask, how, **totals) * values).sum()
    cut = sum(
        (losses.aggregation_weights(mask[rows], how, **totals)[:, columns] * values[rows][:, columns]).sum()
        for rows in (slice(0, 1), slice(1, 6))
        for columns in (slice(0, 2), slice(2, 5))
    )
    assert cut.item() == pytest.approx(whole.item(), abs=1e-6)
    by_hand = {
        "sequence": ((values * mask).sum(1) / mask.sum(1)).mean(),
        "token": values[mask].mean(),
        "constant": (values * mask).sum() / 30,
    }[how]
    assert whole.item() == pytest.approx(by_hand.item(), abs=1e-6)
