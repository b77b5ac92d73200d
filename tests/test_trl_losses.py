"""Losses and gradients against TRL's own code, whose numbers ``benchmarks/trl_losses.py`` wrote down."""

import contextlib
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from mmrl.algorithms.base import Context
from mmrl.algorithms.experience import Experience
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.pair_losses import PairScores, mixed_pair_loss
from mmrl.policy import Parameters
from mmrl.tally import Clock, Tally
from mmrl.types import Decisions, Prompt, Rollout, Samples

GOLDEN = json.loads((Path(__file__).parent / "golden/trl_losses.json").read_text())
BATCH = {key: torch.tensor(value) for key, value in GOLDEN["batch"].items()}
OURS = {
    "grpo": {},
    "clip_higher": {"clip_range": 0.2, "clip_range_high": 0.28},
    "delta": {"dual_clip": 1.5},
    "k3": {"kl_coef": 0.1, "kl": "k3"},
    "k3_ratio_weighted": {"kl_coef": 0.1, "kl_ratio_weight": True},
    "bnpo": {"aggregation": "blocks", "block_rows": 6},
    "dr_grpo": {"aggregation": "constant", "max_decisions": 9},
    "dapo": {"aggregation": "token", "clip_range": 0.2, "clip_range_high": 0.28},
    "gspo": {"objective": "gspo", "clip_range": 3e-2, "clip_range_high": 4e-2},
    # LUSPO is GSPO times length: a sum instead of a mean over a sample's decisions.
    "luspo": {
        "objective": "gspo",
        "clip_range": 3e-2,
        "clip_range_high": 4e-2,
        "aggregation": "constant",
        "max_decisions": 1,
    },
    "cispo": {"objective": "cispo", "ratio_bounds": (0.0, 1.4), "aggregation": "token"},
    "sapo": {"objective": "sapo"},
    "top_entropy": {"top_entropy": 0.3},
    "entropy_bonus": {"entropy_coef": 0.05},
    "gmpo": {"objective": "gmpo"},
}


class FreePolicy:
    """A policy whose log-probs and entropies are the parameters themselves."""

    verbs = frozenset({"rollout", "decisions", "entropy"})
    batch_size = 6
    has_frozen_base = True
    keep_mean = keep_entropy = False

    def __init__(self):
        self.logp, self.entropy = nn.Parameter(BATCH["logp"].clone()), nn.Parameter(BATCH["entropy"].clone())
        self.parameters = Parameters({"logp": self.logp, "entropy": self.entropy})
        self.counters = Counter()
        self.inside_reference = False

    def decisions(self, rollout, steps=None):
        rows = rollout.trace
        table = BATCH["ref_logp"] if self.inside_reference else self.logp
        found = Decisions(table[rows], entropy=self.entropy[rows] if self.keep_entropy else None)
        return found if steps is None else found.columns(steps)

    def decision_chunks(self, rollout):
        return [list(range(7))]

    @contextlib.contextmanager
    def reference(self):
        self.inside_reference = True
        yield
        self.inside_reference = False


def ours(options, micro_batch_size):
    policy = FreePolicy()
    context = Context(policy, None, 0, micro_batch_size, Clock(), Tally())
    algorithm = PolicyGradient(group_size=2, **options)
    policy.keep_entropy = algorithm.needs_entropy
    mask, group = BATCH["mask"], torch.tensor([0, 0, 1, 1, 2, 2])
    samples = Samples([Prompt(f"p{k}") for k in range(6)], texts=[""] * 6)
    rollout = Rollout(samples, BATCH["old_logp"] * mask, mask, group, torch.arange(6))
    rollout, factor = algorithm._factor(context, rollout, mask, 0)
    experience = Experience(rollout, BATCH["advantage"][:, None] * mask, mask, factor)
    total = 0.0
    for update in algorithm.updates(context, experience, 0):
        for micro_batch in update.micro_batches:
            loss = algorithm.loss(context, micro_batch)
            loss.backward()
            total += loss.item()
    return total, policy


@pytest.mark.parametrize("micro_batch_size", [6, 1])
@pytest.mark.parametrize("name", GOLDEN["grpo"])
def test_policy_losses_equal_those_of_trl(name, micro_batch_size):
    theirs = GOLDEN["grpo"][name]
    loss, policy = ours(OURS[name], micro_batch_size)
    grad = torch.tensor(theirs["logp_grad"])
    # TRL's GMPO adds a constant, minus the advantage, for the row that is masked as a whole.
    constant = 0.4 / 6 if name == "gmpo" else 0.0
    assert loss - constant == pytest.approx(theirs["loss"], abs=1e-6)
    assert (policy.logp.grad - grad).abs().max() < 1e-6
    assert grad.abs().max() > 1e-3
    if "entropy_grad" in theirs:
        assert torch.allclose(policy.entropy.grad, torch.tensor(theirs["entropy_grad"]), atol=1e-7)


@pytest.mark.parametrize("kind", GOLDEN["pairs"])
def test_pair_losses_equal_those_of_trl(kind):
    mask = BATCH["pair_mask"]
    table = nn.Parameter(BATCH["logp"].clone())
    logp, length = (table * mask).sum(1), mask.sum(1)
    ratio = logp - (BATCH["ref_logp"] * mask).sum(1)
    pair = PairScores(logp[:3], logp[3:], ratio[:3], ratio[3:], length[:3], length[3:])
    weights = {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0} if kind == "mpo" else {kind: 1.0}
    # TRL smooths labels in some losses only.
    smoothing = 0.1 if kind in ("robust", "exo_pair") else 0.0
    loss = mixed_pair_loss(weights, pair, 0.3, smoothing, gamma=0.5).mean()
    loss.backward()
    theirs = GOLDEN["pairs"][kind]
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
    assert torch.allclose(table.grad, torch.tensor(theirs["logp_grad"]), atol=1e-6)
