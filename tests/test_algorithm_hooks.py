"""Hooks of the policy gradient on the table policy: what they change, what they keep, and that it resumes."""

import pytest
import torch
from table_policy import HERE, TablePolicy, exact, lines, resumes_bit_exactly, table_config, table_context, take_step
from tiny_run import tiny_config

from mmrl import Prompt
from mmrl.algorithms.experience import Batch
from mmrl.algorithms.hooks.consistency import Consistency
from mmrl.algorithms.hooks.hints import Hints
from mmrl.algorithms.hooks.injection import GroundTruth
from mmrl.algorithms.hooks.prompt_choice import PromptChoice, PromptRecord
from mmrl.algorithms.hooks.replay import Replay
from mmrl.algorithms.hooks.rethinking import Rethinking
from mmrl.algorithms.policy_gradient import PolicyGradient
from mmrl.algorithms.regularisers import Importance
from mmrl.config import parse_config
from mmrl.data import PromptSampler
from mmrl.errors import UserError
from mmrl.scoring import LinearWeight


def hopeless(prompt, policy):
    """The prompt's right word is never said."""
    policy.logits.data[prompt, :, prompt + 1] = -60.0


def batch_of(context, group_size=4, step=0):
    rollout = context.policy.rollout(context.prompts.batch(step), group_size, seed=step)
    return Batch(rollout, context.scorer(rollout.samples))


def test_ground_truth_takes_the_place_of_the_last_member():
    policy = TablePolicy(spread=1.0)
    context = table_context(policy)
    before = batch_of(context)
    after = GroundTruth(template="{} {} {} {} {}")(context, before, 0)
    last = [3, 7, 11, 15]
    assert [after.rollout.samples.texts[row] for row in last] == ["1 1 1 1 1", "2 2 2 2 2", "3 3 3 3 3", "4 4 4 4 4"]
    assert after.scores.total[last].tolist() == [1.0] * 4
    assert after.given.nonzero().flatten().tolist() == last
    assert after.rollout.group.tolist() == before.rollout.group.tolist()
    others = [row for row in range(16) if row not in last]
    assert [after.rollout.samples.texts[row] for row in others] == [before.rollout.samples.texts[row] for row in others]
    # Its ratio starts at 1.
    assert torch.equal(policy.decisions(after.rollout).logp, after.rollout.logp)


def test_ground_truth_only_where_all_fail():
    policy = TablePolicy()
    policy.logits.data[:, 0, 1:5] = 50.0 * torch.eye(4)
    hopeless(2, policy)
    context = table_context(policy, reward=exact)
    after = GroundTruth(when="all_fail")(context, batch_of(context), 0)
    assert after.given.nonzero().flatten().tolist() == [11]
    assert context.tally.result()["groups/with_ground_truth"] == 0.25


def test_ground_truth_teaches_what_is_never_sampled():
    found = {}
    for name, hook in (("without", None), ("with", GroundTruth(when="all_fail"))):
        policy = TablePolicy()
        policy.logits.data[0, 0, 1] = -9.0
        algorithm = PolicyGradient(group_size=4, ground_truth=hook)
        context = table_context(policy, reward=exact)
        for step in range(8):
            take_step(algorithm, context, step, lr=2.0)
        found[name] = policy.logits.detach()[0, 0, 1].item()
    assert found["without"] == -9.0
    assert found["with"] > -8.5


def test_a_row_without_an_answer_is_named():
    context = table_context(TablePolicy())
    context.prompts = PromptSampler([Prompt("p0", id="row 7", target=3)], 1)
    with pytest.raises(UserError, match="row 'row 7': neither column 'response' nor the target"):
        GroundTruth()(context, Batch(context.policy.rollout(context.prompts.batch(0), 2, 0), None), 0)


def hinted_context():
    """Prompt 0 never says its word; with the hint it is asked prompt 3, which says it."""
    policy = TablePolicy()
    hopeless(0, policy)
    policy.logits.data[3, 0, 1] = 3.0
    context = table_context(policy, reward=exact)
    rows = [Prompt(f"p{k}", id=f"p{k}", target=str(k + 1), metadata={"hint": "p3"} if k < 2 else {}) for k in range(4)]
    context.prompts = PromptSampler(rows, 4, shuffle=False)
    return context


def test_hinted_answers_are_scored_without_the_hint():
    context = hinted_context()
    policy, before = context.policy, batch_of(context, group_size=12)
    assert 0 in before.failed(0.0)
    after = Hints(template=" {}")(context, before, 0)
    rows = list(range(12))
    assert after.scores.total[rows].max() == 1.0
    assert after.given[rows].all()
    assert {prompt.text for prompt in after.rollout.samples.prompts[:12]} == {"p0"}
    # The behaviour log-probs are those of the hinted prompt.
    mask = after.rollout.mask[rows]
    asked = policy.logits[3].log_softmax(-1)
    for row in rows:
        tokens = after.rollout.trace.tokens[row][mask[row]]
        expected = asked[torch.arange(len(tokens)), tokens]
        assert torch.allclose(after.rollout.logp[row][mask[row]], expected, atol=1e-6)
    # Groups without a hint in their row stay.
    assert not after.given[24:].any()


def test_hints_with_importance_correction_weigh_by_the_plain_policy():
    context = hinted_context()
    algorithm = PolicyGradient(group_size=12, hints=Hints(template=" {}"), importance=Importance(), advantage_clip=None)
    experience = algorithm.collect(context, context.prompts.batch(0), 0)
    with torch.no_grad():
        now = context.policy.decisions(experience.rollout).logp
    # Ratios start at 1, and what the plain policy would hardly have said counts for nearly nothing.
    assert torch.allclose(experience.rollout.logp, now)
    right = experience.rollout.trace.tokens[:12, 0] == 1
    assert right.any()
    assert experience.factor[:12, 0][right].max() < 1e-6
    take_step(algorithm, context, 0)


def test_consistency_adds_to_right_answers_that_are_likely_under_the_slow_policy():
    policy = TablePolicy(words=8)
    context = table_context(policy)
    prompts = context.prompts.batch(0)[:1] * 4
    # "7" begins the answer; the slow policy finds "1 1" after it likelier than "2 1".
    rollout = policy.given(prompts, ["3 7 1 1", "5 7 1 1", "3 7 2 1", "3 3 1 1"])
    rollout.group[:] = 0
    scores = context.scorer(rollout.samples)
    policy.logits.data[0, 2, 1] = 2.0
    hook = Consistency(marker="7", right=0.1, bonus=0.5, margin=0.0)
    after = hook(context, Batch(rollout, scores), 0)
    bonus = after.scores.total - scores.total
    # The last one is right as well, but has no marker.
    assert bonus.tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0])
    slow = policy.parameters.snapshots["slow"]["logits"].clone()
    policy.logits.data += 1.0
    hook(context, Batch(rollout, scores), 5)
    assert torch.equal(policy.parameters.snapshots["slow"]["logits"], slow)
    hook(context, Batch(rollout, scores), 10)
    assert torch.allclose(policy.parameters.snapshots["slow"]["logits"], slow + 0.005, atol=1e-5)


def test_rethinking_keeps_what_became_better():
    """Answers end at once; going on after the trigger says the right word."""
    policy = TablePolicy()
    policy.logits.data[:, 0, 0] = 50.0
    policy.logits.data[:, 2:, 1:5] = 50.0 * torch.eye(4)[:, None]
    context = table_context(policy)
    before = batch_of(context)
    assert before.rollout.samples.texts == [""] * 16
    after = Rethinking(share=0.5, trigger="5 5")(context, before, 0)
    changed = after.given.nonzero().flatten().tolist()
    assert len(changed) == 8
    for row in changed:
        word = row // 4 + 1
        assert after.rollout.samples.texts[row] == f"5 5 {word} {word} {word}"
        assert after.scores.total[row] == pytest.approx(0.6)
    assert torch.equal(policy.decisions(after.rollout).logp, after.rollout.logp)
    # A trigger that changes nothing for the better is thrown away again.
    policy.logits.data[:, 2:, 1:5] = -50.0
    assert not Rethinking(share=1.0, trigger="5 5")(context, before, 0).given.any()


def test_prompts_are_drawn_by_variance():
    record = PromptRecord(PromptChoice(share=1.0, unseen=0.0, memory=0.0))
    context = table_context(TablePolicy(prompts=12, words=14), prompts=12)
    record.known = {f"p{k}": [0.5, 0.25 if k in (3, 8) else 0.0, 1.0] for k in range(12)}
    prompts = context.prompts.batch(0)[:4]
    chosen = record.choose(context, prompts, 0)
    assert {prompt.id for prompt in chosen[:2]} == {"p3", "p8"}
    assert len({prompt.id for prompt in chosen}) == len(chosen) == 4
    assert [p.id for p in record.choose(context, prompts, 0)] == [p.id for p in chosen]


def test_prompts_are_drawn_by_difficulty_within_bounds():
    target = LinearWeight(start=1.0, end=0.0, steps=10)
    choice = PromptChoice(by="difficulty", target=target, width=0.1, within=(0.05, 0.95))
    record = PromptRecord(choice)
    record.known = {"easy": [0.9, 0, 0], "hard": [0.1, 0, 0], "solved": [1.0, 0, 0], "hopeless": [0.0, 0, 0]}
    assert record.weight("easy", 0) > 100 * record.weight("hard", 0)
    assert record.weight("hard", 10) > 100 * record.weight("easy", 10)
    assert record.weight("solved", 0) == record.weight("hopeless", 10) == 0.0


def test_prompt_records_are_moving_averages():
    context = table_context(TablePolicy(spread=1.0))
    record = PromptRecord(PromptChoice(memory=0.75))
    first, second = batch_of(context, 4, 0), batch_of(context, 4, 1)
    record.observe(first)
    record.observe(second)
    means = [batch.scores.total[:4].mean().item() for batch in (first, second)]
    assert record.known["p0"][0] == pytest.approx(0.75 * means[0] + 0.25 * means[1])


def test_replay_fills_the_places_of_silent_samples():
    policy = TablePolicy(spread=1.0)
    context = table_context(policy, reward=exact)
    algorithm = PolicyGradient(group_size=8, replay=Replay())
    first = take_step(algorithm, context, 0, lr=0.5)
    kept = len(algorithm.buffer.entries)
    assert 0 < kept < 32
    assert kept == int((first.advantage != 0).any(1).sum())
    # From here on no new sample teaches anything.
    context.scorer.terms = table_context(policy, reward=lambda samples: [1.0] * len(samples)).scorer.terms
    second = algorithm.collect(context, context.prompts.batch(1), 1)
    assert len(algorithm.buffer.entries) == kept
    replayed = (second.advantage != 0).any(1)
    assert replayed.sum() == min(kept, 32)
    known = {(entry["prompt"], tuple(entry["tokens"])): entry for entry in algorithm.buffer.entries}
    for row in replayed.nonzero().flatten().tolist():
        tokens = policy.completions(second.rollout[[row]])[0]
        entry = known[second.rollout.samples.prompts[row].id, tuple(tokens)]
        assert second.rollout.logp[row, : len(tokens)].tolist() == entry["logp"]
        assert second.advantage[row, 0].item() == pytest.approx(entry["advantage"])
    (update,) = algorithm.updates(context, second, 1)
    assert update.size == int(replayed.sum())


HOOKS = {
    "replay": {"replay": {"capacity": 40}, "kl_coef": 0.1, "epochs": 2},
    "prompt_choice": {"prompt_choice": {"by": "variance", "diversity": 0.1}},
    "curriculum": {"prompt_choice": {"by": "difficulty", "target": {"start": 1, "end": 0, "steps": 6}}},
    "consistency": {"consistency": {"marker": "3", "right": 0.1, "every": 2}},
    "everything": {
        "replay": {},
        "prompt_choice": {},
        "dynamic_sampling": {"max_tries": 2},
        "rethinking": {"trigger": "3", "keep": "always"},
        "ground_truth": {"when": "all_fail"},
        "soft_advantage": [1.0, 0.5],
        "importance": {"mode": "mask"},
        "mask_truncated": "exclude",
        "minibatches": 2,
    },
}


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_resume_bit_exactly(tmp_path, name):
    """Six steps with several updates each equal three, a stop and three more, buffers and records included."""
    reward = f"{HERE}:exact" if name in ("replay", "everything") else f"{HERE}:share_right"
    state = resumes_bit_exactly(
        tmp_path,
        {"type": "grpo", "group_size": 8, **HOOKS[name]},
        trainer={"steps": 6, "save_every": 3, "lr": 0.5},
        rewards=[{"type": reward}],
        data={"batch_size": 2},
    )
    if name in ("replay", "everything"):
        assert state["replay"]
        shares = [line.get("replay/share", 0.0) for line in lines(tmp_path / "straight")]
        assert max(shares) > 0
    if name in ("prompt_choice", "curriculum"):
        assert len(state["prompts"]) == 4


def test_over_turn_masking_leaves_rows_out_of_the_divisor():
    policy = TablePolicy(spread=1.0, seed=3)
    totals = {}
    for mask in (True, "exclude"):
        context = table_context(policy)
        algorithm = PolicyGradient(group_size=8, mask_truncated=mask, drop_silent=False)
        experience = algorithm.collect(context, context.prompts.batch(0), 0)
        (update,) = algorithm.updates(context, experience, 0)
        totals[mask] = sum(micro_batch.weight.sum().item() for micro_batch in update.micro_batches)
        kept = 1 - experience.rollout.samples.truncated.float().mean().item()
    assert totals["exclude"] == pytest.approx(1.0, abs=1e-6)
    assert totals[True] == pytest.approx(kept, abs=1e-6)
    assert kept < 1


def test_advantages_can_be_scaled_and_bent():
    context = table_context(TablePolicy(spread=1.0))
    plain = PolicyGradient(group_size=8).collect(context, context.prompts.batch(0), 0).advantage
    scaled = PolicyGradient(group_size=8, advantage_scale=(0.5, 1.0)).collect(context, context.prompts.batch(0), 0)
    assert torch.allclose(scaled.advantage, torch.where(plain > 0, 0.5, 1.0) * plain)
    bent = PolicyGradient(group_size=8, soft_advantage=(1.0, 0.0)).collect(context, context.prompts.batch(0), 0)
    assert torch.allclose(bent.advantage, torch.where(plain > 0, plain.clamp(min=0).log1p(), plain))


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        ({"type": "ppo", "replay": {}}, "keeps one advantage a sample"),
        ({"type": "grpo", "hints": {"colum": "a"}}, r"algorithm.hints.colum.*did you mean 'column'"),
        ({"type": "grpo", "replay": {"capacity": 0}}, "algorithm.replay.capacity"),
        ({"type": "grpo", "prompt_choice": {"by": "luck"}}, "algorithm.prompt_choice.by"),
    ],
)
def test_wrong_options_are_refused(tmp_path, algorithm, message):
    with pytest.raises(UserError, match=message):
        parse_config(table_config(tmp_path / "run", algorithm))


def test_diffusion_cannot_be_given_completions(tmp_path):
    config = tiny_config("builtin:sd3-shapes", tmp_path / "run", algorithm={"type": "grpo", "replay": {}})
    with pytest.raises(UserError, match="needs a policy that offers given"):
        parse_config(config)
