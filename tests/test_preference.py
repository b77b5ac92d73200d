"""DPO and its relatives: pairs from rollouts and from data, on tokens and on pictures."""

import json

import pytest
import torch
from PIL import Image
from table_policy import TablePolicy, share_right, table_config, table_context, take_step
from tiny_run import save_pipeline, tiny_config
from zoo import ZOO

from mmrl import Prompt, run
from mmrl.algorithms.pairs import given_pairs
from mmrl.algorithms.preference import PreferenceOptimisation
from mmrl.checks import check
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.errors import UserError
from mmrl.pair_losses import PAIR_LOSSES
from mmrl.scoring import Scorer, Term
from mmrl.types import Samples
from pipelines import DiffusionPolicy

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


def compare_lengths(a, b):
    """The odds that a is better, by how much longer it is."""
    lengths = [torch.tensor([len(text) for text in part.texts]).float() for part in (a, b)]
    return (lengths[0] - lengths[1]).sigmoid()


class Longer:
    name = "longer"

    def __call__(self, samples):
        return [float(len(text)) for text in samples.texts]

    def compare(self, a, b):
        return compare_lengths(a, b)


def online(pairs, reward, **options):
    context = table_context(TablePolicy(spread=1.0), reward)
    algorithm = PreferenceOptimisation(group_size=4, pairs=pairs, **options)
    return context, algorithm, algorithm.collect(context, context.prompts.batch(0), 0)


def test_pairs_that_a_reward_compares():
    context, algorithm, pairs = online("compared", Longer())
    assert algorithm.needs_comparison
    assert 0 < len(pairs) <= 8  # two pairs a group at most, ties are left out
    lengths = [torch.tensor([len(text) for text in part.samples.texts]) for part in (pairs.winners, pairs.losers)]
    assert (lengths[0] > lengths[1]).all()
    assert torch.equal(pairs.winners.group, pairs.losers.group)
    # Log-odds of a sigmoid are its argument.
    assert torch.allclose(pairs.margin, (lengths[0] - lengths[1]).float().clamp(max=13.8), atol=0.2)
    assert "reward/mean" not in context.tally.result()


def test_comparisons_are_weighted_turned_and_routed():
    def fixed(value, **options):
        reward = Longer()
        reward.compare = lambda a, b: torch.full((len(a),), value)
        return Term(reward, **options)

    rows = Samples([Prompt("x", task=task) for task in ("one", "two", "three")], texts=["a", "b", "c"])
    scorer = Scorer(
        [
            fixed(1.0, name="a", weight=3.0, tasks=["one"]),
            fixed(0.2, name="b", weight=-1.0, tasks=["one", "two"]),
            fixed(1.0, name="c", weight=0.0),
        ]
    )
    found = scorer.compare(rows, rows)
    assert found[:2].tolist() == pytest.approx([(3 * 1.0 + 0.8) / 4, 0.8])
    assert found[2].isnan()


def test_soft_labels_weigh_both_orders_by_the_margin():
    for pairs, reward in (("compared", Longer()), ("ranked", share_right)):
        context, algorithm, made = online(pairs, reward, soft_labels=2.0, beta=0.3)
        context.policy.parameters.take_snapshot("reference")
        with torch.no_grad():
            context.policy.logits += 0.3 * torch.randn(context.policy.logits.shape, generator=torch.manual_seed(1))
        (update,) = algorithm.updates(context, made, 0)
        loss = sum(algorithm.loss(context, part) for part in update.micro_batches)
        with torch.no_grad():
            fits = [context.policy.fit(part) for part in (made.winners, made.losers)]
            with context.policy.reference():
                old = [context.policy.fit(part) for part in (made.winners, made.losers)]
        z = 0.3 * ((old[0] - fits[0]) - (old[1] - fits[1]))
        right = (made.margin / 2.0).sigmoid()
        expected = -(right * z.sigmoid().log() + (1 - right) * (-z).sigmoid().log())
        assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-5)
    with pytest.raises(UserError, match="soft_labels needs"):
        PreferenceOptimisation(soft_labels=1.0, loss="hinge")


def test_comparison_needs_a_reward_that_compares(tmp_path):
    with pytest.raises(UserError, match=r"algorithm.pairs is 'compared', but reward .*share_right' cannot compare"):
        parse_config(table_config(tmp_path / "run", {"type": "dpo", "pairs": "compared"}))
    config = table_config(tmp_path / "run", {"type": "dpo", "pairs": "compared"})
    config["rewards"] = [{"type": "judge_pair", "model": "some/model"}]
    parse_config(config)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "good.png", "rejected": "none.png"}, r"rows.json\[1\]: there is no picture .*none.png"),
        (
            {"chosen": "good.png", "rejected": "good.png"},
            r"row 'rows.json\[1\]': chosen and rejected are the same picture",
        ),
        (
            {"chosen": "good.png", "rejected": "a text"},
            r"row 'rows.json\[1\]': chosen is a picture and rejected a text",
        ),
        ({"chosen": ["good.png", "bad.png"], "rejected": "bad.png"}, "chosen is a clip and rejected a picture"),
        ({"chosen": "one.mp4", "rejected": "bad.png"}, r"rows.json\[1\]: there is no video .*one.mp4"),
        ({"chosen": "yes", "rejected": "yes"}, "chosen and rejected are the same text"),
        ({"chosen": "yes"}, "column 'rejected' is missing or empty"),
    ],
)
def test_bad_pairs_are_refused_by_row_before_a_model_is_loaded(tmp_path, row, message):
    for name, colour in (("good", "white"), ("bad", "black")):
        Image.new("RGB", (16, 16), colour).save(tmp_path / f"{name}.png")
    rows = [{"text": "one", "chosen": "good.png", "rejected": "bad.png"}, {"text": "two", **row}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = tiny_config("some/model", tmp_path / "run", data={"prompts": str(tmp_path / "rows.json")})
    config |= {"rewards": [], "algorithm": {"type": "dpo", "source": "offline"}}
    config["data"].pop("eval_prompts")
    with pytest.raises(UserError, match=message):
        check(parse_config(config))


def test_offline_pairs_of_clips():
    """Frames by frames or as an animation; each clip is encoded once for its four scores."""
    entry = ZOO["Wan"]()
    policy = DiffusionPolicy(entry.pipe, num_steps=2, call=entry.call)
    shape = policy.generate([Prompt(entry.prompts[0])], [1]).videos.shape[1:]
    clips = {name: torch.full(shape, value) for name, value in (("chosen", 0.9), ("rejected", 0.1))}
    prompts = [Prompt("a clip", id="row", metadata=clips)]
    pairs = given_pairs(policy, prompts)
    context = table_context(TablePolicy())
    context.policy = policy
    policy.parameters.take_snapshot("reference")
    algorithm = PreferenceOptimisation(source="offline", noise_draws=3)
    (update,) = algorithm.updates(context, pairs, 0)
    before = policy.counters["network_rows"]
    for part in update.micro_batches:
        algorithm.loss(context, part).backward()
    assert policy.counters["targets_encoded"] == 2
    # Policy and reference, winner and loser, each of three draws.
    assert policy.counters["network_rows"] == before + 4 * 3
    assert context.tally.result()["loss"] == pytest.approx(0.6931, abs=1e-3)
