"""Rewards of boxes, points and paths against other libraries, known numbers and bad rows."""

import itertools
import math

import numpy as np
import pytest
import torch

from mmrl.errors import UserError
from mmrl.types import Prompt, Samples
from rewards import load_reward
from rewards.geometry import degenerate, dtw, frechet, giou, hausdorff, iou, match, mean_distance, rms_distance


def one(text, target, **fields):
    """A sample as rewards get it."""
    sizes = fields.pop("sizes", None)
    prompt = Prompt("where?", id="rows.jsonl:7", target=target, **fields)
    return Samples([prompt], texts=[text], sizes=None if sizes is None else [sizes])


def score(name, text, target, *, fields=None, **options):
    (found,) = load_reward(name, **options)(one(text, target, **(fields or {})))
    return found


def random_boxes(count, rng):
    corners = rng.uniform(0, 100, (count, 2, 2))
    return np.concatenate([corners.min(1), corners.max(1)], axis=1)


def test_overlaps_equal_those_of_torchvision():
    from torchvision.ops import box_iou, generalized_box_iou

    rng = np.random.default_rng(0)
    a, b = random_boxes(40, rng), random_boxes(40, rng)
    plain = box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    general = generalized_box_iou(torch.from_numpy(a), torch.from_numpy(b)).numpy()
    for i, j in itertools.product(range(40), range(40)):
        assert iou(a[i], b[j]) == pytest.approx(plain[i, j], abs=1e-12)
        assert giou(a[i], b[j]) == pytest.approx(general[i, j], abs=1e-12)


def test_degenerate_boxes_overlap_nothing():
    good, flat, upside_down = (0.0, 0.0, 1.0, 1.0), (0.2, 0.2, 0.2, 0.8), (0.8, 0.8, 0.2, 0.2)
    assert degenerate(flat)
    assert degenerate(upside_down)
    for a, b in itertools.permutations([good, flat, upside_down], 2):
        assert iou(a, b) == 0
        assert giou(a, b) == -1
    assert iou(flat, flat) == 0
    huge = (-1e308, -1e308, 1e308, 1e308)
    assert iou(huge, good) == 0
    assert giou(huge, good) == -1


def test_matching_is_optimal():
    rng = np.random.default_rng(1)
    for _ in range(20):
        gains = rng.random((4, 3)) * (rng.random((4, 3)) > 0.3)
        best = max(sum(gains[r, c] for c, r in enumerate(rows)) for rows in itertools.permutations(range(4), 3))
        pairs = match(gains)
        assert sum(gains[pair] for pair in pairs) == pytest.approx(best)
        assert all(gains[pair] > 0 for pair in pairs)
    assert match(np.zeros((0, 3))) == []


def frechet_by_all_couplings(a, b):
    """The definition: the least over all monotone couplings of the longest leash."""

    def walk(i, j):
        leash = math.dist(a[i], b[j])
        if i == len(a) - 1 and j == len(b) - 1:
            return leash
        steps = [(i + 1, j), (i, j + 1), (i + 1, j + 1)]
        return max(leash, min(walk(*step) for step in steps if step[0] < len(a) and step[1] < len(b)))

    return walk(0, 0)


def test_distances_of_paths():
    rng = np.random.default_rng(2)
    for n, m in [(1, 1), (1, 4), (4, 1), (3, 4), (5, 5)]:
        a, b = rng.random((n, 2)), rng.random((m, 2))
        assert frechet(a, b) == pytest.approx(frechet_by_all_couplings(a.tolist(), b.tolist()))
        assert frechet(a, a) == mean_distance(a, a) == 0
    # A straight line stays one when a point is put on it, and its neighbour is as far off as it is.
    line, denser, moved = [(0, 0), (1, 0)], [(0, 0), (0.3, 0), (1, 0)], [(0, 0.2), (1, 0.2)]
    assert mean_distance(line, denser) == pytest.approx(0, abs=1e-12)
    assert mean_distance(line, moved) == frechet(line, moved) == pytest.approx(0.2)
    assert mean_distance([(0, 0)], [(3, 4)]) == pytest.approx(5)


TRUTH = [0.2, 0.2, 0.6, 0.6]


def test_iou_reward():
    assert score("iou", "<answer>[0.2, 0.2, 0.6, 0.6]</answer>", TRUTH, frame="unit") == 1
    assert score("iou", "[0.4, 0.2, 0.8, 0.6]", TRUTH, frame="unit") == pytest.approx(1 / 3)
    assert score("iou", "[0.4, 0.2, 0.8, 0.6]", TRUTH, frame="unit", power=2.0) == pytest.approx(1 / 9)
    assert score("iou", "[0.4, 0.2, 0.8, 0.6]", TRUTH, frame="unit", threshold=0.3) == 1
    assert score("iou", "[0.4, 0.2, 0.8, 0.6]", TRUTH, frame="unit", threshold=0.5) == 0
    assert score("iou", "[0.2, 0.2, 0.6, 0.6], [0, 0, 1, 1]", TRUTH, frame="unit") == 0
    assert score("iou", "there", TRUTH, frame="unit") == 0
    assert score("iou", "[0.6, 0.6, 0.2, 0.2]", TRUTH, frame="unit") == 0
    touching = score("iou", "[0.6, 0.2, 1.0, 0.6]", TRUTH, frame="unit", kind="giou")
    assert touching == pytest.approx(0.5)
    assert score("iou", "[0.6, 0.2, 0.6, 0.6]", TRUTH, frame="unit", kind="giou") == 0
    assert score("iou", "[0.2, 0.2, 0.6, 0.6]", TRUTH, frame="unit", strict=True) == 0


def test_every_pair_of_frames_agrees():
    """The same place, written in every frame, is the same box, whatever the truth is written in."""
    shown, original = (28, 56), (100, 200)  # height, width
    fields = {"sizes": [(9, 9), shown], "images": [torch.zeros(3, 9, 9), torch.zeros(3, *original)]}
    sizes = {"pixels": (56, 28), "original": (200, 100), "thousand": (1000, 1000), "unit": (1, 1)}
    for (frame, size), (target_frame, target_size) in itertools.product(sizes.items(), sizes.items()):
        box = [0.25 * size[0], 0.25 * size[1], 0.5 * size[0], 0.75 * size[1]]
        truth = [0.25 * target_size[0], 0.25 * target_size[1], 0.75 * target_size[0], 0.75 * target_size[1]]
        options = {"frame": frame, "target_frame": target_frame, "picture": 1}
        assert score("iou", str(box), truth, fields=fields, **options) == pytest.approx(0.5), (frame, target_frame)
        point = [0.3 * size[0], 0.7 * size[1]]
        assert score("point_in_box", str(point), truth, fields=fields, **options) == 1
        (marks,) = load_reward("iou", **options).marks(one(str(box), truth, **fields))
        assert [mark["label"] for mark in marks] == ["predicted", "true"]
        assert marks[0]["box"] == pytest.approx([0.25, 0.25, 0.5, 0.75])


def test_size_of_the_picture_in_the_data(tmp_path):
    from PIL import Image

    path = tmp_path / "lying.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(path, exif=exif)
    options = {"frame": "original"}
    assert score("iou", "[0, 0, 10, 40]", [0, 0, 20, 40], fields={"images": [str(path)]}, **options) == 0.5
    assert (
        score("iou", "[0, 0, 10, 40]", [0, 0, 20, 40], fields={"images": [Image.new("RGB", (20, 40))]}, **options)
        == 0.5
    )
    given = {"metadata": {"width": 20, "height": 40}}
    assert score("iou", "[0, 0, 10, 40]", [0, 0, 20, 40], fields=given, **options) == 0.5


OBJECTS = [{"bbox_2d": [0, 0, 0.5, 0.5], "label": "cat"}, {"bbox_2d": [0.5, 0.5, 1, 1], "label": "dog"}]


def test_matched_detection():
    def mark(text, target=OBJECTS, **options):
        return score("boxes", text, target, frame="unit", **options)

    both = '[{"bbox_2d": [0.5, 0.5, 1, 1], "label": "Dog"}, {"bbox_2d": [0, 0, 0.5, 0.5], "label": "cat"}]'
    assert mark(both) == 1
    # One of two: position 0.5, completeness 1 - (1/2 + 0) / 2.
    first = '[{"bbox_2d": [0, 0, 0.5, 0.5], "label": "cat"}]'
    assert mark(first) == pytest.approx(0.7 * 0.5 + 0.3 * 0.75)
    # A wrong label earns completeness only, unless labels do not count.
    wrong = both.replace("Dog", "fox")
    assert mark(wrong) == pytest.approx(0.7 * 0.5 + 0.3)
    assert mark(wrong, labels=False) == 1
    assert mark(wrong, position=0.0, label=1.0, completeness=0.0) == 0.5
    # Too little overlap is no match: iou 1/3.
    far = '[{"bbox_2d": [0.25, 0, 0.75, 0.5], "label": "cat"}, {"bbox_2d": [0.5, 0.5, 1, 1], "label": "dog"}]'
    assert mark(far) == pytest.approx(0.7 * 0.5 + 0.3 * 0.5)
    # Two on one: the second is a false alarm.
    twice = '[{"bbox_2d": [0, 0, 0.5, 0.5], "label": "cat"}, {"bbox_2d": [0, 0, 0.5, 0.5], "label": "cat"}]'
    assert mark(twice) == pytest.approx(0.7 * 0.5 + 0.3 * 0.5)
    assert mark("[]") == mark("nothing") == 0
    assert mark("[]", []) == mark("None", []) == 1
    assert mark("", []) == mark("what?", []) == mark(first, []) == 0
    with pytest.raises(UserError, match="are all 0"):
        load_reward("boxes", frame="unit", position=0.0, completeness=0.0)


def test_salience():
    truth = [{"bbox_2d": [0, 0, 0.5, 0.5], "weight": 3}, {"bbox_2d": [0.5, 0.5, 1, 1], "weight": 1}]

    def mark(text, **options):
        return score("salient_boxes", text, truth, frame="unit", **options)

    assert mark("[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1]]") == 1
    assert mark("[[0, 0, 0.5, 0.5]]") == 0.75
    assert mark("[[0.5, 0.5, 1, 1]]") == 0.25
    assert mark("[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]]") == pytest.approx(4 / 6)
    assert mark("[[0, 0, 0.5, 0.5], [0.5, 0.5, 1, 1], [0, 0.5, 0.5, 1]]", surplus=0.0) == 1
    assert mark("") == 0


def test_points():
    boxes = [[0, 0, 0.2, 0.2], [0.8, 0.8, 1, 1]]
    assert score("point_in_box", "(0.1, 0.1)", boxes[0], frame="unit") == 1
    assert score("point_in_box", "(0.2, 0.2)", boxes[0], frame="unit") == 1
    assert score("point_in_box", "[[0.1, 0.1], [0.5, 0.5], [0.9, 0.9], [0.9, 0.1]]", boxes, frame="unit") == 0.5
    assert score("point_in_box", "here", boxes, frame="unit") == 0
    near = score("point_distance", "[0.5, 0.6]", [0.5, 0.5], frame="unit", reach=0.1)
    assert near == pytest.approx(math.exp(-1))
    options = {"frame": "unit", "reach": 0.2, "falloff": "linear"}
    assert score("point_distance", "[0.5, 0.6]", [0.5, 0.5], **options) == pytest.approx(0.5)
    assert score("point_distance", "[[0.9, 0.9], [0.1, 0.1]]", [[0.1, 0.1], [0.9, 0.9]], **options) == 1
    assert score("point_distance", "[[0.1, 0.1], [0.5, 0.5]]", [0.1, 0.1], **options) == 0.5
    assert score("point_distance", "[1e300, 1e300]", [0.1, 0.1], frame="unit") == 0
    assert score("point_distance", "[0.5, 0.6]", [0.5, 0.5], frame="unit", falloff="within") == 1


def test_regions_of_any_form(tmp_path):
    from PIL import Image

    notched = [[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.5], [0.0, 1.0]]
    for point, inside in (("(0.1, 0.5)", 1), ("(0.5, 0.7)", 0), ("(0.5, 0.4)", 1), ("(1.2, 0.5)", 0)):
        assert score("point_in_region", point, notched, frame="unit") == inside
    far = [[0.0, 0.9], [0.0, 1.0], [0.1, 1.0]]
    both = [[[0.8, 0.0], [1.0, 0.0], [1.0, 0.2]], far]
    assert score("point_in_region", "[[0.95, 0.1], [0.02, 0.95], [0.5, 0.5], [0.5, 0.6]]", both, frame="unit") == 0.5
    assert score("point_in_region", "nowhere", both, frame="unit") == 0
    # A square of half the side in the corner, as a mask: 0.1 beside its edge, and diagonally off its corner.
    mask = np.zeros((8, 4), np.uint8)
    mask[:4, :2] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    options = {"frame": "thousand", "reach": 0.2}
    for truth in (mask, Image.fromarray(mask), str(tmp_path / "mask.png"), {"path": str(tmp_path / "mask.png")}):
        assert score("point_in_region", "[499, 0]", truth, **options) == 1
        assert score("point_in_region", "[600, 250]", truth, **options) == pytest.approx(0.5)
        assert score("point_in_region", "[560, 580]", truth, **options) == pytest.approx(0.5)
        assert score("point_in_region", "[900, 0]", truth, **options) == 0
    square = [[0, 0], [500, 0], [500, 500], [0, 500]]
    assert score("point_in_region", "[560, 580]", square, **options) == pytest.approx(0.5)
    for truth, words in (
        ([[0, 0], [1, 1]], "at least three points"),
        ("nothing.png", "a mask that cannot be read: there is no picture"),
        (np.zeros((4, 4), np.uint8), "a mask without a bright pixel"),
        (0.5, "a polygon of at least three points"),
    ):
        with pytest.raises(UserError, match=words):
            score("point_in_region", "(0, 0)", truth, frame="unit")


def test_measures_of_paths():
    a, b = [(0, 0), (1, 0), (2, 0)], [(0, 1), (2, 1), (2, 3)]
    assert hausdorff(a, b) == hausdorff(b, a) == 3
    assert hausdorff(a, a[::-1]) == 0
    # Point by point: 1, the root of 2, and 3.
    assert dtw(a, b) == pytest.approx((1 + math.sqrt(2) + 3) / 3)
    assert dtw(a, [(0, 0), (0, 0), (1, 0), (2, 0), (2, 0)]) == 0
    assert rms_distance([(0, 0), (1, 0)], [(0, 0), (1, 1)]) >= mean_distance([(0, 0), (1, 0)], [(0, 0), (1, 1)])
    assert rms_distance(a, [(x, y + 2) for x, y in a]) == pytest.approx(2)


def test_coordinates_of_a_picture_in_every_form(tmp_path):
    """Pixels of the picture as it is in the data, however the data has it."""
    from PIL import Image

    picture = Image.new("RGB", (200, 100))
    path = tmp_path / "a.png"
    picture.save(path)
    forms = [str(path), f"file://{path}", picture, np.asarray(picture), torch.zeros(3, 100, 200)]
    for form in [*forms, {"bytes": path.read_bytes()}, {"path": str(path)}]:
        fields = {"images": [form]}
        assert (
            score(
                "iou", "[20, 10, 100, 50]", [0.1, 0.1, 0.5, 0.5], fields=fields, frame="original", target_frame="unit"
            )
            == 1
        )


def test_trajectory():
    truth = [[0, 0], [500, 0], [1000, 0]]
    options = {"frame": "thousand", "reach": 0.2}
    assert score("trajectory", "[[0, 0], [500, 0], [1000, 0]]", truth, **options) == 1
    assert score("trajectory", "[[0, 100], [500, 100], [1000, 100]]", truth, **options) == pytest.approx(math.exp(-0.5))
    assert score("trajectory", "[[0, 0], [1000, 0]]", truth, measure="mean", **options) == pytest.approx(1)
    assert score("trajectory", "[[1000, 0], [500, 0], [0, 0]]", truth, **options) == pytest.approx(math.exp(-5))
    assert score("trajectory", str([[0, 0]] * 600), truth, **options) == 0
    for measure in ("rmse", "hausdorff", "dtw"):
        moved = "[[0, 100], [500, 100], [1000, 100]]"
        assert score("trajectory", moved, truth, measure=measure, **options) == pytest.approx(math.exp(-0.5))


def test_intervals_of_time():
    assert score("temporal_iou", "from 2 to 6 s", [4, 8]) == pytest.approx(1 / 3)
    assert score("temporal_iou", "6 to 2", [4, 8]) == 0
    assert score("temporal_iou", "00:02 - 00:06", [4, 8], threshold=0.3) == 1


def test_counting():
    assert score("counting", "<answer>3</answer>", 3) == 1
    assert score("counting", "four, no: three", "3") == 1
    assert score("counting", "2", 3) == 0
    assert score("counting", "2", 4, graded=True) == 0.5
    assert score("counting", "9", 0, graded=True) == 0
    assert score("counting", "[[0, 0, 1, 1], [0, 0, 2, 2]]", 2, of="boxes") == 1
    assert score("counting", "[[0, 0], [1, 1], [2, 2]]", 2, of="points", graded=True) == 0.5


@pytest.mark.parametrize(
    ("name", "target", "message"),
    [
        ("iou", None, "has no ground truth in 'target'"),
        ("iou", "left", "has the ground truth 'left', but it should be a box"),
        ("iou", [1, 2, 3], "but it should be a box"),
        ("iou", [0.5, 0.5, 0.2, 0.8], "whose right is beyond its left"),
        ("iou", [10, 10, 60, 60], "which does not lie in the picture: 1 wide and 1 high in the frame 'unit'"),
        ("iou", [0, 0, float("nan"), 1], "but it should be a box"),
        ("boxes", 3, "but it should be a list of boxes"),
        ("boxes", [{"label": "cat"}], "but it should be a box"),
        ("salient_boxes", [], "a list of at least one box"),
        ("salient_boxes", [{"bbox": [0, 0, 1, 1], "weight": -1}], "but they should be positive"),
        ("point_in_box", [[0, 0, 2, 1]], "does not lie in the picture"),
        ("point_distance", [0, 0, 0], "but it should be a point"),
        ("trajectory", [0.1, 0.1], "a list of at least two points"),
    ],
)
def test_bad_ground_truth_names_the_row(name, target, message):
    with pytest.raises(UserError) as caught:
        score(name, "[0, 0, 1, 1]", target, frame="unit")
    assert message in str(caught.value)
    assert "rows.jsonl:7" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_bad_rows():
    with pytest.raises(UserError, match=r"\[start, end\] in seconds"):
        score("temporal_iou", "1 to 2", [3, 1])
    with pytest.raises(UserError, match="a whole number of things"):
        score("counting", "1", 2.5)
    with pytest.raises(UserError, match="has no sizes of pictures"):
        score("iou", "[0, 0, 1, 1]", TRUTH, frame="pixels", target_frame="unit")
    with pytest.raises(UserError, match="has 0 pictures"):
        score("iou", "[0, 0, 1, 1]", TRUTH, frame="original", target_frame="unit")
    with pytest.raises(UserError, match="has no ground truth in column 'box'"):
        score("iou", "[0, 0, 1, 1]", TRUTH, frame="unit", column="box")
    with pytest.raises(UserError, match="'frame' is missing"):
        load_reward("iou")
    with pytest.raises(UserError, match="scores texts, but the samples have none"):
        load_reward("iou", frame="unit")(Samples([Prompt()], images=torch.zeros(1, 3, 4, 4)))


def test_truth_from_a_column_and_as_json_text():
    fields = {"metadata": {"box": "[0.2, 0.2, 0.6, 0.6]"}}
    assert score("iou", "[0.2, 0.2, 0.6, 0.6]", None, fields=fields, frame="unit", column="box") == 1
    assert score("iou", "[0.2, 0.2, 0.6, 0.6]", torch.tensor(TRUTH), frame="unit") == pytest.approx(1)
