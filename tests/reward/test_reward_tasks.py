"""Rewards that are for some tasks only."""

import pytest
import torch

from mmrl.components import build_scorer, reward_component
from mmrl.errors import UserError
from mmrl.scoring import RewardError, Scorer, Term
from mmrl.types import Prompt, Samples


def mixed(tasks="count ground count other"):
    prompts = [Prompt(f"question {k}", id=f"q:{k}", task=task) for k, task in enumerate(tasks.split())]
    return Samples(prompts, texts=[str(k) for k in range(len(prompts))], group=torch.arange(len(prompts)))


def own_number(samples):
    """Fails on tasks that it does not know, to show that it never sees them."""
    assert {prompt.task for prompt in samples.prompts} <= {"count", "ground"}
    return [float(text) for text in samples.texts]


def test_only_rows_of_the_tasks_are_scored():
    scorer = Scorer([Term(own_number, tasks=["count"], weight=2.0), Term(own_number, name="g", tasks=["ground"])])
    scores = scorer(mixed())
    torch.testing.assert_close(scores.total[:3], torch.tensor([0.0, 1.0, 4.0]))
    assert scores.total[3].isnan()
    assert scores.each["g"].isnan().tolist() == [True, False, True, True]
    assert scores.metrics()["reward/g/share"] == 0.25


def test_no_row_of_the_task_means_no_call():
    def never(samples):
        raise AssertionError("called")

    assert Scorer([Term(never, tasks=["video"])])(mixed()).total.isnan().all()


def test_the_sample_to_blame_is_named_by_its_row():
    def fails_on_two(samples):
        return [1 / (text != "2") for text in samples.texts]

    with pytest.raises(RewardError, match=r"failed on sample \d \(prompt 'q:2'"):
        Scorer([Term(fails_on_two, tasks=["count"])])(mixed())


def test_gradients_flow_to_the_rows_of_the_task():
    def mean_pixel(samples):
        return samples.images.mean((1, 2, 3))

    mean_pixel.differentiable = True
    samples = mixed()
    samples = Samples(samples.prompts, images=torch.rand(4, 3, 2, 2, requires_grad=True))
    total = Scorer([Term(mean_pixel, tasks=["count"])])(samples, grad=True).total
    (gradient,) = torch.autograd.grad(total[[0, 2]].sum(), samples.images)
    assert gradient.flatten(1).sum(1).tolist() == pytest.approx([1.0, 0.0, 1.0, 0.0])


def test_tasks_in_a_config():
    def build(**options):
        item = {"type": f"{__file__}:own_number", **options}
        return build_scorer([reward_component(item, where="run.yaml", path="rewards.0", folders=[])])

    assert build(tasks=["ground"])(mixed()).total.tolist()[1] == 1
    with pytest.raises(UserError, match=r"'rewards.0.tasks' is 'ground', but should be a list"):
        build(tasks="ground")
    with pytest.raises(UserError, match="tasks is an empty list"):
        build(tasks=[])


def test_marks_come_from_the_rows_of_the_task():
    own_number.marks = lambda samples: [[{"label": "predicted", "point": [0.5, float(text)]}] for text in samples.texts]
    marks = Scorer([Term(own_number, tasks=["ground"])]).marks(mixed())
    del own_number.marks
    assert marks == [[], [{"label": "predicted", "point": [0.5, 1.0]}], [], []]
