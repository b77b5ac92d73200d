"""KTO on tokens and on pictures: labels, reference point, mismatched pairs."""

import pytest
import torch
from table_policy import TablePolicy, resumes_bit_exactly, share_right, table_config, table_context, take_step
from tiny_run import tiny_config
from zoo import ZOO

from mmrl import Prompt, run
from mmrl.algorithms.unpaired_preference import UnpairedPreference, mismatched
from mmrl.checks import check
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.errors import UserError
from mmrl.pair_losses import kto_loss
from pipelines import DiffusionPolicy

ROWS = [
    {"text": f"p{k % 4}", "completion": " ".join([str(k + 1 if k < 4 else 5)] * 3), "label": k < 4} for k in range(8)
]


def offline_context(**options):
    context = table_context(TablePolicy(spread=0.5))
    prompts = [Prompt(row["text"], id=f"{k}", metadata=row) for k, row in enumerate(ROWS)]
    context.prompts = PromptSampler(prompts, 8, shuffle=False)
    context.policy.parameters.take_snapshot("reference")
    return context, UnpairedPreference(**options)


def test_loss_by_hand():
    ratio = torch.tensor([0.5, -1.0, 2.0])
    loss = kto_loss(ratio, torch.tensor([True, False, True]), torch.tensor(0.25), 2.0, 1.0, 1.5)
    expected = [1 - torch.sigmoid(torch.tensor(0.5)), 1.5 * (1 - torch.sigmoid(torch.tensor(2.5)))]
    assert loss[:2].tolist() == pytest.approx([value.item() for value in expected])
    assert loss[2] < loss[0] < 0.5


def test_first_loss_is_one_half_and_steps_part_the_two_kinds():
    context, algorithm = offline_context(beta=0.5)
    rows = algorithm.collect(context, context.prompts.batch(0), 0)
    (update,) = algorithm.updates(context, rows, 0)
    assert sum(algorithm.loss(context, part).item() for part in update.micro_batches) == pytest.approx(0.5)
    before = context.policy.fit(rows.output).detach()
    for step in range(4):
        take_step(algorithm, context, step, lr=1.0)
    change = before - context.policy.fit(rows.output).detach()
    assert (change[rows.desirable] > 0).all()
    assert change[~rows.desirable].mean() < 0


def test_reference_point_is_that_of_mismatched_pairs_and_the_gradient_not_of_micro_batches():
    found = []
    for size in (8, 3):
        context, algorithm = offline_context(beta=0.5, undesirable_weight=2.0)
        policy = context.policy
        context.micro_batch_size = size
        with torch.no_grad():
            # Everything got likelier than it was, so the reference point is above 0.
            policy.logits[:, :3, 1:] += 1.0
            policy.logits[:, 3:, 0] += 1.0
        rows = algorithm.collect(context, context.prompts.batch(0), 0)
        other = mismatched(policy, rows.output)
        assert other.samples.prompts == rows.output.samples.prompts
        assert other.samples.texts == rows.output.samples.texts[1:] + rows.output.samples.texts[:1]
        with torch.no_grad(), policy.reference():
            old = policy.fit(other)
        expected = (old - policy.fit(other)).mean().clamp(min=0)
        take_step(algorithm, context)
        assert context.tally.result()["kl"] == pytest.approx(expected.item(), rel=1e-5)
        assert expected > 0
        found.append(policy.logits.detach())
    assert torch.allclose(*found, atol=1e-6)


def test_online_labels_are_above_and_below_the_mean_of_a_group(tmp_path):
    context = table_context(TablePolicy(spread=0.5), share_right)
    algorithm = UnpairedPreference(source="online", group_size=6)
    rows = algorithm.collect(context, context.prompts.batch(0), 0)
    scores = torch.tensor(share_right(rows.output.samples))
    assert 0 < len(rows) <= 24
    for name in rows.output.group.unique():
        own = rows.output.group == name
        assert scores[own & rows.desirable].min() > scores[own & ~rows.desirable].max()
    strict = UnpairedPreference(source="online", group_size=6, threshold=0.3)
    rows = strict.collect(context, context.prompts.batch(0), 0)
    assert len(rows) == 24
    assert torch.equal(rows.desirable, torch.tensor(share_right(rows.output.samples)) > 0.3)
    summary = run.train(parse_config(table_config(tmp_path / "run", {"type": "kto", "source": "online", "beta": 0.5})))
    assert summary["eval"]["after"]["reward"] > summary["eval"]["before"]["reward"] + 0.3


def test_pictures():
    entry = ZOO["StableDiffusion3"]()
    policy = DiffusionPolicy(entry.pipe, num_steps=2, call={**entry.call, "guidance_scale": 1.0})
    context = table_context(TablePolicy())
    context.policy = policy
    rows = [
        Prompt(f"picture {k}", id=str(k), metadata={"completion": torch.full((3, 16, 16), value), "label": label})
        for k, (value, label) in enumerate([(0.9, True), (0.1, False)])
    ]
    context.prompts = PromptSampler(rows, 2, shuffle=False)
    policy.parameters.take_snapshot("reference")
    algorithm = UnpairedPreference(beta=10.0, noise_draws=2)
    assert algorithm.defaults_for(policy.verbs) == {"beta": 100.0}
    for step in range(3):
        take_step(algorithm, context, step, lr=0.01)
    result = context.tally.result()
    assert result["ratio/desirable"] > result["ratio/undesirable"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completion": "yes", "label": "good"}, "column 'label' is 'good', but should be true or false"),
        ({"label": True}, "column 'completion' is missing"),
        ({"completion": "none.png", "label": True}, "there is no picture"),
    ],
)
def test_bad_rows_are_refused(tmp_path, row, message):
    config = tiny_config("some/model", tmp_path / "run", algorithm={})
    config |= {"rewards": [], "algorithm": {"type": "kto"}}
    config["data"] = {"prompts": [{"text": "one", **row}], "batch_size": 1}
    with pytest.raises(UserError, match=message):
        check(parse_config(config))


def test_one_prompt_has_no_mismatched_pair():
    context, algorithm = offline_context()
    with pytest.raises(UserError, match="batch_size to 2"):
        algorithm.collect(context, context.prompts.batch(0)[:1], 0)


def test_resume_is_bit_exact(tmp_path):
    resumes_bit_exactly(tmp_path, {"type": "kto", "source": "online", "beta": 0.5, "refresh_reference": 2})
