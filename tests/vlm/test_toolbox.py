"""Tools of dialogues by themselves: nonsense, crops, marks, turns, schemas."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vlm_rows import call, picture

from mmrl.dialogue import CallError, Situation
from mmrl.errors import UserError
from mmrl.types import Prompt
from pipelines import VLMPolicy
from pipelines.tools import TOOLS, build_tools
from pipelines.tools.toolbox import Toolbox

ROOT = Path(__file__).parents[2]


def situation() -> Situation:
    return Situation(Prompt("a", "row 7"), [picture(100, 200, 0)], [(56, 112)])


BOX_TOOLS = ("crop_zoom", "draw_box")
NONSENSE = [
    "<tool_call>",
    "<tool_call></tool_call>",
    "<tool_call>crop(1, 2)</tool_call>",
    "<tool_call>[1, 2]</tool_call>",
    '<tool_call>{"name": 3}</tool_call>',
    '<tool_call>{"name": "crop_zoom", "arguments": 4}</tool_call>',
    "<tool_call>" + "[" * 100_000,
    '<tool_call>{"name": "crop_zoom", "arguments": {"bbox": [0, 0, 1, ' + "9" * 5000 + "]}}",
    call("crop"),
    call("crop_zoom"),
    call("crop_zoom", bbox=[1, 2, 3]),
    call("crop_zoom", bbox=["a", 2, 3, 4]),
    call("crop_zoom", bbox=[1, 2, float("nan"), 4]),
    call("crop_zoom", bbox=[1, 2, 3, 10**400]),
    call("crop_zoom", bbox=[9, 9, 9, 20]),
    call("crop_zoom", bbox=[30, 30, 10, 10]),
    call("crop_zoom", bbox=[500, 500, 600, 600]),
    call("crop_zoom", bbox=[0, 0, 112, 0.001]) + call("x"),
    call("crop_zoom", bbox=[1, 2, 30, 40], image=1),
    call("crop_zoom", bbox=[1, 2, 30, 40], colour="red"),
    call("rotate", angle=1e300),
    call("draw_point", point=[1, 1], colour="pale"),
]


def toolbox(**options) -> Toolbox:
    kinds = ("crop_zoom", "draw_box", "draw_line", "draw_point", "rotate")
    return Toolbox(build_tools([{"type": kind} for kind in kinds]), **options)


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_answered_with_an_error_or_ends_the_dialogue(text):
    answer = toolbox().step(text, situation())
    assert answer.errors >= 1
    assert "error: " in answer.text
    assert len(answer.text) < 600
    assert toolbox(bad_calls="end").step(text, situation()) is None


def test_random_strings_never_raise():
    rng = random.Random(0)
    box, desk = toolbox(), situation()
    values = [1, None, [1e308, 2, 3, 4], [[]] * 4, {"a": 1}, [-1, -1, 9, 9], "x", True, [0.1] * 2]
    for _ in range(2000):
        text = bytes(rng.randrange(256) for _ in range(rng.randrange(50))).decode("latin1")
        if rng.random() < 0.7:
            names = ("bbox", "angle", "start", "image", "end", "point")
            letters = list(call(rng.choice(list(box.tools)), **{rng.choice(names): rng.choice(values)}))
            if rng.random() < 0.5:
                letters[rng.randrange(len(letters))] = chr(rng.randrange(256))
            text = "".join(letters)
        answer = box.step(text, desk)
        assert answer is None or answer.errors or answer.images


def test_an_answer_without_a_call_ends_the_dialogue():
    assert toolbox().step("<answer>4</answer>", situation()) is None
    assert toolbox().step("", situation()) is None


@pytest.mark.parametrize(
    ("frame", "box"),
    [
        ("pixels", [28, 14, 84, 42]),
        ("original", [50, 25, 150, 75]),
        ("thousand", [250, 250, 750, 750]),
        ("unit", [0.25, 0.25, 0.75, 0.75]),
    ],
)
def test_crops_lie_where_the_frame_says(frame, box):
    (tool,) = build_tools([{"type": "crop_zoom", "frame": frame}])
    desk = situation()
    (crop,) = tool(desk, bbox=box).images
    assert crop.tobytes() == desk.pictures[0].crop((50, 25, 150, 75)).tobytes()


def test_boxes_are_cut_at_edges_grown_and_enlarged():
    desk = situation()
    (tool,) = build_tools([{"type": "crop_zoom", "frame": "original"}])
    assert tool(desk, bbox=[-50, -50, 1e6, 1e6]).images[0].size == (200, 100)
    assert (
        tool(desk, bbox=[198, 98, 199, 99]).images[0].tobytes() == desk.pictures[0].crop((172, 72, 200, 100)).tobytes()
    )
    (tool,) = build_tools([{"type": "crop_zoom", "frame": "original", "margin": 0.5, "enlarge_to": 120}])
    assert tool(desk, bbox=[60, 40, 80, 70]).images[0].size == (80, 120)
    (tool,) = build_tools([{"type": "crop_zoom", "frame": "original", "min_side": 1, "max_aspect": 5.0}])
    with pytest.raises(CallError, match="thin"):
        tool(desk, bbox=[0, 0, 100, 10])


def test_marks_are_drawn_on_copies_and_add_up():
    desk = Situation(Prompt("a", "r"), [Image.new("RGB", (100, 50))], [(50, 100)])
    before = desk.pictures[0].tobytes()
    box, line, dot = build_tools([{"type": kind} for kind in ("draw_box", "draw_line", "draw_point")])
    desk.pictures += box(desk, bbox=[10, 10, 40, 40], label="äx").images
    desk.sizes.append((50, 100))
    pixels = np.asarray(desk.pictures[1])
    assert (pixels[10, 10:40] == (255, 0, 0)).all()
    assert (pixels[10:40, 39] == (255, 0, 0)).all()
    assert (pixels[:10] == 0).all()
    desk.pictures += line(desk, start=[50, 25], end=[90, 25], colour="blue").images
    desk.sizes.append((50, 100))
    pixels = np.asarray(dot(desk, point=[70, 45]).images[0])
    assert (pixels[25, 50:90] == (0, 0, 255)).all()
    assert (pixels[45, 70] == (255, 0, 0)).all()
    assert (pixels[10, 10:40] == (255, 0, 0)).all()
    assert desk.pictures[0].tobytes() == before


def test_right_angles_are_exact():
    (tool,) = build_tools([{"type": "rotate"}])
    desk = situation()
    turned = tool(desk, angle=90.0).images[0]
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(desk.pictures[0]), -1))
    assert tool(desk, angle=45.0).images[0].size == (214, 214)


def test_schemas_say_what_a_tool_takes():
    crop = toolbox().schemas()[0]["function"]
    assert crop["name"] == "crop_zoom"
    assert "pixels" in crop["description"]
    assert crop["parameters"]["required"] == ["bbox"]
    assert set(crop["parameters"]["properties"]) == {"bbox", "image"}
    assert "title" not in json.dumps(crop)


def test_a_config_names_tools_that_there_are():
    with pytest.raises(UserError, match=r"pipeline.tools\[0\].type.*did you mean 'crop_zoom'"):
        VLMPolicy.validate(tools=[{"type": "crop_zom"}])
    with pytest.raises(UserError, match="unknown key 'frames'"):
        VLMPolicy.validate(tools=[{"type": "crop_zoom", "frames": "unit"}])
    with pytest.raises(UserError, match="two tools called 'rotate'"):
        VLMPolicy.validate(tools=[{"type": "rotate"}, {"type": "rotate"}])
    with pytest.raises(UserError, match="leave one out"):
        VLMPolicy.validate(tools=[{"type": "rotate"}], environment=toolbox())


def test_the_tool_of_the_page_works(tmp_path):
    page = (ROOT / "docs" / "dialogues.md").read_text(encoding="utf-8")
    path = tmp_path / "my_tools.py"
    path.write_text(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1])
    box = Toolbox(build_tools([{"type": f"{path}:Ruler", "digits": 2}]))
    assert box.step(call("ruler", start=[0, 0], end=[3, 4]), situation()).text == "5.00"
    assert box.step(call("ruler", start=[1, 1], end=[1, 1]), situation()).text == "error: the points are the same"
    assert box.step(call("ruler", start=[1]), situation()).errors == 1
    for name in TOOLS:
        assert f"| `{name}` |" in page
