"""DPO and its relatives: pairs from rollouts and from data, on tokens and on pictures."""

import json

import pytest
import torch
from table_policy import TablePolicy, table_config, table_context, take_step
from tiny_run import save_pipeline, tiny_config

from mmrl import Prompt, run
from mmrl.algorithms.preference import PreferenceOptimisation
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.errors import UserError
from mmrl.pair_losses import PAIR_LOSSES

ROWS = [
    {"text": f"p{k}", "chosen": " ".join([str(k + 1)] * 4), "rejected": [{"role": "assistant", "content": "5 5"}]}
    for k in range(4)
]


def offline_context(**policy):
    context = table_context(TablePolicy(**policy))
    prompts = [Prompt(row["text"], id=row["text"], metadata=row) for row in ROWS]
    context.prompts = PromptSampler(prompts, 4, shuffle=False)
    return context


@pytest.mark.parametrize("loss", [*PAIR_LOSSES, {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}], ids=str)
def test_offline_pairs_make_the_chosen_answer_likelier(loss):
    context = offline_context(spread=0.5)
    policy = context.policy
    policy.parameters.take_snapshot("reference")
    smoothing = 0.01 if loss == "exo_pair" else 0.0
    algorithm = PreferenceOptimisation(source="offline", loss=loss, label_smoothing=smoothing)
    prompts = context.prompts.batch(0)

    def margin():
        fits = [policy.fit(policy.given(prompts, [row[key] for row in ROWS])) for key in ("chosen", "plain")]
        return (fits[1] - fits[0]).detach()

    for row in ROWS:
        row["plain"] = "5 5"
    before = margin()
    for step in range(5):
        take_step(algorithm, context, step, lr=1.0)
    assert (margin() > before).all()
    assert algorithm.verbs == {"fit"}
    assert not algorithm.needs_rewards


def test_first_loss_is_log_2_and_its_gradient_that_of_the_definition():
    context = offline_context(spread=0.5)
    policy = context.policy
    policy.parameters.take_snapshot("reference")
    algorithm = PreferenceOptimisation(source="offline", beta=0.7)
    pairs = algorithm.collect(context, context.prompts.batch(0), 0)
    (update,) = algorithm.updates(context, pairs, 0)
    assert update.size == 4
    loss = sum(algorithm.loss(context, micro_batch) for micro_batch in update.micro_batches)
    assert loss.item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    (grad,) = torch.autograd.grad(loss, policy.logits)
    chosen, rejected = (policy.fit(part) for part in (pairs.winners, pairs.losers))
    # d/dz of -log sigmoid(z) at 0 is -1/2; z = beta (NLL of rejected - NLL of chosen + constant)
    (expected,) = torch.autograd.grad((-0.5 * 0.7 * (rejected - chosen)).mean(), policy.logits)
    assert torch.allclose(grad, expected, atol=1e-6)


def test_gradient_does_not_depend_on_micro_batches():
    found = []
    for size in (8, 3):
        context = offline_context(spread=0.5)
        context.micro_batch_size = size
        context.policy.parameters.take_snapshot("reference")
        take_step(PreferenceOptimisation(source="offline", loss="ipo"), context)
        found.append(context.policy.logits.detach())
    assert torch.allclose(*found, atol=1e-6)


def test_online_pairs_learn(tmp_path):
    summary = run.train(parse_config(table_config(tmp_path / "run", {"type": "dpo", "beta": 0.5})))
    assert summary["eval"]["after"]["reward"] > summary["eval"]["before"]["reward"] + 0.3


def test_offline_pairs_need_no_reward(tmp_path):
    config = table_config(tmp_path / "run", {"type": "dpo", "source": "offline", "loss": "simpo"})
    config["rewards"], config["data"]["prompts"] = [], ROWS
    parsed = parse_config(config)
    assert parsed.stages[0].algorithm.options["beta"] == 0.1
    run.train(parsed)


def test_offline_pairs_of_pictures(tmp_path):
    """The files that rows name are encoded; after some steps the chosen one fits better than the rejected one."""
    from PIL import Image

    for name, colour in (("good", "white"), ("bad", "black")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    rows = [{"text": f"picture {k}", "chosen": "good.png", "rejected": "bad.png"} for k in range(2)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    model = save_pipeline(tmp_path / "sd3")
    config = tiny_config(model, tmp_path / "run", trainer={"steps": 8, "save_every": 0, "eval_every": 0})
    config |= {"rewards": [], "algorithm": {"type": "dpo", "source": "offline", "beta": 10.0, "noise_draws": 4}}
    config["data"] = {"prompts": str(tmp_path / "rows.json"), "batch_size": 2}
    config["trainer"]["lr"] = 1e-2
    run.train(parse_config(config))

    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logits = [line["pairs/logit"] for line in lines if "pairs/logit" in line]
    assert logits[0] == 0.0
    assert sum(logits[-3:]) > 0
    config["algorithm"]["loss"] = "ipo"
    with pytest.raises(UserError, match="a denoiser does not have"):
        parse_config(config)


def test_rows_without_pairs_are_named():
    context = table_context(TablePolicy())
    algorithm = PreferenceOptimisation(source="offline")
    with pytest.raises(UserError, match=r"row 'p0': column 'chosen' is missing"):
        algorithm.collect(context, context.prompts.batch(0), 0)


def test_exo_needs_smoothing():
    with pytest.raises(UserError, match="label_smoothing"):
        PreferenceOptimisation(loss="exo_pair")
