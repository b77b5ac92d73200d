"""The quickstart's CLIP: what ships, how well it agrees with the exact verifier, and what trained it."""

import numpy as np
import pytest
import torch
from reward_samples import directional_check
from torch.nn import functional as F

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from mmrl.world import draw, place, score
from mmrl.world.captions import Target, all_targets, caption, is_held_out, key_of, task_of, vocabulary
from mmrl.world.scenes import COLOURS, RELATIONS, SHAPES
from rewards import load_reward
from rewards.quickstart.clip_shapes import (
    LABEL_TEMPERATURE,
    SIDE,
    build_model,
    build_tokenizer,
    contrast,
    random_batch,
    train,
)
from rewards.quickstart.flawed_pictures import flawed
from rewards.weights import BUILTIN

FOLDER = BUILTIN / "clip-shapes"
HELD_OUT = [t for task in ("count", "pair", "relation") for t in all_targets(task) if is_held_out(t)]


@pytest.fixture(scope="module")
def reward():
    return load_reward("clip", model="builtin:clip-shapes")


def scores(reward, images: torch.Tensor, targets: list[Target], rng: np.random.Generator) -> torch.Tensor:
    return reward(Samples([Prompt(caption(target, rng)) for target in targets], images=images))


def near_misses(target: Target) -> list[Target]:
    """Targets that differ from one in a single colour, shape, number or relation."""
    objects, found = target["objects"], []
    for k in range(len(objects)):
        for key, choices in (("colour", COLOURS), ("shape", SHAPES)):
            for value in choices:
                alike = task_of(target) == "count"
                new = [{**o, key: value} if alike or j == k else o for j, o in enumerate(objects)]
                if alike or new[0] != new[1]:
                    found.append({"objects": new, "relation": target["relation"]})
    if target["relation"]:
        found += [{"objects": objects, "relation": [0, name, 1]} for name in RELATIONS]
    else:
        found += [{"objects": objects[:1] * n, "relation": None} for n in (1, 2, 3)]
    found = {key_of(t): t for t in found}
    found.pop(key_of(target))
    return list(found.values())


def ranks(values) -> np.ndarray:
    """Mean ranks, so that ties do not matter."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def test_ships_a_small_clip_that_plain_transformers_loads(reward):
    from transformers import AutoProcessor, CLIPModel

    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 3e6
    model, processor = CLIPModel.from_pretrained(FOLDER, dtype=torch.float32), AutoProcessor.from_pretrained(FOLDER)
    prompts = [Prompt("a red circle above one blue cross"), Prompt("three green squares")]
    images = draw([place(target, np.random.default_rng(0)) for target in HELD_OUT[:2]])
    pixels = processor.image_processor(list(images), do_rescale=False, return_tensors="pt")
    tokens = processor.tokenizer([p.text for p in prompts], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**pixels, **tokens)
    expected = (output.image_embeds * output.text_embeds).sum(-1)
    torch.testing.assert_close(reward(Samples(prompts, images=images)), expected, atol=1e-5, rtol=0)


def test_every_word_of_the_world_is_one_token(reward):
    tokenizer = reward.encoder.tokenizer
    assert [word for word in vocabulary() if len(tokenizer(word).input_ids) != 3] == []
    longest = max(len(tokenizer(caption(t, np.random.default_rng(0))).input_ids) for t in HELD_OUT)
    assert longest <= tokenizer.model_max_length
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()


def test_unknown_builtin_names_the_right_one():
    with pytest.raises(UserError, match="did you mean 'clip-shapes'"):
        load_reward("clip", model="builtin:clip-shape")


def test_finds_the_caption_among_hard_negatives_it_was_not_trained_on(reward):
    rng = np.random.default_rng(5)
    right = []
    for k in rng.permutation(len(HELD_OUT))[:100]:
        wrong = near_misses(HELD_OUT[k])
        targets = [HELD_OUT[k], *(wrong[j] for j in rng.permutation(len(wrong))[:7])]
        image = draw([place(HELD_OUT[k], rng)])
        right.append(scores(reward, image.expand(8, -1, -1, -1), targets, rng).argmax().item() == 0)
    assert len(right) > 50
    assert np.mean(right) >= 0.4  # by chance 0.125; the shipped model reaches 0.51 where 0.9 was hoped for


def test_ranks_flawed_pictures_as_the_verifier_does(reward):
    rng = np.random.default_rng(6)
    shown = [HELD_OUT[k] for k in rng.integers(len(HELD_OUT), size=200)]
    asked = [t if rng.random() < 0.5 else near_misses(t)[0] for t in shown]
    images = flawed(shown, SIDE, rng)
    ours, exact = scores(reward, images, asked, rng), score(images, asked)
    assert np.corrcoef(ranks(ours), ranks(exact))[0, 1] >= 0.7


def test_a_few_steps_up_the_gradient_do_not_fool_the_eye(reward):
    rng = np.random.default_rng(7)
    targets = [HELD_OUT[k] for k in rng.integers(len(HELD_OUT), size=32)]
    images = draw([place(near_misses(t)[int(rng.integers(4))], rng) for t in targets])
    prompts = [Prompt(caption(t, rng)) for t in targets]
    change = torch.zeros(32, 3, 8, 8, requires_grad=True)
    optimiser = torch.optim.Adam([change], 0.02)

    def changed() -> torch.Tensor:
        return (images + F.interpolate(change, SIDE, mode="bicubic")).clamp(0, 1)

    before = reward(Samples(prompts, images=images)).mean()
    for _ in range(10):
        optimiser.zero_grad()
        (-reward(Samples(prompts, images=changed())).sum()).backward()
        optimiser.step()
    after = changed().detach()
    assert reward(Samples(prompts, images=after)).mean() > before
    assert np.mean(score(after, targets)) > np.mean(score(images, targets)) - 0.02


def test_gradient_is_that_of_finite_differences(reward):
    rng = np.random.default_rng(8)
    images = 0.1 + 0.8 * draw([place(target, rng) for target in HELD_OUT[:2]])
    directional_check(lambda x: scores(reward, x, HELD_OUT[:2], np.random.default_rng(0)), images)


def test_loss_is_clips_for_sharp_labels_and_zero_for_the_verifiers_own_marks():
    logits = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    clip = F.cross_entropy(logits, torch.arange(6)) + F.cross_entropy(logits.T, torch.arange(6))
    # One-hot to within exp(-1 / 0.05) = 2e-9.
    torch.testing.assert_close(contrast(logits, torch.eye(6)), clip, atol=1e-5, rtol=0)
    marks = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    assert contrast(marks / LABEL_TEMPERATURE + 3.0, marks).abs() < 1e-5


def test_batches_show_no_held_out_target_and_carry_the_verifiers_scores():
    batch = random_batch(np.random.default_rng(0))
    assert batch.pictures.shape == (80, 3, SIDE, SIDE)
    assert batch.pictures.min() >= 0
    assert batch.pictures.max() <= 1
    assert not any(is_held_out(target) for target in batch.targets)
    assert len({key_of(target) for target in batch.targets}) == len(batch.targets)
    expected = score(batch.pictures[:7], batch.targets[:7])
    torch.testing.assert_close(batch.marks.diagonal()[:7], torch.tensor(expected))
    # Flawed, but not ruined: most pictures show one of the captions at least by half.
    assert (batch.marks.amax(1) > 0.5).float().mean() > 0.5
    assert (batch.marks.amax(1) < 1).any()


def test_training_lowers_the_loss_and_repeats_exactly():
    pool = [random_batch(np.random.default_rng(k)) for k in range(2)]
    runs = []
    for _ in range(2):
        tokenizer, losses = build_tokenizer(), []
        model = build_model(tokenizer, seed=3)
        train(model, tokenizer, pool, 30, 3, lambda step, loss, to=losses: to.append(loss))
        runs.append(losses)
    assert runs[0] == runs[1]
    assert np.mean(runs[0][-4:]) < np.mean(runs[0][:4])
