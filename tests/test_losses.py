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


def test_soft_clip_by_hand():
    ratio = torch.tensor([1.0, 2.0, 0.5], requires_grad=True)
    advantage = torch.tensor([1.0, -2.0, -1.0])
    loss = losses.soft_clipped_loss(ratio, advantage, positive=1.0, negative=2.0)
    # -A 4/tau sigmoid(tau (r - 1)): -4 * 0.5; 2 * 2 * sigmoid(2); 2 * sigmoid(-1)
    expected = [-2.0, 4 / (1 + math.exp(-2)), 2 / (1 + math.e)]
    assert loss.tolist() == pytest.approx(expected)
    loss.sum().backward()
    assert ratio.grad[0].item() == pytest.approx(-1.0), "on-policy the gradient is that of -A r"


def test_geometric_mean_by_hand():
    log_ratio = torch.tensor([[0.5, -0.1, 9.0], [0.5, -0.6, 0.2]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantage = torch.tensor([[2.0], [-1.0]])
    loss = losses.geometric_mean_loss(log_ratio, advantage, mask, 0.4, 0.4)
    # A > 0 takes min(x, clip x): 0.4, -0.1, mean 0.15. A < 0 takes max: 0.5, -0.4, 0.2, mean 0.1.
    assert loss[0].tolist() == pytest.approx([-2 * math.exp(0.15)] * 3)
    assert loss[1].tolist() == pytest.approx([math.exp(0.1)] * 3)


def test_gspo_token_has_the_value_of_gspo_and_each_tokens_gradient():
    logp = torch.tensor([[0.3, 0.5, 9.0]], requires_grad=True)
    old, mask = torch.tensor([[0.1, 0.1, 0.0]]), torch.tensor([[True, True, False]])
    found = losses.sequence_token_log_ratio(logp, old, mask)
    assert found[0].tolist() == pytest.approx([0.3] * 3)
    found[0, 1].backward()
    assert logp.grad.tolist() == [[0.0, 1.0, 0.0]]


def test_regression_by_hand():
    log_ratio = torch.tensor([[0.2, 0.4]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = losses.regression_loss(log_ratio, torch.tensor([[1.0]]), mask, 0.5, torch.tensor([[0.1]]))
    # (0.5 (0.3 - 0.1) - 1)^2 / (2 * 0.5)
    assert loss[0].tolist() == pytest.approx([0.81, 0.81])
    loss.mean().backward()
    # -(1 - 0.1) / 2 for each of two decisions
    assert log_ratio.grad[0].tolist() == pytest.approx([-0.45, -0.45])


def test_kl_with_another_gradient_keeps_its_value():
    logp = torch.tensor([0.3, -1.0], requires_grad=True)
    reference = torch.tensor([0.1, -0.4])
    for estimator in ("k1", "k3"):
        value = losses.sampled_kl(logp, reference, estimator, gradient="k2")
        assert torch.allclose(value, losses.sampled_kl(logp, reference, estimator))
        (grad,) = torch.autograd.grad(value.sum(), logp)
        assert torch.allclose(grad, logp.detach() - reference)


def test_importance_weights_by_hand():
    logp, behaviour = torch.tensor([[0.0, -1.0, 5.0]]), torch.tensor([[-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False]])
    token = losses.importance_weights(logp, behaviour, mask, "token", "truncate", 2.0)
    assert token[0, :2].tolist() == pytest.approx([2.0, math.exp(-1)])
    dropped = losses.importance_weights(logp, behaviour, mask, "token", "mask", 2.0, 0.5)
    assert dropped[0, :2].tolist() == [0.0, 0.0]
    sequence = losses.importance_weights(logp, behaviour, mask, "sequence", "truncate", 2.0)
    assert sequence[0].tolist() == pytest.approx([1.0] * 3)


def test_value_loss_by_hand():
    value, old, returns = torch.tensor([1.0, 0.1]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])
    # Moving by more than the clip counts as no progress: (0.2 - 1)^2 / 2.
    assert losses.value_loss(value, old, returns, 0.2).tolist() == pytest.approx([0.32, 0.405])
    assert losses.value_loss(value, old, returns, None).tolist() == pytest.approx([0.0, 0.405])


def test_blocks_are_means_of_means():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.bool)
    values = torch.arange(9.0).reshape(3, 3)
    weight = losses.aggregation_weights(mask, "blocks", 3, 6, 3, block_rows=2, blocks=2)
    # Blocks of rows 0, 1 and of row 2: (0 + 1 + 2 + 3) / 4 and (6 + 7) / 2.
    assert (weight * values).sum().item() == pytest.approx((1.5 + 6.5) / 2)


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
