"""Forward-process and regression algorithms: frame, copies of the policy, work, resume, and that they learn."""

import pytest
import torch
from gaussian_flow import HERE, GaussianFlow, context, gradients
from table_policy import TablePolicy, resumes_bit_exactly, share_right, table_context, take_step
from zoo import ZOO

from mmrl import Prompt
from mmrl.algorithms.distillation import Distillation, PredictionDistillation
from mmrl.algorithms.forward_process import (
    AdvantageMatching,
    CentredReward,
    DiffusionNFT,
    GroupPreference,
    Lag,
)
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.algorithms.rejection import BestOfN
from mmrl.algorithms.reward_difference import RewardDifference
from mmrl.algorithms.reward_weighted import AdvantageWeighted, RewardWeighted
from mmrl.algorithms.self_correction import SelfCorrection
from mmrl.components import algorithm_component
from mmrl.errors import UserError
from mmrl.policy import Parameters
from pipelines import DiffusionPolicy

LAGGING = Lag(start=0.5)
ON_FLOWS = {
    "raft": lambda: BestOfN(group_size=4, keep=2),
    "rwr": lambda: RewardWeighted(group_size=4),
    "rwr batch": lambda: RewardWeighted(group_size=4, mean_over="batch", samples_from="reference"),
    "awr": lambda: AdvantageWeighted(group_size=4),
    "nft": lambda: DiffusionNFT(group_size=4, noise_draws=2, kl_coef=0.1),
    "awm": lambda: AdvantageMatching(group_size=4, weighting="ghuber", slow_kl_coef=0.1),
    "dgpo": lambda: GroupPreference(group_size=4, clip_range=0.1),
    "crd": lambda: CentredReward(group_size=4, temperature=0.5),
    "prdp": lambda: RewardDifference(group_size=4),
}


@pytest.mark.parametrize("name", ON_FLOWS)
def test_gradient_does_not_depend_on_micro_batches(name):
    found = [
        gradients(ON_FLOWS[name](), context(GaussianFlow(mean=0.3), prompts=3, micro_batch_size=size))
        for size in (3, 4096)
    ]
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ON_FLOWS)
def test_every_update_of_several_is_taken(name):
    algorithm = ON_FLOWS[name]()
    algorithm.epochs, algorithm.minibatches = 2, 2
    lent = context(GaussianFlow(mean=0.3))
    with torch.no_grad():
        experience = algorithm.collect(lent, lent.prompts.batch(0), 0)
    optimizer = torch.optim.SGD(list(lent.policy.parameters), lr=0.1)
    before = lent.policy.mean.item()
    sizes = []
    for update in algorithm.updates(lent, experience, 0):
        sizes.append(update.size)
        for micro_batch in update.micro_batches:
            algorithm.loss(lent, micro_batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(sizes) == 4
    assert lent.policy.mean.item() > before


def test_lags_follow_their_schedule():
    assert [Lag(flat=75, rate=0.0075).decay(step) for step in (0, 75, 76, 10_000)] == [0, 0, 0.0075, 0.999]
    assert Lag(start=0.25, rate=0.005).decay(10) == pytest.approx(0.3)
    assert Lag().none
    weight = torch.nn.Parameter(torch.zeros(1))
    parameters = Parameters({"weight": weight})
    assert LAGGING.follow(parameters, "old", 0)
    with torch.no_grad():
        weight.fill_(1.0)
    assert not LAGGING.follow(parameters, "old", 1)
    assert parameters.snapshots["old"]["weight"].item() == 0.5
    assert Lag().follow(parameters, "old", 2)
    assert parameters.snapshots["old"]["weight"].item() == 1.0


def test_swapped_weights_count_under_autocast():
    """Autocast keeps low-precision copies of weights; another copy of the policy must not meet them."""
    layer = torch.nn.Linear(4, 4)
    parameters = Parameters(dict(layer.named_parameters()))
    parameters.take_snapshot("old")
    with torch.no_grad():
        layer.weight.add_(1.0)
    x = torch.ones(1, 4)
    with torch.autocast("cpu", torch.bfloat16):
        now = layer(x)
        with parameters.swapped("old"):
            old = layer(x)
        assert torch.equal(layer(x), now)
    assert (now - old).min() > 3


def test_best_of_n_keeps_the_best_of_each_group_with_a_spread():
    scores = torch.tensor([1.0, 3.0, 2.0, float("nan"), 5.0, 5.0, 5.0, 5.0, 0.1, 0.2, 0.3, 0.4])
    group = torch.arange(3).repeat_interleave(4)
    weight = BestOfN(group_size=4, keep=2, threshold=0.35).weigh(scores, group)
    assert weight.nan_to_num(0).tolist() == [0, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    with pytest.raises(UserError, match=r"algorithm\.keep is 4, but a group has 4 samples"):
        algorithm_component({"type": "raft", "group_size": 4, "keep": 4}, where="config", path="algorithm")


def test_reward_weights_have_mean_1():
    scores = torch.tensor([1.0, 2.0, float("nan"), 0.0, 0.0, 0.0])
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    weight = RewardWeighted(beta=0.5).weigh(scores, group)
    right = torch.tensor([2.0, 4.0]).softmax(0) * 2
    torch.testing.assert_close(weight[:2], right)
    assert weight[2:].isnan().all()
    weight = RewardWeighted(beta=0.5, mean_over="batch").weigh(scores, group)
    torch.testing.assert_close(weight[[0, 1, 3, 4, 5]], torch.tensor([2.0, 4.0, 0, 0, 0]).softmax(0) * 5)
    weight = AdvantageWeighted(advantage="mean", beta=0.1, max_weight=20.0).weigh(scores, group)
    torch.testing.assert_close(weight[[0, 1, 3]], torch.tensor([-5.0, 5.0, 0.0]).exp().clamp(max=20))
    assert weight[2].isnan()


def forwards(algorithm, step=0):
    """Network rows per trained timestep of the updates of one step, and those of sampling per sample and step."""
    entry = ZOO["StableDiffusion3"]()
    policy = DiffusionPolicy(entry.pipe, num_steps=2, step="ode", call={**entry.call, "guidance_scale": 1.0})
    lent = context(policy, prompts=1, reward=lambda samples: samples.images.mean((1, 2, 3)))
    # Whether its code takes a time per row is found out once, in a first call.
    policy.fit(policy.rollout(lent.prompts.batch(0), 2, 0), [0, 1])
    policy.counters.clear()
    for k in range(step + 1):
        with torch.no_grad():
            experience = algorithm.collect(lent, lent.prompts.batch(0), k)
    sampled = policy.counters["network_rows"] / (step + 1)
    for update in algorithm.updates(lent, experience, step):
        for micro_batch in update.micro_batches:
            algorithm.loss(lent, micro_batch).backward()
    trained = policy.counters["network_rows"] - sampled * (step + 1)
    return trained / (2 * algorithm.noise_draws), sampled / (2 * 2)


def test_an_on_policy_step_costs_one_forward_to_sample_and_one_to_train():
    """Two network forwards for each timestep that is sampled and trained, three with a KL; v_old costs nothing."""
    options = {"group_size": 2, "noise_draws": 2}
    assert forwards(DiffusionNFT(**options)) == (1, 1)
    assert forwards(DiffusionNFT(kl_coef=0.1, **options)) == (2, 1)
    assert forwards(AdvantageMatching(**options)) == (1, 1)
    assert forwards(BestOfN(group_size=2, noise_draws=2)) == (0.5, 1)


def test_an_old_policy_that_lags_costs_one_more():
    options = {"group_size": 2, "noise_draws": 2, "old": LAGGING}
    assert forwards(DiffusionNFT(**options), step=1) == (2, 1)
    assert forwards(DiffusionNFT(kl_coef=0.1, **options), step=1) == (3, 1)
    assert forwards(GroupPreference(**options), step=1) == (2, 1)


def flow_config(run_dir, algorithm, **changes):
    from mmrl.overrides import merge

    base = {
        "run_dir": str(run_dir),
        "seed": 5,
        "pipeline": {"type": f"{HERE}:GaussianFlow"},
        "data": {"prompts": [{"text": f"p{k}", "target": "2.0"} for k in range(4)], "batch_size": 4},
        "rewards": [{"type": f"{HERE}:value"}],
        "algorithm": algorithm,
        "trainer": {"steps": 4, "save_every": 2, "lr": 0.05, "device": "cpu", "tensorboard": False},
        "eval": {"samples_per_prompt": 1},
    }
    return merge(base, changes)


@pytest.mark.parametrize(
    "algorithm",
    [
        {"type": "raft"},
        {"type": "rwr", "samples_from": "reference"},
        {"type": "diffusion_nft", "old": {"start": 0.5}, "kl_coef": 0.1, "minibatches": 2},
        {"type": "awm", "slow_kl_coef": 0.1, "epochs": 2},
        {"type": "dgpo", "clip_range": 0.1, "epochs": 2},
        {"type": "crd", "sampler": {"start": 0.5}},
        {"type": "prdp", "epochs": 2},
        {"type": "soar"},
        {"type": "distill_predictions", "teacher": {"type": f"{HERE}:GaussianFlow", "mean": 1.0}},
    ],
    ids=lambda options: options["type"],
)
def test_resumes_bit_exactly_with_all_copies(tmp_path, algorithm):
    resumes_bit_exactly(tmp_path, algorithm, config=flow_config)


def test_a_teacher_is_followed():
    section = {"type": "gaussian_flow:GaussianFlow", "mean": 2.0, "std": 1.0}
    for algorithm in (Distillation(teacher=section, group_size=64), PredictionDistillation(section, group_size=64)):
        policy = GaussianFlow(mean=0.0, std=1.0)
        lent = context(policy)
        for step in range(60):
            take_step(algorithm, lent, step, lr=0.2)
        assert policy.mean.item() == pytest.approx(2.0, abs=0.1)
        assert policy.std.item() == pytest.approx(1.0, abs=0.1)


def test_a_teacher_of_another_kind_is_refused():
    with pytest.raises(UserError, match=r"algorithm.teacher.type' is missing"):
        Distillation(teacher={})
    lent = table_context(TablePolicy())
    with pytest.raises(UserError, match="is not that of the policy it should teach"):
        take_step(Distillation(teacher={"type": f"{HERE}:GaussianFlow"}), lent)


def test_self_correction_is_supervised_training_of_flows():
    policy = GaussianFlow(mean=0.0, std=1.0)
    lent = context(policy)
    for prompt in lent.prompts.prompts:
        object.__setattr__(prompt, "target", 2.0)
    algorithm = SelfCorrection(points=2, noise_draws=16)
    for step in range(40):
        take_step(algorithm, lent, step, lr=0.2)
    assert policy.mean.item() == pytest.approx(2.0, abs=0.3)
    assert policy.std.item() < 0.5
    entry = ZOO["StableDiffusion"]()
    ddpm = DiffusionPolicy(entry.pipe, num_steps=2, call=entry.call)
    prompts = [Prompt("a", id="a", target=torch.rand(3, 16, 16))]
    (update,) = algorithm.updates(context(ddpm, prompts=1), prompts, 0)
    with pytest.raises(UserError, match="soar needs a flow-matching model"):
        algorithm.loss(context(ddpm, prompts=1), next(iter(update.micro_batches)))


@pytest.mark.parametrize(
    ("algorithm", "lr"),
    [
        (BestOfN(group_size=8), 2.0),
        (RewardWeighted(group_size=8, beta=0.1), 2.0),
        (AdvantageWeighted(group_size=8), 2.0),
        (RewardDifference(group_size=8, beta=0.02, epochs=2), 20.0),
        (PolicyGradient(group_size=8, objective="nft"), 20.0),
    ],
    ids=["raft", "rwr", "awr", "prdp", "nft"],
)
def test_tokens_learn(algorithm, lr):
    lent = table_context(TablePolicy())
    if algorithm.needs_reference:
        lent.policy.parameters.take_snapshot("reference")

    def mean_reward():
        with torch.no_grad():
            rollout = lent.policy.rollout(lent.prompts.batch(0), 32, 99)
        return sum(share_right(rollout.samples)) / len(rollout)

    before = mean_reward()
    for step in range(20):
        take_step(algorithm, lent, step, lr=lr)
    assert mean_reward() > before + 0.2
