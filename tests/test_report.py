import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
import torch

from mmrl.errors import UserError
from mmrl.media import save_audios, save_images, save_videos
from mmrl.metrics import MetricsWriter
from mmrl.report import write_report
from mmrl.report.charts import Line, line_chart, number, smooth, stacked_chart
from mmrl.report.run import load_run
from mmrl.report.verdict import judge, paired_change

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks that tags nest, and collects what tests ask about."""

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags, self.links, self.words = [], [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(attributes)
        self.links += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open and data.strip():
            self.words.append(data.strip())


def write_evaluation(folder, step, totals, prompts=None, side=8):
    """Two seeds per prompt; ``totals`` in that order."""
    rows = []
    for index, total in enumerate(totals):
        prompt, seed = divmod(index, 2)
        text = prompts[prompt] if prompts else f"prompt {prompt}"
        scores = {"shapes": total, "jpeg": 0.5}
        row = {"file": f"{prompt:03d}-{seed}.png", "prompt": text, "prompt_id": f"p{prompt}", "seed": seed}
        rows.append({**row, "scores": scores, "total": total})
    target = folder / "eval" / f"step-{step:06d}"
    images = torch.rand(len(totals), 3, side, side, generator=torch.Generator().manual_seed(step))
    save_images(images, target, [row["file"].removesuffix(".png") for row in rows])
    (target / "scores.json").write_text(json.dumps(rows))


def make_run(folder, before, after, train=(0.3, 0.8), diversity=(0.4, 0.38), steps=40, extra=None):
    """A run whose evaluation totals go from ``before`` to ``after`` (lists), with training reward along a line."""
    writer = MetricsWriter(folder)

    def evaluate(step, totals, spread):
        mean = sum(totals) / len(totals)
        values = {"eval/reward": mean, "eval/shapes/mean": mean, "eval/diversity/mean": spread, "time/eval": 9.0}
        writer.write(step, {"stage": "train", **values})
        write_evaluation(folder, step, totals)

    evaluate(0, before, diversity[0])
    for step in range(1, steps + 1):
        reward = train[0] + (train[1] - train[0]) * step / steps
        values = {"reward/mean": reward, "reward/std": 0.2, "ratio/max_abs_dev": 0.0, "ratio/clip_fraction": 0.1}
        values |= {"kl": 0.01, "grad_norm": 0.5, "lr": 1e-4, "loss": 0.0, "time/rollout": 1.0, "time/reward": 0.1}
        values |= {"reward/shapes/mean": reward, "reward/jpeg/mean": 0.5, "reward/jpeg/std": 0.1}
        writer.write(step, {"stage": "train", **values, "time/update": 2.0, "time/step": 3.2, **(extra or {})})
        if step == steps // 2:
            evaluate(step, [(a + b) / 2 for a, b in zip(before, after, strict=True)], sum(diversity) / 2)
    evaluate(steps, after, diversity[1])
    writer.close()
    return folder


LOW = [0.2, 0.3, 0.1, 0.2, 0.4, 0.3, 0.2, 0.2, 0.1, 0.3]
HIGH = [value + 0.4 + 0.01 * (index % 3) for index, value in enumerate(LOW)]


def test_the_page_is_whole_self_contained_and_small(tmp_path):
    run = make_run(tmp_path / "my run", LOW, HIGH)
    (run / "config.yaml").write_text("algorithm: {type: grpo}\nseed: 3\n")
    summary = {"eval": {}, "steps": 40, "seconds": 131.0, "checkpoint": "runs/x/checkpoints/step-000040"}
    (run / "summary.json").write_text(json.dumps(summary))
    path = write_report(run)
    assert path == run / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(text) < 400_000
    assert all(link.startswith("data:image/") for link in page.links)
    assert "http" not in text
    assert "script" not in page.tags
    assert all(image["alt"] for image in page.images)
    # five pairs of prompts and seeds, a strip of three evaluations for four prompts, five best and five worst
    assert len(page.images) == 2 * 10 + 3 * 4 + 5 + 5
    for words in ("Improved", "my run", "step-000040", "2 min 11 s", "KL", "Clip fraction", "Gradient norm"):
        assert words in page.text
    for words in (
        "Before and after",
        "Through training",
        "Best samples",
        "Worst samples",
        "type: grpo",
        "Reward: jpeg",
    ):
        assert words in page.text
    # the single score equals the total, so it has no curve of its own
    assert "Reward: shapes" not in page.text
    assert not list(run.glob("*.tmp"))


def test_every_chart_is_valid_xml(tmp_path):
    text = write_report(make_run(tmp_path / "run", LOW, HIGH)).read_text()
    charts = ["<svg" + part.split("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
    assert len(charts) == 11
    for chart in charts:
        root = ET.fromstring(chart)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "nan" not in chart


def test_a_rise_is_told_with_its_margin(tmp_path):
    run = load_run(make_run(tmp_path / "run", LOW, HIGH))
    verdict = judge(run)
    assert (verdict.level, verdict.label) == ("good", "Improved")
    assert "from 0.23 to 0.639 (+0.409) in 40 steps" in verdict.headline
    paired = paired_change(run.evaluations[0], run.evaluations[-1])
    # by hand: per-prompt changes are the means of pairs of 0.40, 0.41, 0.42 repeating
    means = [0.405, 0.41, 0.415, 0.405, 0.41]
    average = sum(means) / 5
    deviation = math.sqrt(sum((m - average) ** 2 for m in means) / 4)
    assert paired.change == pytest.approx(average)
    assert paired.margin == pytest.approx(1.96 * deviation / math.sqrt(5))
    assert (paired.better, paired.worse, paired.count) == (10, 0, 10)


def test_noise_is_not_called_a_rise(tmp_path):
    after = [value + (0.3 if index % 4 < 2 else -0.25) for index, value in enumerate(LOW)]
    verdict = judge(load_run(make_run(tmp_path / "run", LOW, after, train=(0.3, 0.3))))
    assert verdict.label == "No clear change"
    assert any("trainer.lr" in text for text in verdict.advice)


def test_training_up_and_held_out_down_is_called_hacking(tmp_path):
    verdict = judge(load_run(make_run(tmp_path / "run", HIGH, LOW)))
    assert (verdict.level, verdict.label) == ("bad", "Reward hacking suspected")
    assert "fell" in verdict.headline
    assert any("reward hacking" in finding.text for finding in verdict.findings)


def test_a_fall_without_training_gain_is_just_worse(tmp_path):
    verdict = judge(load_run(make_run(tmp_path / "run", HIGH, LOW, train=(0.5, 0.4))))
    assert (verdict.level, verdict.label) == ("bad", "Got worse")


def test_lost_diversity_is_a_warning(tmp_path):
    verdict = judge(load_run(make_run(tmp_path / "run", LOW, HIGH, diversity=(0.4, 0.2))))
    assert (verdict.level, verdict.label) == ("warn", "Improved, with a warning")
    assert any("Diversity fell to 50%" in finding.text for finding in verdict.findings)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"ratio/max_abs_dev": 0.3}, "do not reproduce"),
        ({"ratio/clip_fraction": 0.8}, "80% of the decisions are clipped"),
        ({"grad_norm": math.nan}, "grad_norm was not finite in 40 steps (first at step 1)"),
        ({"reward/std": 0.0}, "almost no spread"),
    ],
)
def test_unhealthy_optimisation_is_named(tmp_path, extra, words):
    verdict = judge(load_run(make_run(tmp_path / "run", LOW, HIGH, extra=extra)))
    assert any(words in finding.text for finding in verdict.findings)
    assert verdict.level == "warn"


def test_a_peak_before_the_end_is_pointed_out(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, score in ((0, 0.2), (10, 0.6), (20, 0.8), (30, 0.5)):
        writer.write(step, {"eval/reward": score})
    writer.close()
    verdict = judge(load_run(tmp_path))
    assert any("step 20 (0.8)" in f.text and "50% of the gain" in f.text for f in verdict.findings)
    assert any("checkpoint nearest to step 20" in text for text in verdict.advice)


def test_one_line_of_metrics_gives_a_page(tmp_path):
    MetricsWriter(tmp_path).write(1, {"reward/mean": 0.5, "loss": math.nan, "time/step": 2.0, "time/rollout": 1.0})
    page = Page(write_report(tmp_path).read_text())
    assert "no held-out evaluation" in page.text
    assert "trainer.eval_every" in page.text


def test_only_an_evaluation_gives_a_page(tmp_path):
    MetricsWriter(tmp_path).write(0, {"eval/shapes/mean": 0.25, "eval/shapes/std": 0.1})
    write_evaluation(tmp_path, 0, [0.5, None])
    page = Page(write_report(tmp_path).read_text())
    assert "One evaluation so far: the held-out score was 0.25 at step 0." in page.text


def test_all_null_metrics_give_a_page(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 30):
        writer.write(step, {"reward/mean": math.nan, "grad_norm": math.nan, "eval/reward": math.nan})
    assert "Not judged yet" in Page(write_report(tmp_path).read_text()).text


def test_a_supervised_run_and_unknown_metrics_give_a_page(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 30):
        writer.write(step, {"loss": 1 / step, "time/step": 1.0, "custom/thing": step * 1.0})
    page = Page(write_report(tmp_path).read_text())
    assert "Loss" in page.text
    assert "custom/thing" in page.text
    assert "Training reward" not in page.text


def test_stages_are_marked(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 41):
        values = {"loss": 1.0} if step <= 15 else {"loss": 0.5, "reward/mean": 0.1}
        writer.write(step, {"stage": "warm <up>" if step <= 15 else "grpo", **values})
    assert load_run(tmp_path).stages == [("warm <up>", 1), ("grpo", 16)]
    text = write_report(tmp_path).read_text()
    Page(text)
    assert "warm &lt;up&gt;" in text
    assert text.count('class="stage" d=') == 2


def test_text_from_the_run_is_escaped(tmp_path):
    run = tmp_path / "<b>run"
    nasty = ["<script>alert(1)</script>", '" onerror="x', "a & b", "é", "$title"]
    make_run(run, LOW, HIGH)
    for step in (0, 20, 40):
        write_evaluation(run, step, LOW, prompts=nasty)
    (run / "config.yaml").write_text("seed: '<script>'\nname: $body\n")
    page = Page(write_report(run).read_text())
    assert "script" not in page.tags
    assert not any("onerror" in image for image in page.images)
    assert any(image["alt"].startswith('" onerror="x, before') for image in page.images)


def test_pictures_outside_the_run_are_not_embedded(tmp_path):
    run = make_run(tmp_path / "run", LOW, HIGH)
    save_images(torch.zeros(1, 3, 4, 4), tmp_path, ["secret"])
    place = run / "eval" / "step-000040" / "scores.json"
    rows = json.loads(place.read_text())
    for row in rows:
        row["file"] = "../../../secret.png"
    place.write_text(json.dumps(rows))
    assert {sample.file for sample in load_run(run).evaluations[-1].samples} == {None}
    assert "no picture" in write_report(run).read_text()


def test_large_photographs_stay_below_three_megabytes(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (0, 1, 2):
        writer.write(step, {"eval/reward": 0.1 * step})
        write_evaluation(tmp_path, step, [0.1] * 26, side=384)
    size = write_report(tmp_path).stat().st_size
    assert 100_000 < size < 3_000_000


MOVING = re.compile(
    r'<img src="data:image/gif;base64,|<video autoplay loop muted playsinline src="data:video/mp4;base64,'
)


@pytest.mark.parametrize("with_av", [True, False])
def test_clips_are_embedded_moving(tmp_path, monkeypatch, with_av):
    if with_av:
        pytest.importorskip("av")
    else:
        monkeypatch.setitem(sys.modules, "av", None)
    MetricsWriter(tmp_path).write(0, {"eval/reward": 0.1})
    folder = tmp_path / "eval" / "step-000000"
    clips = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    files = [path.name for path in save_videos(clips, folder, ["a", "b"])]
    rows = [{"file": file, "prompt": "p", "seed": 0, "scores": {}, "total": 0.5} for file in files]
    (folder / "scores.json").write_text(json.dumps(rows))
    page = write_report(tmp_path).read_text()
    assert len(MOVING.findall(page)) == 2
    assert page.count("data:video/mp4") == (2 if with_av else 0)


def test_sounds_can_be_played(tmp_path):
    MetricsWriter(tmp_path).write(0, {"eval/reward": 0.1})
    folder = tmp_path / "eval" / "step-000000"
    files = [path.name for path in save_audios(torch.zeros(2, 1, 800), None, folder, ["a", "b"])]
    rows = [{"file": file, "prompt": "p", "seed": 0, "scores": {}, "total": 0.5} for file in files]
    (folder / "scores.json").write_text(json.dumps(rows))
    assert write_report(tmp_path).read_text().count('<audio controls src="data:audio/wav;base64,') == 2


def test_a_share_of_successes_has_a_band_and_only_filmed_episodes_are_shown(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step, share, low, high in ((0, 0.25, 0.12, 0.44), (40, 0.75, 0.56, 0.88)):
        ends = {"low": low, "high": high, "count": 28}
        scores = {f"eval/{name}/{end}": value for name in ("reward", "success") for end, value in ends.items()}
        writer.write(step, {"eval/reward": share, "eval/success/mean": share, **scores})
        folder = tmp_path / "eval" / f"step-{step:06d}"
        clips = torch.rand(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        files = [path.name for path in save_videos(clips, folder, ["0", "1"])]
        rows = [{"prompt": f"p{k}", "seed": 0, "scores": {}, "total": float(k < 28 * share)} for k in range(28)]
        for k in range(2):
            rows[k]["file"] = files[k]
        (folder / "scores.json").write_text(json.dumps(rows))
    page = write_report(tmp_path).read_text()
    assert "no picture" not in page
    # Two pairs, and the better and the worse of the two that are filmed.
    assert len(MOVING.findall(page)) == 6
    assert "95%: 0.56 to 0.88" in page
    (band,) = re.findall(r'class="band k0" d="M([^"]*)Z"', page)
    heights = [float(pair.split()[1]) for pair in band.split("L")]
    lines = re.findall(r'class="line k0" d="M([^"]*)"', page)[0]
    middle = [float(pair.split()[1]) for pair in lines.replace("h0", "").split("L")]
    # Pixels grow downwards: high ends, then the low ones from right to left.
    assert heights[0] < middle[0] < heights[3]
    assert heights[1] < middle[1] < heights[2]


def test_broken_runs_are_user_errors(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no complete line"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run", LOW, HIGH)
    picture = run / "eval" / "step-000040" / "000-0.png"
    picture.write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"000-0\.png is not a readable picture"):
        write_report(run)
    (picture.parent / "scores.json").write_text("{")
    with pytest.raises(UserError, match=r"scores\.json is not valid JSON"):
        write_report(run)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.25, "0.25"),
        (1234.6, "1,235"),
        (3e-5, "3e-5"),
        (-0.0123456, "-0.0123"),
        (2.5e8, "2.50e8"),
        (None, "n/a"),
    ],
)
def test_numbers_read_well(value, text):
    assert number(value) == text


def test_curves_break_at_gaps_and_keep_spikes():
    points = [(step, float(step)) for step in range(1, 7)]
    points[2] = (3, None)
    root = ET.fromstring(line_chart([Line(points)], "x", (1, 6)))
    path = next(e.get("d") for e in root if e.get("class") == "line k0")
    assert path.count("M") == 2
    assert [value for _, value in smooth([(i, None if i == 9 else 2.0) for i in range(30)])].count(None) == 1
    # one spike among 5000 points must still reach the top of the axis
    flat = [(step, 100.0 if step == 1234 else 1.0) for step in range(5000)]
    chart = ET.fromstring(line_chart([Line(flat, faint=True)], "x", (0, 5000)))
    drawn = next(e.get("d") for e in chart if e.get("class") == "faint k0")
    heights = [float(pair.split("h")[0].split()[1]) for pair in drawn.replace("M", "L").split("L")[1:]]
    assert min(heights) < 30
    assert len(heights) < 700


def test_stacked_areas_add_up():
    chart = stacked_chart([Line([(1, 1.0), (2, 1.0)]), Line([(1, 3.0), (2, 3.0)], colour=1)], "x", (1, 2))
    root = ET.fromstring(chart)
    areas = [e.get("d")[1:-1].split("L") for e in root if e.get("class").startswith("area")]
    tops = [float(area[0].split()[1]) for area in areas]
    base = float(areas[0][-1].split()[1])
    assert (base - tops[1]) / (base - tops[0]) == pytest.approx(4.0, abs=0.02)


def test_written_answers_show_with_their_picture_and_marks(tmp_path):
    run = make_run(tmp_path / "run", [0.1, 0.2], [0.8, 0.9])
    for step, text in ((0, "no idea"), (40, "<answer>[1, 2]</answer>")):
        folder = run / "eval" / f"step-{step:06d}"
        rows = json.loads((folder / "scores.json").read_text())
        for row in rows:
            row["picture"] = row.pop("file")
            row["text"] = text
            row["marks"] = [
                {"label": "predicted", "box": [0.75, 0.5, 0.25, 2.0]},
                {"label": "true", "point": [0.5, 0.5]},
                {"label": "predicted", "box": [float("nan"), 0, 1, 1]},
                {"label": "predicted", "box": "everywhere"},
            ]
        (folder / "scores.json").write_text(json.dumps(rows))
    text = write_report(run).read_text()
    page = Page(text)
    assert "<answer>[1, 2]</answer>" in page.text
    assert "no idea" in page.text
    # A box from right to left is turned round, one that reaches beyond the picture ends at its edge.
    assert '<rect class="predicted" x="25.0" y="50.0" width="50.0" height="50.0"/>' in text
    assert '<circle class="true" cx="50.0" cy="50.0" r="2.5"/>' in text
    assert "nan" not in text.split("</style>")[1]
    assert "everywhere" not in page.text
