"""The rewards of texts on the questions of the shape world: right responses earn everything, wrong ones do not."""

import torch

from mmrl.data import load_prompts
from mmrl.scoring import Scorer, Term
from mmrl.types import Samples
from mmrl.world.questions import SIDE
from rewards import load_reward

TASKS = ("ground", "count", "relation", "colour")


def test_right_and_wrong_responses():
    prompts = load_prompts("mmrl.world.questions:rows", options={"count": 24})
    right = [prompt.metadata["response"] for prompt in prompts]
    wrong = [right[(k + 4) % len(right)] for k in range(len(right))]
    scorer = Scorer(
        [
            Term(load_reward("format"), weight=0.5),
            Term(load_reward("iou", frame="pixels"), tasks=["ground"]),
            Term(load_reward("counting"), tasks=["count"]),
            Term(load_reward("exact"), tasks=["relation", "colour"]),
        ]
    )

    def score(texts):
        sizes = [[(SIDE, SIDE)]] * len(texts)
        return scorer(Samples(prompts, texts=texts, sizes=sizes, lengths=torch.ones(len(texts))))

    best = score(right)
    assert best.total.tolist() == [1.5] * 24
    assert best.metrics()["reward/iou/share"] == 0.25
    mixed = score(wrong)
    assert mixed.each["format"].tolist() == [1.0] * 24
    assert mixed.total.mean() < 1.3
    assert score(["", "<think>", "maybe"] * 8).total.max() == 0
    marks = scorer.marks(Samples(prompts, texts=right, sizes=[[(SIDE, SIDE)]] * 24))
    for prompt, found in zip(prompts, marks, strict=True):
        assert [mark["label"] for mark in found] == (["predicted", "true"] if prompt.task == "ground" else [])
