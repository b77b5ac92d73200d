"""D3PO and SPO on real denoising steps."""

import pytest
import torch
from table_policy import TablePolicy, table_config, table_context, take_step
from zoo import ZOO

from mmrl import Prompt
from mmrl.algorithms.stepwise_preference import StepwisePreference
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.errors import UserError
from mmrl.scoring import Scorer
from pipelines import DiffusionPolicy
from rewards import load_reward


def context(name="StableDiffusion3", **options):
    entry = ZOO[name]()
    options = {"num_steps": 4, "batch_size": 4, "call": {**entry.call, "guidance_scale": 1.0}, **options}
    lent = table_context(TablePolicy(), micro_batch_size=4)
    lent.policy = DiffusionPolicy(entry.pipe, **options)
    lent.policy.parameters.take_snapshot("reference")
    lent.scorer = Scorer([load_reward("pixels", measure="brightness")])
    rows = [Prompt(f"picture {k}", id=str(k)) for k in range(2)]
    lent.prompts = PromptSampler(rows, 2, shuffle=False)
    return lent


ALGORITHMS = {
    "d3po": {"group_size": 4, "ratio_clip": 0.1},
    "spo": {"group_size": 1, "candidates": 4, "steps_per_rollout": 2},
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_winning_steps_become_likelier(name):
    lent = context()
    # Log-probs are means over elements, so a step moves them little.
    algorithm = StepwisePreference(beta=50.0, **ALGORITHMS[name])
    pairs = algorithm.collect(lent, lent.prompts.batch(0), 0)
    assert (pairs.margin > 0).all()
    policy, both = lent.policy, pairs.both

    def lead():
        with torch.no_grad():
            won, lost = policy.decisions(both).logp.chunk(2)
        return won - lost

    before = lead()
    (update,) = algorithm.updates(lent, pairs, 0)
    losses = [algorithm.loss(lent, part) for part in update.micro_batches]
    assert sum(losses).item() == pytest.approx(0.6931, abs=1e-4)
    sum(losses).backward()
    with torch.no_grad():
        for parameter in policy.parameters:
            if parameter.grad is not None:
                parameter -= 0.001 * parameter.grad.sign()
    assert (lead() - before).mean() > 1e-5


def test_gradient_does_not_depend_on_micro_batches():
    found = []
    for size in (8, 2):
        lent = context()
        lent.micro_batch_size = size
        start = {key: p.detach().clone() for key, p in lent.policy.parameters.named.items()}
        take_step(StepwisePreference(group_size=4, pairs="ranked", beta=50.0), lent)
        found.append(torch.cat([(p - start[k]).flatten() for k, p in lent.policy.parameters.named.items()]).detach())
    assert found[0].abs().max() > 1e-4
    assert torch.allclose(*found, atol=1e-6)


def test_candidates_share_a_state_and_are_shown_right_after_their_step():
    lent = context(keep_states="all")
    policy = lent.policy
    rollout = policy.rollout(lent.prompts.batch(0), 1, seed=1)
    found = policy.candidates(rollout, 1, copies=3, seed=5)
    assert found.logp.shape == (6, 1)
    assert found.group.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(found.trace.at(1), rollout.trace.at(1).repeat_interleave(3, 0))
    assert len(found.trace.at(2).flatten(1).unique(dim=0)) == 6
    assert torch.equal(policy.decisions(found).logp, found.logp)
    with torch.no_grad():
        torch.testing.assert_close(policy.jump_to_x0(found, 2).images, found.samples.images)
    again = policy.candidates(rollout, 1, copies=3, seed=5)
    assert torch.equal(again.samples.images, found.samples.images)
    before = policy.counters["network_rows"]
    policy.candidates(rollout, 0, copies=3, seed=5)
    assert policy.counters["network_rows"] == before + 2 * 6


def test_clipped_ratios_by_hand():
    lent = context()
    algorithm = StepwisePreference(group_size=4, ratio_clip=0.001, beta=2.0)
    pairs = algorithm.collect(lent, lent.prompts.batch(0), 0)
    with torch.no_grad():
        for parameter in lent.policy.parameters:
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
        (update,) = algorithm.updates(lent, pairs, 0)
        loss = sum(algorithm.loss(lent, part) for part in update.micro_batches)
        ratio = lent.policy.decisions(pairs.both).logp
        with lent.policy.reference():
            ratio = (ratio - lent.policy.decisions(pairs.both).logp).exp()
    assert ((ratio - 1).abs() > 0.001).any()
    won, lost = ratio.clamp(0.999, 1.001).log().chunk(2)
    assert loss.item() == pytest.approx(-(2 * (won - lost)).sigmoid().log().mean().item(), rel=1e-4)


def test_what_cannot_be_done_is_refused(tmp_path):
    with pytest.raises(UserError, match="a pair needs two samples"):
        StepwisePreference(group_size=1)
    with pytest.raises(UserError, match="needs a policy that offers"):
        parse_config(table_config(tmp_path / "run", {"type": "d3po"}))
