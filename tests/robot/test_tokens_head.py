"""Binned action tokens: bins, sampling, log-probs, entropy, what counts, and a policy that learns with them."""

import math

import pytest
import torch
from torch import nn

from mmrl.errors import UserError
from pipelines.robot.heads.base import HeadShape
from pipelines.robot.heads.tokens import TokenHead

DECODINGS = ("parallel", "autoregressive")


def head_of(decoding="parallel", bins=8, temperature=1.0, horizon=3, dim=2):
    torch.manual_seed(0)
    return TokenHead(HeadShape(5, horizon, dim), bins=bins, decoding=decoding, temperature=temperature)


def contexts(n=6):
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(1))


def test_bins_are_equal_parts_of_minus_one_to_one():
    head = head_of(bins=5)
    tokens = torch.arange(6).clamp(max=4)[None]
    assert torch.allclose(head.to_actions(tokens).flatten(), torch.tensor([-0.8, -0.4, 0, 0.4, 0.8, 0.8]))
    actions = torch.tensor([[[-3.0, -1.0], [-0.61, -0.59], [1.0, 0.2]]])
    assert head.to_tokens(actions).tolist() == [[0, 0, 0, 1, 4, 3]]


@pytest.mark.parametrize("decoding", DECODINGS)
def test_every_bin_comes_back(decoding):
    head = head_of(decoding, bins=256)
    tokens = torch.randint(256, (40, 6))
    assert torch.equal(head.to_tokens(head.to_actions(tokens)), tokens)


@pytest.mark.parametrize("decoding", DECODINGS)
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_what_was_sampled_has_ratio_one(decoding, temperature):
    head = head_of(decoding, temperature=temperature)
    draws = head.draw(6, torch.Generator().manual_seed(2))
    executed = torch.tensor([3, 1, 2, 3, 3, 3])
    with torch.no_grad():
        sampled = head.sample(contexts(), draws)
    found = head.decisions(contexts(), sampled.record, executed)
    assert torch.equal(found.logp, head.logp(sampled.elements, executed))
    assert found.entropy is None
    found.logp.sum().backward()
    assert head.network.network.out.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("decoding", DECODINGS)
def test_log_probs_and_entropy_are_those_of_the_tempered_softmax(decoding):
    head = head_of(decoding, temperature=2.0)
    head.keep_entropy = True
    tokens = torch.randint(8, (6, 6), generator=torch.Generator().manual_seed(3))
    executed = torch.full((6,), 3)
    known = None if decoding == "parallel" else tokens[:, :5]
    spread = torch.distributions.Categorical(logits=head.network(contexts(), known) / 2)
    found = head.decisions(contexts(), {"tokens": tokens}, executed)
    assert torch.allclose(found.logp, spread.log_prob(tokens), atol=1e-6)
    assert torch.allclose(found.entropy, spread.entropy(), atol=1e-6)
    some = head.decisions(contexts(), {"tokens": tokens}, executed, [4, 1])
    assert torch.equal(some.logp, found.logp[:, [4, 1]])
    assert torch.equal(some.entropy, found.entropy[:, [4, 1]])


def test_tokens_of_actions_that_were_not_executed_are_no_decisions():
    head = head_of()
    executed = torch.tensor([1, 3, 2, 1, 1, 1])
    mask = head.mask(executed)
    assert mask.sum(1).tolist() == [2, 6, 4, 2, 2, 2]
    assert mask[0].tolist() == [True, True, False, False, False, False]
    sampled = head.sample(contexts(), head.draw(6, torch.Generator().manual_seed(4)))
    logp = head.logp(sampled.elements, executed)
    assert (logp[~mask] == 0).all()
    assert (logp[mask] < 0).all()
    actions = head.to_actions(sampled.record["tokens"])
    changed = torch.where(mask.view_as(actions), actions, -actions)
    fit = head.fit(contexts(), actions, executed, torch.zeros(6, 0))
    assert torch.equal(fit, head.fit(contexts(), changed, executed, torch.zeros(6, 0)))
    expected = -(logp * mask).sum(1) / mask.sum(1)
    assert torch.allclose(fit, expected, atol=1e-6)


def test_an_autoregressive_token_sees_those_before_it_alone():
    head = head_of("autoregressive")
    tokens = torch.randint(8, (6, 5), generator=torch.Generator().manual_seed(5))
    logits = head.network(contexts(), tokens)
    for place in range(5):
        other = tokens.clone()
        other[:, place] = (other[:, place] + 1) % 8
        moved = (head.network(contexts(), other) - logits).abs().amax((0, 2)) > 1e-5
        assert moved.tolist() == [later > place for later in range(6)]


@pytest.mark.parametrize("decoding", DECODINGS)
def test_samples_follow_the_probabilities(decoding):
    head = head_of(decoding, bins=3, horizon=1, dim=1)
    with torch.no_grad():
        head.network.network.out.bias.copy_(torch.tensor([0.0, math.log(2), math.log(5)]))
        head.network.network.out.weight.zero_()
    n = 4000
    sampled = head.sample(contexts(1).expand(n, -1), head.draw(n, torch.Generator().manual_seed(6)))
    shares = sampled.record["tokens"].flatten().bincount(minlength=3) / n
    assert torch.allclose(shares, torch.tensor([1, 2, 5]) / 8, atol=0.03)
    assert (
        head.sample(contexts(), head.draw(6, torch.Generator(), True), True).actions.flatten().tolist()
        == [pytest.approx(2 / 3)] * 6
    )


class Uniform(nn.Module):
    """An encoder whose own network for tokens knows nothing."""

    context_dim = 5

    def token_network(self, queries, bins):
        return lambda context, tokens: torch.zeros(
            len(context), queries if tokens is None else 1 + tokens.shape[1], bins
        )


@pytest.mark.parametrize("decoding", DECODINGS)
def test_an_encoder_may_bring_the_network(decoding):
    head = TokenHead(HeadShape(5, 2, 2, Uniform()), bins=4, decoding=decoding)
    sampled = head.sample(contexts(), head.draw(6, torch.Generator().manual_seed(7)))
    assert torch.allclose(sampled.elements, torch.full((6, 4), -math.log(4)))
    assert not list(head.parameters())


def test_a_width_that_heads_do_not_divide_is_refused():
    from pipelines.robot.vla import ExpertSize

    with pytest.raises(UserError, match=r"expert.width is 30, but should be a multiple of expert.heads, 4"):
        TokenHead(HeadShape(5, 2, 2), expert=ExpertSize(width=30))
