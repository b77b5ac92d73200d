"""The weighted sum, and that no failure of a reward goes unnoticed."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from mmrl.errors import UserError
from mmrl.scoring import LinearWeight, RewardError, Scorer, Term
from mmrl.types import Prompt, Samples


def given(*scores, **attributes):
    """A reward that returns the given scores for the rows of ``samples``, picked by prompt id."""

    def reward(samples):
        return [scores[int(prompt.id.split(":")[1]) - 1] for prompt in samples.prompts]

    for key, value in attributes.items():
        setattr(reward, key, value)
    return reward


def mean_pixel(samples):
    return samples.images.mean((1, 2, 3))


mean_pixel.differentiable = True


def test_sum_of_weighted_scaled_clipped_values(samples):
    scorer = Scorer(
        [
            Term(given(1, 2, 3, 4), name="a", weight=2.0),
            Term(given(10, 20, 30, 40), name="b", weight=-1.0, scale=0.1, offset=1.0, clip=(2.5, 4.0)),
        ]
    )
    scores = scorer(samples)
    assert scores.values.tolist() == [[1, 2.5], [2, 3], [3, 4], [4, 4]]
    assert scores.total.tolist() == [-0.5, 1, 2, 4]
    assert scores.weights.tolist() == [2, -1]
    assert scores.each["b"].tolist() == [10, 20, 30, 40]
    assert scores.total.dtype == torch.float32


def test_rewards_that_do_not_apply(samples):
    scorer = Scorer(
        [
            Term(given(1, None, 3, None), name="a"),
            Term(given(5, 6, None, None), name="b", weight=0.5),
            Term(given(9, 9, 9, 9), name="watched", weight=0.0),
        ]
    )
    scores = scorer(samples)
    assert scores.total[:3].tolist() == [3.5, 3.0, 3.0]
    assert scores.total[3].isnan()
    assert scores.values[:, 0].isnan().tolist() == [False, True, False, True]
    assert scores.values[:, 1].isnan().tolist() == [False, False, True, True]
    metrics = scores.metrics()
    assert metrics["reward/mean"] == pytest.approx(9.5 / 3)
    assert metrics["reward/std"] == pytest.approx(np.std([3.5, 3, 3]))
    assert metrics["reward/a/mean"] == 2
    assert metrics["reward/a/std"] == 1
    assert metrics["reward/a/share"] == 0.5
    assert metrics["reward/watched/mean"] == 9
    assert "reward/watched/share" not in metrics
    assert metrics["reward/a/seconds"] >= 0


def test_reward_that_applies_to_none(samples):
    scores = Scorer([given(None, None, None, None)])(samples)
    assert scores.total.isnan().all()
    assert set(scores.metrics()) == {"reward/reward/share", "reward/reward/seconds"}


def test_gate(samples):
    scorer = Scorer(
        [
            Term(given(1, 2, 3, None), name="a", weight=2.0),
            Term(given(0.5, 0.6, None, 0.1), name="gate", weight=1.0, gate=0.5),
        ]
    )
    scores = scorer(samples)
    # Closed, open, not asked, closed on a sample to which the other does not apply.
    torch.testing.assert_close(scores.total, torch.tensor([0.0, 4.6, 6.0, 0.0]))
    assert scores.values[0].tolist() == [0, 0]
    assert scores.values[3, 0].isnan()
    torch.testing.assert_close(scores.each["gate"][:2], torch.tensor([0.5, 0.6]))
    # A gate that is only a gate.
    only = Scorer([Term(given(1, 2, 3, 4), name="a"), Term(given(0, 1, 0, 1), name="g", weight=0, gate=0.5)])
    assert only(samples).total.tolist() == [0, 2, 0, 4]


def test_weight_is_a_function_of_the_step(samples):
    scorer = Scorer([Term(given(1, 1, 1, 1), weight=LinearWeight(1.0, 0.0, 4))])
    assert [scorer(samples, step=step).total[0].item() for step in (0, 1, 2, 4, 9)] == [1, 0.75, 0.5, 0, 0]


@pytest.mark.parametrize("kind", ["list", "tuple", "tensor", "array", "int tensor", "tensors in a list", "bools"])
def test_kinds_of_results(samples, kind):
    results = {
        "list": [1, 0, 1, 0],
        "tuple": (1.0, 0.0, 1.0, 0.0),
        "tensor": torch.tensor([1.0, 0, 1, 0], dtype=torch.float64),
        "array": np.array([1, 0, 1, 0], dtype=np.float32),
        "int tensor": torch.tensor([1, 0, 1, 0]),
        "tensors in a list": [torch.tensor([1.0]), torch.tensor(0.0), 1.0, 0],
        "bools": [True, False, True, False],
    }
    assert Scorer([lambda samples: results[kind]])(samples).total.tolist() == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        (
            [1, 2, float("nan"), 4],
            r"returned nan for sample 2 \(prompt 'prompts.txt:3'",
        ),
        (
            torch.tensor([1, float("inf"), 3, float("-inf")]),
            r"returned inf for sample 1 .*1 more",
        ),
        (np.array([np.nan, 1, 1, 1]), r"returned nan for sample 0 \(prompt 'prompts.txt:1'"),
        ([1, 2, "3", 4], r"returned str '3' for sample 2 \(prompt 'prompts.txt:3'"),
        ([1, 2, [3], 4], r"returned list \[3\] for sample 2"),
        ([1, 2, torch.zeros(2), 4], r"returned Tensor tensor\(\[0., 0.\]\) for sample 2"),
        ([1, 2, 3], "returned 3 scores for 4 samples"),
        (torch.zeros(5), r"returned shape \[5\] for 4 samples; it must be \[4\]"),
        (torch.zeros(4, 1), r"returned shape \[4, 1\] for 4 samples"),
        (torch.tensor(1.0), r"returned shape \[\] for 4 samples"),
        (None, "returned NoneType, not a tensor or list of 4 scores"),
        (1.0, "returned float, not a tensor or list of 4 scores"),
    ],
)
def test_bad_results_stop_the_step(samples, result, sentence):
    scorer = Scorer([Term(given(1, 1, 1, 1), name="good"), Term(lambda samples: result, name="bad")])
    with pytest.raises(RewardError, match=f"reward 'bad' {sentence}"):
        scorer(samples)


def test_partial_reward_may_return_nan_but_not_infinity(samples):
    def partial(samples):
        return torch.tensor([1.0, float("nan"), 3.0, partial.last])

    partial.partial, partial.last = True, 4.0
    assert Scorer([partial])(samples).total.isnan().tolist() == [False, True, False, False]
    partial.last = float("inf")
    with pytest.raises(RewardError, match="returned inf for sample 3"):
        Scorer([partial])(samples)


def test_exception_names_the_first_sample_that_fails_alone(samples):
    def fragile(samples):
        if any("ring" in prompt.text for prompt in samples.prompts):
            raise KeyError("no ring here")
        return torch.zeros(len(samples))

    with pytest.raises(
        RewardError, match=r"reward 'fragile' failed on sample 2 \(prompt 'prompts.txt:3': .*KeyError: 'no ring here'"
    ) as caught:
        Scorer([fragile])(samples)
    assert isinstance(caught.value.__cause__, KeyError)


def test_exception_of_the_whole_batch(samples):
    def large(samples):
        if len(samples) > 2:
            raise RuntimeError("out of memory")
        return torch.zeros(len(samples))

    with pytest.raises(
        RewardError, match="'large' failed on a batch of 4 samples, though on none of them alone: RuntimeError: out of"
    ):
        Scorer([large])(samples)


def test_samples_are_scored_one_by_one_only_after_a_failure(samples):
    sizes = []

    def counting(samples):
        sizes.append(len(samples))
        return torch.zeros(len(samples))

    Scorer([counting])(samples)
    assert sizes == [4]


def test_user_error_of_a_reward_comes_through(samples):
    def wrong(samples):
        raise UserError("the sentence")

    with pytest.raises(UserError, match=r"^the sentence$"):
        Scorer([wrong])(samples)


def test_timeout_names_the_sample(samples):
    def slow(samples):
        time.sleep(5 if any("star" in prompt.text for prompt in samples.prompts) else 0)
        return torch.zeros(len(samples))

    start = time.perf_counter()
    with pytest.raises(RewardError, match=r"'slow' took longer than its timeout of 0.4 s; .*sample 2 \(pro"):
        Scorer([Term(slow, timeout=0.4)])(samples)
    assert time.perf_counter() - start < 3


def test_timeout_of_the_whole_batch_names_the_slowest(samples):
    def steady(samples):
        time.sleep(2 if len(samples) == 4 else 0.2 if samples.prompts[0].id.endswith("2") else 0.01)
        return torch.zeros(len(samples))

    with pytest.raises(RewardError, match=r"timeout of 1 s for 4 samples; .* slowest was sample 1 .* with 0.2"):
        Scorer([Term(steady, timeout=1.0)])(samples)


def test_reward_in_time_is_unaffected_by_its_timeout(samples):
    images = samples.images.clone().requires_grad_(True)
    given_images = Samples(samples.prompts, images=images)
    scores = Scorer([Term(mean_pixel, timeout=20.0)])(given_images, grad=True)
    (gradient,) = torch.autograd.grad(scores.total.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 1 / images[0].numel()))
    assert not Scorer([Term(mean_pixel, timeout=20.0)])(given_images).total.requires_grad

    def raising(samples):
        raise KeyError("inside")

    with pytest.raises(RewardError, match=r"failed on sample 0 .*KeyError: 'inside'"):
        Scorer([Term(raising, timeout=20.0)])(samples)

    # A reward's own TimeoutError (of an HTTP client, say) is its error, not ours.
    def unreachable(samples):
        raise TimeoutError("server")

    with pytest.raises(RewardError, match=r"failed on sample 0 .*TimeoutError: server"):
        Scorer([Term(unreachable, timeout=20.0)])(samples)


def test_reward_that_hangs_does_not_keep_the_process_alive():
    code = (
        "import time, torch; from mmrl.scoring import *; from mmrl.types import *\n"
        "def hang(samples): time.sleep(60)\n"
        "try: Scorer([Term(hang, timeout=0.1)])(Samples([Prompt('a')], images=torch.zeros(1, 3, 2, 2)))\n"
        "except RewardError: raise SystemExit(7)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=45, check=False).returncode == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_picture_is_no_picture(samples, value):
    samples.images[2, 0, 3, 3] = value
    with pytest.raises(RewardError, match=r"the picture of sample 2 \(prompt 'prompts.txt:3': .*NaN or infinite"):
        Scorer([given(1, 1, 1, 1)])(samples)


def test_gradient_reaches_the_pictures(samples):
    images = samples.images.clone().requires_grad_(True)
    scorer = Scorer(
        [
            Term(mean_pixel, name="a", weight=2.0, scale=3.0),
            Term(mean_pixel, name="clipped", clip=(-2.0, -1.0)),
            Term(lambda samples: samples.images.numpy().mean((1, 2, 3)), name="watched", weight=0.0),
        ]
    )
    scores = scorer(Samples(samples.prompts, images=images), grad=True)
    (gradient,) = torch.autograd.grad(scores.total.sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, 6 / images[0].numel()))
    assert not scorer(samples).total.requires_grad


def test_gradient_is_refused_with_the_names(samples):
    ones = given(1, 1, 1, 1)
    scorer = Scorer([Term(mean_pixel, name="good"), Term(ones, name="first"), Term(ones, name="second")])
    with pytest.raises(
        UserError, match="through reward 'first', 'second'; of the configured ones they do through 'good'"
    ):
        scorer(samples, grad=True)
    with pytest.raises(UserError, match=r"through none \(differentiable rewards: aesthetic, clip\)"):
        Scorer([given(1, 1, 1, 1)]).check_differentiable(["clip", "aesthetic"])
    Scorer([Term(mean_pixel)]).check_differentiable()


def test_bad_lists_of_rewards():
    with pytest.raises(UserError, match="two rewards are called 'mean_pixel'"):
        Scorer([mean_pixel, mean_pixel])
    with pytest.raises(UserError, match="the list is empty"):
        Scorer([])
    with pytest.raises(UserError, match=r"reward 'mean_pixel': clip is \[1.0, 0.0\]"):
        Scorer([Term(mean_pixel, clip=(1.0, 0.0))])


def test_long_prompt_is_shortened_in_messages():
    samples = Samples([Prompt("word " * 100)], images=torch.zeros(1, 3, 2, 2))
    with pytest.raises(RewardError) as caught:
        Scorer([lambda samples: [float("nan")]])(samples)
    assert len(str(caught.value)) < 250


def test_same_samples_give_the_same_bits(samples):
    scorer = Scorer([mean_pixel])
    assert torch.equal(scorer(samples).total, scorer(samples).total)
