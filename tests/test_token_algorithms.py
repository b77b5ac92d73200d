"""Every policy-gradient algorithm on a real, tiny categorical policy: it learns, and its gradient is well defined."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from table_policy import (
    HERE,
    TablePolicy,
    exact,
    lines,
    resumes_bit_exactly,
    table_config,
    table_context,
    take_step,
    train,
)
from tiny_run import write_config

from mmrl.algorithms.experience import replay
from mmrl.components import algorithm_component, build_algorithm
from mmrl.config import parse_config
from mmrl.errors import UserError
from mmrl.registry import ALGORITHMS
from mmrl.seeding import generator

POLICY_GRADIENT = [
    name
    for name, entry in ALGORITHMS.items()
    if entry.target.endswith(":PolicyGradient") and name not in ("grpo_guard", "flow_dppo")
]
OPTIONS = {
    "reinforce": {"group_size": 8},
    "reinforce_plus_plus": {"group_size": 8, "epochs": 2},
    "remax": {"group_size": 8},
    "ppo": {"group_size": 8, "epochs": 2},
    # The lead of the best of many is small.
    "pass_at_k": {"group_size": 16},
}


def rewards(run_dir):
    return [line["reward/mean"] for line in lines(run_dir) if "reward/mean" in line]


@pytest.mark.parametrize("name", POLICY_GRADIENT)
def test_learns(tmp_path, name):
    """Twelve steps raise the share of right words of sampled answers well beyond the 1/6 of chance."""
    algorithm = {"type": name, **OPTIONS.get(name, {})}
    train(table_config(tmp_path / "run", algorithm))
    found = rewards(tmp_path / "run")
    assert found[0] < 0.2
    assert sum(found[-3:]) / 3 > found[0] + 0.2, found


def named(type: str, **options):
    """The algorithm that a config's ``algorithm`` section would build."""
    return build_algorithm(algorithm_component({"type": type, **options}, where="test", path="algorithm"))


def moved(algorithm, micro_batch_size=8, lr=1.0):
    """How one step of plain gradient descent moves each parameter."""
    policy = TablePolicy(spread=1.0, seed=3, value_head=True)
    policy.parameters.take_snapshot("reference")
    policy.parameters.snapshots["reference"]["logits"] += 0.3 * torch.randn(4, 5, 6, generator=generator(0))
    start = {key: value.clone() for key, value in policy.parameters.state().items()}
    take_step(algorithm, table_context(policy, micro_batch_size=micro_batch_size), lr=lr)
    return {key: value - start[key] for key, value in policy.parameters.state().items()}


CUT = {
    "grpo": {"kl_coef": 0.5, "minibatches": 2},
    "dapo": {"epochs": 2},
    "bnpo": {"block_rows": 3},
    "gspo": {"epochs": 2},
    "gspo_token": {},
    "cispo": {},
    "sapo": {},
    "gmpo": {},
    "dr_grpo": {},
    "reg_grpo": {"epochs": 2},
    "reinforce_plus_plus": {"group_size": 8, "kl_coef": 0.1, "epochs": 2},
    "ppo": {"group_size": 8, "kl_coef": 0.1, "epochs": 2},
    "remax": {"group_size": 4},
    "top_entropy": {"type": "grpo", "top_entropy": 0.4, "entropy_coef": 0.1},
    "importance": {"type": "grpo", "importance": {"level": "sequence"}, "epochs": 2},
}


@pytest.mark.parametrize("name", CUT)
def test_gradient_does_not_depend_on_micro_batches(name):
    options = {"type": name, **CUT[name]}
    whole, cut = moved(named(**options), micro_batch_size=32), moved(named(**options), micro_batch_size=3)
    assert whole["logits"].abs().max() > 1e-3
    assert all((whole[key] - cut[key]).abs().max() < 1e-6 for key in whole)


def test_gradient_does_not_depend_on_minibatches():
    """Each prompt has its own table, so the updates of minibatches are parts of the whole one."""
    options = {"type": "rloo", "aggregation": "constant"}
    whole = moved(named(**options))["logits"]
    cut = moved(named(**options, minibatches=4))["logits"]
    # Each of four updates divides by a quarter of the samples.
    assert torch.allclose(cut, 4 * whole, atol=1e-6)


@pytest.mark.parametrize("name", ["grpo", "ppo", "reg_grpo", "gspo"])
def test_learning_rate_0_changes_nothing(tmp_path, name):
    algorithm = {"type": name, "group_size": 4, "epochs": 2, "kl_coef": 0.1}
    train(table_config(tmp_path / "run", algorithm, trainer={"lr": 1e-30, "steps": 2}))
    found = [line for line in lines(tmp_path / "run") if "loss" in line]
    assert all(line["ratio/max_abs_dev"] == 0.0 and line["kl"] == 0.0 for line in found)
    assert all(line["ratio/clip_fraction"] == 0.0 for line in found)


def test_adapted_entropy_bonus_resumes_bit_exactly(tmp_path):
    algorithm = {"type": "grpo", "entropy_coef": 0.01, "entropy_target": {"target": 1.6, "delta": 0.01}, "epochs": 2}
    trainer = {"steps": 6, "save_every": 3}
    state = resumes_bit_exactly(tmp_path, algorithm, trainer=trainer)
    assert state["entropy"]["coefficient"] != 0.01


def test_entropy_bonus_keeps_entropy_up(tmp_path):
    for name, coefficient in (("without", 0.0), ("with", 1.0)):
        algorithm = {"type": "grpo", "entropy_coef": coefficient, "top_entropy": 0.99}
        train(table_config(tmp_path / name, algorithm, trainer={"steps": 8, "lr": 0.3}))
    without, with_bonus = (
        [line["entropy"] for line in lines(tmp_path / name) if "entropy" in line] for name in ("without", "with")
    )
    assert without[-1] < without[0]
    assert with_bonus[-1] > without[-1] + 0.2


def test_truncated_samples_teach_nothing_when_masked():
    context = table_context(TablePolicy(spread=1.0, seed=3))
    experience = take_step(named("dapo", group_size=8), context)
    cut = experience.rollout.samples.truncated
    assert 0 < cut.sum() < len(cut)
    assert not experience.mask[cut].any()
    assert not experience.advantage[cut].any()
    # What is left is weighed among itself.
    update = next(named("dapo", group_size=8).updates(context, experience, 0))
    weight = sum(micro_batch.weight.sum().item() for micro_batch in update.micro_batches)
    silent = experience.mask[(experience.advantage == 0).all(1)].sum() / experience.mask.sum()
    assert weight + silent.item() == pytest.approx(1.0, abs=1e-6)


def test_options_that_are_not_given_are_written_out_for_the_kind_of_decisions(tmp_path):
    def resolved(**algorithm):
        config = table_config(tmp_path / "run", {"type": "grpo", **algorithm})
        return parse_config(config).stages[0].algorithm.options

    options = resolved()
    assert (options["clip_range"], options["clip_range_high"], options["kl"]) == (0.2, 0.2, "k3")
    assert resolved(clip_range=0.1)["clip_range_high"] == 0.1
    assert resolved(type="gspo")["clip_range_high"] == 4e-4
    assert resolved(type="dapo")["clip_range_high"] == 0.28
    assert resolved(kl_coef=0.1)["drop_silent"] is False


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"type": "grpo", "kl_coef": 0.1, "kl": "exact"}, "means"),
        ({"type": "grpo_guard"}, "means"),
        ({"type": "gdpo", "kl_coef": 0.1, "kl_in": "reward"}, "no single reward"),
        ({"type": "grpo", "group_size": 1}, "compares the samples of a group"),
        ({"type": "grpo", "entropy_target": {"goal": 1}}, "algorithm.entropy_target.goal"),
    ],
)
def test_what_does_not_fit_tokens_is_refused(tmp_path, algorithm, message):
    with pytest.raises(UserError, match=message):
        parse_config(table_config(tmp_path / "run", algorithm))


def test_ppo_without_a_value_head_is_refused(tmp_path):
    config = table_config(tmp_path / "run", {"type": "ppo", "group_size": 2})
    config["pipeline"]["value_head"] = False
    with pytest.raises(UserError, match=r"needs a policy that offers values.*pipeline\.value_head: true"):
        parse_config(config)
    with pytest.raises(UserError, match="a value head gives them"):
        take_step(named("ppo", group_size=2), table_context(TablePolicy()))


def test_dynamic_sampling_replaces_groups_without_spread():
    """Prompts 1 to 3 are solved already; only others can teach anything."""
    policy = TablePolicy(prompts=12, words=14, spread=0.5)
    policy.logits.data[1:4, 0] = 0.0
    for prompt in range(1, 4):
        policy.logits.data[prompt, 0, prompt + 1] = 100.0
    context = table_context(policy, reward=exact, prompts=12)
    context.prompts.batch_size = 4
    algorithm = named("grpo", group_size=16, dynamic_sampling={"max_tries": 8})
    experience = take_step(algorithm, context)
    found = context.tally.result()
    assert found["groups/without_signal"] == 0
    assert found["groups/extra"] >= found["groups/replaced"] >= 3
    assert experience.rollout.group.tolist() == [k for k in range(4) for _ in range(16)]
    assert experience.rollout.samples.group.tolist() == experience.rollout.group.tolist()
    prompts = [prompt.id for prompt in experience.rollout.samples.prompts[::16]]
    assert not {"p1", "p2", "p3"} & set(prompts)
    # Replaced rows replay exactly, though their rollout had another length.
    assert (replay(context, experience.rollout).logp - policy.decisions(experience.rollout).logp).abs().max() == 0

    again = table_context(TablePolicy(prompts=12, words=14, spread=0.5), reward=exact, prompts=12)
    again.policy.parameters.load(policy.parameters.state())
    again.prompts.batch_size = 4
    first, second = (algorithm.collect(c, c.prompts.batch(5), 5) for c in (context, again))
    assert torch.equal(first.rollout.logp, second.rollout.logp)


def test_dynamic_sampling_gives_up_after_its_tries():
    context = table_context(TablePolicy(), reward=lambda samples: [1.0] * len(samples))
    take_step(named("grpo", group_size=2, dynamic_sampling={"max_tries": 2}), context)
    assert context.policy.counters["sampled"] == 3 * 4 * 2
    assert context.tally.result()["groups/replaced"] == 0


def test_rollouts_of_unequal_length_join():
    policy = TablePolicy(spread=1.0)
    context = table_context(policy)
    parts = [policy.given(context.prompts.batch(0), texts) for texts in (["1", "2", "3", "4"], ["1 2 3", "", "4", "1"])]
    joined = type(parts[0]).cat(parts)
    assert joined.mask.sum(1).tolist() == [2, 2, 2, 2, 4, 1, 2, 2]
    assert torch.equal(policy.decisions(joined).logp, joined.logp)


PROCESSES = {
    "dapo": {"group_size": 4},
    "reinforce_plus_plus": {"group_size": 4, "kl_coef": 0.1},
    "ppo": {"group_size": 4},
    "opo": {"group_size": 4},
    # The second of two processes has nothing to compute.
    "gspo": {"group_size": 4},
    "grpo": {"group_size": 4, "top_entropy": 0.4, "entropy_target": {"target": 1.0}, "prompt_choice": {}, "replay": {}},
}


def test_gradient_does_not_depend_on_the_number_of_processes(tmp_path):
    """Two processes with half of the prompts each take the steps that one takes with all of them."""
    for name, options in PROCESSES.items():
        # With a second step, draws of prompts and of replayed samples would differ: each process makes its own.
        sgd = {"steps": 1, "lr": 1.0, "optimizer": "SGD", "max_grad_norm": None, "optimizer_options": {}}
        config = table_config(
            tmp_path / "alone" / name, {"type": name, **options}, trainer=sgd, data={"shuffle": False}
        )
        config["pipeline"] |= {"spread": 1.0}
        train(config)
        write_config(tmp_path / f"{name}.yaml", config | {"run_dir": str(tmp_path / "together" / name)})
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(
        [*command, str(HERE), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in PROCESSES:
        one, two = (
            load_file(tmp_path / place / name / "checkpoints/step-000001/policy.safetensors")
            for place in ("alone", "together")
        )
        assert all((one[key] - two[key]).abs().max() < 1e-6 for key in one), name
        for line, other in zip(lines(tmp_path / "alone" / name), lines(tmp_path / "together" / name), strict=True):
            for key in ("reward/mean", "loss", "entropy", "ratio/clip_fraction"):
                assert line.get(key) == pytest.approx(other.get(key), abs=1e-6), (name, key)
