"""Prompts from every kind of source, the messages for broken ones, and which prompts a step takes."""

import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from mmrl.data import PromptSampler, load_prompts
from mmrl.errors import UserError
from mmrl.types import Prompt


def picture(path: Path, color: str = "red") -> Path:
    Image.new("RGB", (4, 4), color).save(path)
    return path


def refused(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_text_lines(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes("\ufeffa cat\r\n\r\n  a dog\n".encode())
    prompts = load_prompts(path)
    assert [(p.text, p.id) for p in prompts] == [("a cat", "p.txt:1"), ("a dog", "p.txt:3")]


def test_json_lines_fill_the_fields_of_a_prompt(tmp_path):
    picture(tmp_path / "a.png")
    rows = [
        {"text": "one", "target": {"n": 1}, "task": "count", "id": 7, "source": "web", "image": "a.png"},
        {"prompt": "two", "images": ["a.png", "a.png"], "inputs": {"image": "a.png", "strength": 0.5}},
    ]
    path = tmp_path / "p.jsonl"
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    one, two = load_prompts(path)
    assert (one.text, one.id, one.target, one.task, one.metadata) == ("one", "7", {"n": 1}, "count", {"source": "web"})
    assert one.images == [str(tmp_path / "a.png")]
    assert (two.text, two.id, len(two.images), two.metadata) == ("two", "p.jsonl:3", 2, {})
    assert two.inputs["strength"] == 0.5
    assert two.inputs["image"].getpixel((0, 0)) == (255, 0, 0)


def test_json_csv_and_lists_read_alike(tmp_path):
    (tmp_path / "p.json").write_text('["a", {"text": "b", "level": "3"}]')
    (tmp_path / "p.csv").write_text('text,level\n"a, or\nb",2\nb,3\n')
    from_json, from_csv = load_prompts(tmp_path / "p.json"), load_prompts(tmp_path / "p.csv")
    from_list = load_prompts(["a", {"text": "b", "level": "3"}, Prompt("c", id="mine")])
    assert [p.id for p in from_json] == ["p.json[0]", "p.json[1]"]
    assert [p.text for p in from_csv] == ["a, or\nb", "b"]
    assert from_json[1].metadata == from_csv[1].metadata == from_list[1].metadata == {"level": "3"}
    assert [p.id for p in from_list] == ["data.prompts[0]", "data.prompts[1]", "mine"]


def test_columns_and_limit(tmp_path):
    rows = [{"caption": "x", "answer": k, "text": "other"} for k in range(5)]
    prompts = load_prompts(rows, columns={"text": "caption", "target": "answer"}, limit=3)
    assert [(p.text, p.target) for p in prompts] == [("x", 0), ("x", 1), ("x", 2)]
    assert prompts[0].metadata == {"text": "other"}
    assert "data.columns.target is 'anser', which the row lacks (did you mean 'answer'?)" in refused(
        rows, columns={"target": "anser"}
    )


def test_folder_of_pictures_with_captions(tmp_path):
    for name in ("b", "a"):
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"picture {name}\n")
    prompts = load_prompts(tmp_path)
    assert [(p.text, p.id) for p in prompts] == [("picture a", "a.png"), ("picture b", "b.png")]
    assert prompts[0].target == str(tmp_path / "a.png")
    (tmp_path / "b.txt").unlink()
    assert "b.png' has no caption" in refused(tmp_path)


def test_folder_with_a_listing(tmp_path):
    picture(tmp_path / "a.png")
    listing = tmp_path / "metadata.jsonl"
    listing.write_text('{"file_name": "a.png", "text": "one", "extra": 1}\n')
    (prompt,) = load_prompts(tmp_path)
    assert (prompt.text, prompt.target, prompt.metadata) == ("one", str(tmp_path / "a.png"), {"extra": 1})
    listing.write_text('{"file_name": "b.png", "text": "one"}\n')
    assert refused(tmp_path) == f"metadata.jsonl:1: there is no picture '{tmp_path / 'b.png'}'"


def test_saved_data_sets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "a", "level": 1}, {"prompt": "b", "level": 2}]
    data = datasets.Dataset.from_list(rows)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(tmp_path / "both")
    assert [(p.text, p.metadata["level"]) for p in load_prompts(tmp_path / "one")] == [("a", 1), ("b", 2)]
    assert [(p.text, p.id) for p in load_prompts(tmp_path / "both", split="test")] == [("b", "both[0]")]
    assert "has no split 'tset' (did you mean 'test'?)" in refused(tmp_path / "both", split="tset")


def test_functions(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from mmrl import Prompt\n"
        "def rows(n=2):\n    return (Prompt(f'p{k}') if k % 2 else {'text': f'p{k}'} for k in range(n))\n"
        "def one():\n    return 'a cat'\n"
    )
    prompts = load_prompts(f"{tmp_path}/mine.py:rows", options={"n": 3})
    assert [(p.text, p.id) for p in prompts] == [("p0", "rows[0]"), ("p1", "rows[1]"), ("p2", "rows[2]")]
    assert "'one' returned 'a cat'" in refused(f"{tmp_path}/mine.py:one")
    assert "has nothing called 'rwos' (did you mean 'rows'?)" in refused(f"{tmp_path}/mine.py:rwos")


def test_what_is_missing_or_empty(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n \n")
    (tmp_path / "empty.json").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "p.xls").write_text("x")
    assert refused(tmp_path / "prompt.txt").endswith("prompt.txt' (did you mean 'prompts.txt'?)")
    assert "prompts.txt' has no prompts in it" in refused(tmp_path / "prompts.txt")
    assert "empty.json' has no prompts in it" in refused(tmp_path / "empty.json")
    assert refused([], key="data.eval_prompts") == "data.eval_prompts: the list has no prompts in it"
    assert "has neither pictures" in refused(tmp_path / "folder")
    assert "should end in .txt, .jsonl, .json, .csv" in refused(tmp_path / "p.xls")
    assert "data.options are for functions" in refused(["a"], options={"n": 1})


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.jsonl", '{"text": "a"}\n{"text": "b"\n', "p.jsonl:2: broken JSON: Expecting ',' delimiter at column 13"),
        ("p.json", '["a",\n b]', "p.json:2: broken JSON"),
        ("p.json", '{"text": "a"}', "should hold a list of rows, but holds a mapping"),
        ("p.jsonl", '{"text": "a"}\n{"txt": "b"}', "p.jsonl:2: the row has no text: its columns are txt"),
        ("p.jsonl", '{"text": "  "}', "p.jsonl:1: the row has no text"),
        ("p.jsonl", '{"text": 3}', "p.jsonl:1: the row has no text"),
        ("p.jsonl", "3", "p.jsonl:1: a row should be text or a mapping, but is 3"),
        ("p.jsonl", '{"text": "a", "inputs": 3}', "p.jsonl:1: 'inputs' is 3"),
        ("p.jsonl", '{"text": "a", "id": 1}\n{"text": "b", "id": 1}', "p.jsonl:2: the id '1' is that of p.jsonl:1"),
        ("p.csv", "text,level\na,1\nb\n", "p.csv:3: the row does not have the header's 2 columns"),
        ("p.jsonl", '{"text": "a", "image": "none.png"}', "p.jsonl:1: there is no picture"),
        ("p.jsonl", '{"text": "a", "image": "p.jsonl"}', "p.jsonl:1: "),
        ("p.jsonl", '{"text": "a", "inputs": {"image": "p.jsonl"}}', "is not a picture"),
    ],
)
def test_broken_rows_are_named(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    assert expected in refused(tmp_path / name)


def test_files_that_only_begin_like_pictures(tmp_path):
    whole = picture(tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:40])
    message = refused([{"text": "x", "image": str(tmp_path / "a.png")}])
    assert message.startswith("data.prompts[0]: ")
    assert "a.png" in message
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert "latin.txt' is not UTF-8 text (byte 3)" in refused(tmp_path / "latin.txt")


def prompts(n: int) -> list[Prompt]:
    return [Prompt(str(k), id=str(k)) for k in range(n)]


@pytest.mark.parametrize("batch_size", [1, 3, 7, 16])
def test_every_epoch_has_every_prompt_once(batch_size):
    sampler = PromptSampler(prompts(7), batch_size, seed=5)
    taken = [p.text for step in range(21) for p in sampler.batch(step)]
    epochs = [taken[start : start + 7] for start in range(0, len(taken) - 6, 7)]
    assert all(Counter(epoch) == Counter("0123456") for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_batch_is_a_function_of_seed_and_step():
    def texts(sampler, step):
        return [p.text for p in sampler.batch(step)]

    forwards, backwards = PromptSampler(prompts(11), 4, seed=1), PromptSampler(prompts(11), 4, seed=1)
    ahead = [texts(forwards, step) for step in range(9)]
    assert ahead == [texts(backwards, step) for step in reversed(range(9))][::-1]
    assert ahead != [texts(PromptSampler(prompts(11), 4, seed=2), step) for step in range(9)]
    assert texts(PromptSampler(prompts(11), 4, shuffle=False), 2) == ["8", "9", "10", "0"]


def test_processes_share_a_batch_in_order():
    whole = PromptSampler(prompts(10), 6, seed=3)
    parts = [PromptSampler(prompts(10), 6, seed=3, rank=rank, world=3) for rank in range(3)]
    for step in range(5):
        assert [p.id for p in whole.batch(step)] == [p.id for part in parts for p in part.batch(step)]
    with pytest.raises(UserError, match=r"data.batch_size is 5, but should be a positive multiple of 2"):
        PromptSampler(prompts(10), 5, world=2)
