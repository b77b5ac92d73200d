"""Detection reward: the rules on hand-made detections, and tiny random detectors of the real classes."""

import math

import pytest
import torch
from reward_samples import SIZE
from torch import nn

from mmrl.errors import UserError
from mmrl.seeding import generator
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.detection import COLORS, color_by_pixels, crop, marks, overlap, positions, read_request, select, total
from rewards.detectors import Found, box_of_mask, load_detector, match_phrase
from rewards.encoders import load_encoder

LABELS = ["clock", "dog", "mouse", "wine glass"]


def ask(*objects, relation=None):
    return read_request({"objects": list(objects), "relation": relation}, "here")


def at(x, y, size=10.0, score=0.9):
    return Found(score, (x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def paint(kind, one):
    """The colour of hand-made objects is written in their position."""
    return "red" if one.box[0] < 50 else "blue"


@pytest.mark.parametrize(("count", "mark"), [(0, 0.0), (1, 0.5), (2, 1.0), (3, 0.5), (4, 0.0), (9, 0.0)])
def test_number(count, mark):
    request = ask({"class": "clock", "count": 2})
    assert marks(request, {"clock": [at(10 * i, 10) for i in range(count)]}, paint) == [mark]


def test_color_counts_only_where_the_number_is_right():
    request = ask({"class": "clock", "count": 2, "color": "red"})
    left, right = at(20, 20), at(80, 20)
    assert marks(request, {"clock": [left, left]}, paint) == [1, 1]
    assert marks(request, {"clock": [left, right]}, paint) == [1, 0.5]
    assert marks(request, {"clock": [right, right]}, paint) == [1, 0]
    assert marks(request, {"clock": [left]}, paint) == [0.5, 0]
    assert marks(request, {}, paint) == [0, 0]


def test_two_colors_of_one_class():
    request = ask({"class": "clock", "color": "red"}, {"class": "clock", "color": "blue"}, relation="left of")
    assert marks(request, {"clock": [at(80, 20), at(20, 20)]}, paint) == [1, 1, 1, 1, 1]
    assert marks(request, {"clock": [at(20, 20), at(25, 20)]}, paint) == [1, 0, 1, 0, 0]
    assert marks(request, {"clock": [at(20, 20)]}, paint) == [0.5, 0, 0.5, 0, 0]


def test_relation_needs_both_objects_right():
    request = ask({"class": "cup"}, {"class": "dog", "count": 2}, relation="above")
    cup, dogs = at(50, 10), [at(45, 80), at(60, 80)]
    assert marks(request, {"cup": [cup], "dog": dogs}, paint) == [1, 1, 1]
    assert marks(request, {"cup": [cup], "dog": [dogs[0], at(90, 10)]}, paint) == [1, 1, 0]  # all of the second
    assert marks(request, {"cup": [cup], "dog": dogs[:1]}, paint) == [1, 0.5, 0]
    assert marks(request, {"cup": [at(50, 90)], "dog": dogs}, paint) == [1, 1, 0]


def test_graded_and_strict():
    assert total([1, 0.5, 0]) == 0.5
    assert total([1, 0.5, 0], strict=True) == 0
    assert total([1.0, 1.0], strict=True) == 1


def test_positions():
    def seen(x, y, margin=0.1):
        return positions(at(x, y).box, at(50, 50).box, margin)

    assert seen(20, 50) == {"left of"}
    assert seen(80, 55) == {"right of"}
    assert seen(50, 20) == {"above"}
    assert seen(45, 80) == {"below"}
    assert seen(20, 20) == {"left of", "above"}
    assert seen(50, 50) == set()
    # 0.1 of both widths (10 + 10) is 2, so an offset of 4 leaves exactly half of itself, which is not more than half.
    assert seen(54, 50) == set()
    assert seen(54.1, 50) == {"right of"}
    assert seen(54, 50, margin=0.05) == {"right of"}
    # Without margin a direction holds within 60 degrees of its axis.
    for degrees, right in ((0, True), (59, True), (61, False)):
        angle = math.radians(degrees)
        found = seen(50 + 40 * math.cos(angle), 50 + 40 * math.sin(angle), margin=0)
        assert ("right of" in found) == right


def test_select():
    low, good, best = at(10, 10, score=0.3), at(11, 10, score=0.5), at(60, 10, score=0.8)
    assert select([low, good, best], 0.3) == [best, good]
    assert select([low, good, best], 0.1, most=2) == [best, good]
    # 9 x 10 of 11 x 10 pixels are shared.
    assert overlap(low.box, good.box) == pytest.approx(9 / 11)
    assert select([low, good, best], 0.1, nms=0.8) == [best, good]
    assert select([low, good, best], 0.1, nms=0.9) == [best, good, low]
    assert overlap(low.box, best.box) == 0


def test_phrases_of_a_grounding_detector():
    names = ("wine glass", "dog", "hot dog")
    assert match_phrase("Dog", names) == "dog"
    assert match_phrase("glass", names) == "wine glass"
    assert match_phrase("hot dog", names) == "hot dog"
    assert match_phrase("wine glass dog", ("wine glass", "dog")) is None
    assert match_phrase("cat", names) is None
    assert match_phrase("", names) is None


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((200, 30, 30), "red"),
        ((240, 140, 20), "orange"),
        ((250, 230, 40), "yellow"),
        ((60, 160, 70), "green"),
        ((40, 60, 200), "blue"),
        ((120, 40, 140), "purple"),
        ((250, 170, 190), "pink"),
        ((120, 70, 30), "brown"),
        ((25, 25, 25), "black"),
        ((235, 235, 230), "white"),
    ],
)
def test_color_by_pixels(rgb, name):
    image = torch.ones(3, 40, 40) * torch.tensor([0.0, 1.0, 1.0])[:, None, None]
    image[:, 15:25, 15:25] = torch.tensor(rgb)[:, None, None] / 255
    assert color_by_pixels(image, Found(1.0, (10.0, 10.0, 30.0, 30.0)), COLORS) == name  # middle half of the box
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[14:25, 14:25] = True  # a ring of one pixel is background
    assert color_by_pixels(image, Found(1.0, box_of_mask(mask), mask), COLORS) == name


def test_lab_equals_published_values():
    from rewards.detection import _lab

    # The corners of sRGB as in any table of CIELAB under D65.
    known = {(1, 0, 0): (53.24, 80.09, 67.20), (0, 1, 0): (87.74, -86.18, 83.18), (0, 0, 1): (32.30, 79.19, -107.86)}
    known |= {(1, 1, 1): (100, 0, 0), (0, 0, 0): (0, 0, 0)}
    rgb = torch.tensor(list(known), dtype=torch.float32)
    torch.testing.assert_close(_lab(rgb), torch.tensor(list(known.values())).float(), atol=0.02, rtol=0)


def test_crop_stays_inside_and_greys_the_background():
    image = torch.rand(3, 20, 30, generator=generator(0, "crop"))
    assert crop(image, Found(1.0, (-5.0, 2.4, 10.6, 50.0)), None).equal(image[:, 2:20, 0:11])
    assert crop(image, Found(1.0, (40.0, 30.0, 41.0, 31.0)), None).shape == (3, 1, 1)
    mask = torch.zeros(20, 30, dtype=torch.bool)
    mask[3:6, 4] = True
    one = Found(1.0, box_of_mask(mask), mask)
    assert one.box == (4, 3, 5, 6)
    wide = crop(image, Found(1.0, (3.0, 3.0, 5.0, 6.0), mask), 0.6)
    assert wide[:, :, 1].equal(image[:, 3:6, 4])
    assert (wide[:, :, 0] == 0.6).all()


@pytest.fixture(scope="module")
def yolos(tmp_path_factory) -> str:
    """Boxes: three, each of them a clock for certain, wherever the picture says."""
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(
        image_size=[SIZE, SIZE],
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        patch_size=8,
        num_detection_tokens=3,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
        initializer_range=0.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = YolosForObjectDetection(config)
    with torch.no_grad():
        model.class_labels_classifier.layers[-1].bias[0] += 100
    return save(tmp_path_factory.mktemp("yolos"), model, YolosImageProcessor(size={"height": SIZE, "width": SIZE}))


@pytest.fixture(scope="module")
def mask2former(tmp_path_factory) -> str:
    pytest.importorskip("scipy", reason="transformers builds no Mask2Former without it")
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor

    config = Mask2FormerConfig(
        backbone_config=tiny_swin(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        id2label=dict(enumerate(LABELS)),
        label2id={label: number for number, label in enumerate(LABELS)},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
    processor = Mask2FormerImageProcessor(size={"height": 64, "width": 64})
    return save(tmp_path_factory.mktemp("mask2former"), model, processor)


@pytest.fixture(scope="module")
def owlvit(tmp_path_factory) -> str:
    from tokenizers import pre_tokenizers
    from transformers import (
        CLIPTokenizer,
        OwlViTConfig,
        OwlViTForObjectDetection,
        OwlViTImageProcessor,
        OwlViTProcessor,
    )

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The model takes a question that begins with token 0 for an empty one, so the start comes last.
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocab = {token: number for number, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=16)
    shared = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = OwlViTConfig(
        text_config={**shared, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16},
        vision_config={**shared, "image_size": SIZE, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = OwlViTForObjectDetection(config)
    processor = OwlViTProcessor(OwlViTImageProcessor(size={"height": SIZE, "width": SIZE}), tokenizer)
    return save(tmp_path_factory.mktemp("owlvit"), model, processor)


@pytest.fixture(scope="module")
def grounding_dino(tmp_path_factory) -> str:
    from transformers import (
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessor,
        GroundingDinoProcessor,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "clock", "dog", "wine", "glass"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    config = GroundingDinoConfig(
        backbone_config=tiny_swin(),
        text_config={
            "model_type": "bert",
            "vocab_size": len(words),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        },
        num_queries=6,
        encoder_layers=1,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=16,
        decoder_attention_heads=2,
        d_model=32,
        num_feature_levels=4,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GroundingDinoForObjectDetection(config)
    processor = GroundingDinoProcessor(
        GroundingDinoImageProcessor(size={"height": 64, "width": 64}, do_pad=False), tokenizer
    )
    return save(tmp_path_factory.mktemp("grounding"), model, processor)


def tiny_swin():
    from transformers import SwinConfig

    return SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )


def save(folder, model: nn.Module, processor) -> str:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def red_images(count=2, height=48, width=64):
    images = 0.1 * torch.rand(count, 3, height, width, generator=generator(0, "red"))
    images[:, 0] += 0.75
    return images


def make_samples(*targets, **kwargs):
    prompts = [Prompt("a picture", id=f"data.jsonl:{row + 1}", target=target) for row, target in enumerate(targets)]
    return Samples(prompts, images=red_images(len(targets), **kwargs))


def test_boxes_equal_those_of_the_library(yolos):
    from transformers import pipeline

    from mmrl.media import to_pil

    images = red_images(3)
    found = load_detector(yolos)(images, [("clock", "dog")] * 3, threshold=0.5, batch_size=2)
    library = pipeline("object-detection", model=yolos, image_processor=yolos, device="cpu")
    for image, row in zip(images, found, strict=True):
        expected = library(to_pil(image), threshold=0.5)
        assert len(expected) == 3 == len(row["clock"])
        assert row["dog"] == []
        for one, other in zip(sorted(row["clock"], key=lambda f: f.box), expected, strict=True):
            assert one.score == pytest.approx(other["score"], abs=1e-5)
        boxes = sorted(tuple(int(edge) for edge in one.box) for one in row["clock"])
        assert boxes == sorted(tuple(other["box"].values()) for other in expected)


def test_reward_with_boxes(yolos):
    reward = load_reward("detection", model=yolos, color_by="pixels")
    scores = reward(
        make_samples(
            {"objects": [{"class": "clock", "count": 3, "color": "red"}]},
            {"objects": [{"class": "Clock ", "count": 3, "color": "blue"}]},
            {"objects": [{"class": "clock", "count": 4}]},
            {"objects": [{"class": "clock", "count": 3}, {"class": "dog"}]},
            {"objects": [{"class": "computer mouse"}]},  # GenEval's name for the label "mouse"
        )
    )
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1, 0.5, 0.75, 0.5, 0]
    strict = load_reward("detection", model=yolos, color_by="pixels", strict=True, batch_size=1)
    two = make_samples(*({"objects": [{"class": "clock", "count": count}]} for count in (3, 2)))
    assert strict(two).tolist() == [1, 0]
    renamed = load_reward("detection", model=yolos, color_by="pixels", names={"watch": "clock"})
    assert renamed(make_samples({"objects": [{"class": "watch", "count": 3}]})).tolist() == [1]


def test_color_by_clip_is_the_zero_shot_choice(clip_folder, yolos):
    """Against transformers' own CLIP classes, sentence by sentence."""
    from transformers import CLIPModel, CLIPProcessor

    from mmrl.media import to_pil
    from rewards.detection import color_by_clip

    model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
    encoder = load_encoder(clip_folder, "transformers", None, None, "float32", None, None)
    image = red_images(1, 32, 32)[0]
    one = Found(1.0, (0.0, 0.0, 32.0, 32.0))
    means = []
    for color in COLORS:
        texts = [f"a photo of a {color} clock", f"a photo of a {color}-colored clock", f"a photo of a {color} object"]
        tokens = processor(text=texts, padding="max_length", max_length=48, return_tensors="pt")
        features = model.get_text_features(**tokens).pooler_output
        means.append((features / features.norm(dim=-1, keepdim=True)).mean(0))
    means = torch.stack(means) / torch.stack(means).norm(dim=-1, keepdim=True)
    pixels = processor(images=to_pil(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        best = COLORS[int((means @ model.get_image_features(pixels).pooler_output[0]).argmax())]
    assert color_by_clip(encoder, image, "clock", one, COLORS) == best
    reward = load_reward("detection", model=yolos, color_by=clip_folder)
    samples = make_samples(*({"objects": [{"class": "clock", "count": 3, "color": color}]} for color in COLORS))
    samples.images = samples.images[:1].expand(len(COLORS), -1, -1, -1)
    # Each of the three clocks is of one colour: the marks are thirds that add up to one.
    thirds = 3 * (2 * reward(samples) - 1)
    torch.testing.assert_close(thirds, thirds.round())
    assert thirds.sum().item() == pytest.approx(3, abs=1e-4)


def test_masks(mask2former):
    detector = load_detector(mask2former)
    found = detector(red_images(2, 48, 80), [tuple(LABELS), ("dog",)], threshold=0.0, batch_size=2)
    assert list(found[0]) == LABELS
    assert list(found[1]) == ["dog"]
    everything = [one for ones in found[0].values() for one in ones]
    assert 0 < len(everything) <= 5
    for one in everything:
        assert one.mask.shape == (48, 80)
        assert one.mask.dtype == torch.bool
        left, top, right, bottom = (int(edge) for edge in one.box)
        assert one.mask[top:bottom, left:right].sum() == one.mask.sum()
        assert one.mask[top:bottom, left].any()
        assert one.mask[top, left:right].any()
    reward = load_reward("detection", model=mask2former, color_by="pixels", threshold=0.0, count_threshold=0.0)
    count = len(found[1]["dog"]) or 1
    scores = reward(make_samples(*[{"objects": [{"class": "dog", "count": count, "color": "red"}]}] * 2, width=80))
    assert scores[1] == (1 if found[1]["dog"] else 0)


def test_masks_made_by_hand(mask2former):
    """Two overlapping clocks and a dog below the threshold, as the network would put it."""
    from types import SimpleNamespace

    queries = torch.full((1, 3, 5), -20.0)
    for query, (label, logit) in enumerate([(0, 20.0), (0, 20.0), (1, -20.0)]):
        queries[0, query, label] = logit
    masks = torch.full((1, 3, 16, 16), -30.0)
    masks[0, 0, 4:12, 0:8] = 30
    masks[0, 1, 4:12, 4:16] = 30
    masks[0, 2, 0:2, 0:2] = 30
    outputs = SimpleNamespace(class_queries_logits=queries, masks_queries_logits=masks)
    [found] = load_detector(mask2former)._read(outputs, [(32, 64)], 0.5)
    assert [label for label, _ in found] == ["clock", "clock"]
    by_edge = sorted((one for _, one in found), key=lambda one: one.box)
    # Four times as wide and twice as high as the network's masks; edges are interpolated before that.
    assert [one.box for one in by_edge] == [pytest.approx((0, 8, 32, 24), abs=1), pytest.approx((16, 8, 64, 24), abs=1)]
    assert all(one.score > 0.99 for _, one in found)


def test_zero_shot_equals_the_library(owlvit):
    from transformers import pipeline

    from mmrl.media import to_pil

    images = red_images(3, SIZE, SIZE)
    found = load_detector(owlvit)(images, [("a cat",), ("a cat", "dog"), ("a cat",)], threshold=0.01, batch_size=2)
    library = pipeline("zero-shot-object-detection", model=owlvit, device="cpu")
    for image, row in ((images[0], found[0]), (images[2], found[2])):
        expected = library(to_pil(image), candidate_labels=["a cat"], threshold=0.01)
        assert 0 < len(expected) == len(row["a cat"])
        scores = sorted((one.score for one in row["a cat"]), reverse=True)
        assert scores == pytest.approx([other["score"] for other in expected], abs=1e-5)
    assert set(found[1]) == {"a cat", "dog"}
    # Each box is given to one class.
    assert len(found[1]["a cat"]) + len(found[1]["dog"]) == 16
    reward = load_reward("detection", model=owlvit, color_by="pixels", threshold=0.01, count_threshold=0.01)
    assert reward(make_samples({"objects": [{"class": "a Cat", "count": 16, "color": "red"}]})).tolist() == [1]


def test_grounding_detector_answers_in_phrases(grounding_dino):
    names = ("clock", "wine glass")
    found = load_detector(grounding_dino)(red_images(2), [names, names], threshold=0.0, batch_size=2)
    for row in found:
        assert set(row) == set(names)
        assert sum(len(ones) for ones in row.values()) <= 6
    reward = load_reward("detection", model=grounding_dino, color_by="pixels")
    scores = reward(make_samples({"objects": [{"class": "clock"}]}, {"objects": [{"class": "Wine glass"}]}))
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"objects": [{"class": "clok"}]}, r"sample 1 \(prompt 'data.jsonl:2'.*'clok'.*did you mean 'clock'"),
        ({"objects": [{"class": "zebra"}]}, r"sample 1 .*'zebra'.*does not know \(choices: clock, dog"),
        ({"objects": [{"class": "dog", "color": "geen"}]}, r"sample 1 .*color 'geen'.*did you mean 'green'"),
        (None, r"sample 1 .*'target' should hold 'key: value' pairs, but is nothing"),
        ({"object": []}, r"sample 1 .*unknown key 'target.object' \(did you mean 'objects'"),
        ({"objects": []}, r"sample 1 .*'target.objects' is a list, but should"),
        (
            {"objects": [{"class": "dog", "count": 0}]},
            r"sample 1 .*'target.objects.0.count' is 0, but should be greater",
        ),
        (
            {"objects": [{"class": "dog"}], "relation": "under"},
            r"'target.relation' is 'under', but should be 'left of'",
        ),
        ({"objects": [{"class": "dog"}], "relation": "above"}, r"sample 1 .*needs two different objects"),
    ],
)
def test_bad_targets_name_the_sample(yolos, target, said):
    reward = load_reward("detection", model=yolos, color_by="pixels")
    with pytest.raises(UserError, match=said):
        reward(make_samples({"objects": [{"class": "dog"}]}, target))


def test_what_is_not_a_detector_is_refused(clip_folder, yolos, tmp_path):
    with pytest.raises(UserError, match="is a CLIPModel, but should be a model of transformers for object detection"):
        load_reward("detection", model=clip_folder, color_by="pixels")
    with pytest.raises(UserError, match="could not be loaded by transformers"):
        load_reward("detection", model=str(tmp_path), color_by="pixels")
    with pytest.raises(UserError, match="color_by=pixels takes the names that CSS has"):
        load_reward("detection", model=yolos, color_by="pixels", colors=["red", "reddish"])
    with pytest.raises(UserError, match="did you mean 'strict'"):
        load_reward("detection", model=yolos, stric=True)
