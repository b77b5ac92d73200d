"""Prompts from files, folders, data sets and functions, and which of them a step takes.

A *row* is a mapping of columns, or just a text. ``text`` (or ``prompt`` or ``caption``), ``images`` (or ``image``),
``videos`` (or ``video``), ``messages``, ``target``, ``task``, ``inputs`` and ``id`` become the fields of
:class:`mmrl.types.Prompt`; all other columns are kept in ``Prompt.metadata``. A row of ``messages`` needs no text.
``columns`` renames. Relative picture paths are looked for beside the file that names them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mmrl.errors import UserError, nearest
from mmrl.overrides import describe
from mmrl.registry import is_target, load_object
from mmrl.seeding import generator
from mmrl.types import Prompt

ALIASES = {
    "text": ("text", "prompt", "caption"),
    "images": ("images", "image"),
    "videos": ("videos", "video"),
    "messages": ("messages",),
    "target": ("target",),
    "task": ("task",),
    "inputs": ("inputs",),
    "id": ("id",),
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CLIPS = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".gif")
OUTPUTS = ("chosen", "rejected", "completion")


def load_prompts(
    source: str | Path | Sequence[Any] | Callable,
    *,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    split: str = "train",
    options: Mapping[str, Any] | None = None,
    key: str = "data.prompts",
) -> list[Prompt]:
    """Read prompts.

    Args:
        source: one of

            * a ``.txt`` file, a prompt a line; ``.jsonl``, a row a line; ``.json``, a list of rows; ``.csv``;
            * a folder of pictures, each with its caption in a ``.txt`` of the same name, or all in ``metadata.jsonl``
              with a column ``file_name``; the picture is the prompt's ``target``;
            * a folder that Hugging Face datasets saved, or ``"hub:owner/name"``;
            * ``"module:function"``, ``"file.py:function"`` or a function that returns rows or prompts;
            * a list of texts, rows or prompts.
        columns: field of Prompt to column, where it has another name than the usual ones.
        limit: only the first so many rows.
        split: of a Hugging Face data set.
        options: keywords of the function, or of ``datasets.load_dataset``.
        key: of the config, for messages about ``source`` as a whole.

    Returns:
        Prompts with ids like ``"prompts.jsonl:12"``, at least one.

    Raises:
        UserError: no such file, nothing in it, broken JSON at a line, a row without text, a picture that is missing or
            is not one; names the row.
    """
    rows, folder, name = _rows(source, split, dict(options or {}), key)
    read = _RowReader(folder, dict(columns or {}))
    prompts: list[Prompt] = []
    seen: dict[str, str] = {}
    for place, row in rows:
        if limit is not None and len(prompts) >= limit:
            break
        prompt = row if isinstance(row, Prompt) else read(place, row)
        if not prompt.id:
            prompt = Prompt(**{**vars(prompt), "id": place})
        if prompt.id in seen:
            raise UserError(f"{place}: the id '{prompt.id}' is that of {seen[prompt.id]} already; ids must not repeat")
        seen[prompt.id] = place
        prompts.append(prompt)
    if not prompts:
        raise UserError(f"{key}: {name} has no prompts in it")
    return prompts


Rows = Iterable[tuple[str, Any]]


def _rows(source: Any, split: str, options: dict[str, Any], key: str) -> tuple[Rows, Path, str]:
    """Rows with their places, the folder that picture paths are relative to, and the source's name for messages."""
    if isinstance(source, str) and source.startswith("hub:"):
        return _hub_rows(source.removeprefix("hub:"), split, options), Path(), f"'{source}'"
    if callable(source) or (isinstance(source, str) and is_target(source)):
        function = source if callable(source) else load_object(source)
        name = getattr(function, "__name__", "function")
        return _function_rows(function, name, options, key), Path(), f"what '{name}' returned"
    if options:
        raise UserError(f"data.options are for functions and hub data sets, but {key} is {describe(str(source))}")
    if not isinstance(source, (str, Path)):
        return [(f"{key}[{number}]", row) for number, row in enumerate(source)], Path(), "the list"
    path = Path(source)
    if not path.exists():
        near = nearest(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""
        raise UserError(f"{key}: there is no file or folder '{path}'{near if 'did you mean' in near else ''}")
    if path.is_dir():
        return _folder_rows(path, split, key), path, f"folder '{path}'"
    readers = {".txt": _text_rows, ".jsonl": _json_lines, ".json": _json_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise UserError(f"{key}: '{path}' should end in {', '.join(readers)}, or be a folder")
    return readers[path.suffix.lower()](path), path.parent, f"'{path}'"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"'{path}' is not UTF-8 text (byte {error.start})") from error


def _text_rows(path: Path) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            yield f"{path.name}:{number}", line.strip()


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(_read(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield f"{path.name}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: broken JSON: {error.msg} at column {error.colno}") from error


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(_read(path) or "[]")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: broken JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(rows, list):
        raise UserError(f"'{path}' should hold a list of rows, but holds {describe(rows)}")
    for number, row in enumerate(rows):
        yield f"{path.name}[{number}]", row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(_read(path).splitlines(keepends=True))
    for row in reader:
        place = f"{path.name}:{reader.line_num}"
        if None in row or None in row.values():
            raise UserError(f"{place}: the row does not have the header's {len(reader.fieldnames)} columns")
        yield place, row


def _folder_rows(folder: Path, split: str, key: str) -> Rows:
    if any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json", "state.json")):
        return _saved_rows(folder, split)
    listing = folder / "metadata.jsonl"
    if listing.is_file():
        return _listed_pictures(listing)
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not pictures:
        raise UserError(
            f"{key}: folder '{folder}' has neither pictures ({', '.join(PICTURES)}) nor metadata.jsonl, "
            "and is not a saved data set"
        )
    return _captioned_pictures(pictures)


def _captioned_pictures(pictures: Sequence[Path]) -> Iterator[tuple[str, dict[str, str]]]:
    for picture in pictures:
        caption = picture.with_suffix(".txt")
        if not caption.is_file():
            raise UserError(f"'{picture}' has no caption: there is no '{caption.name}' beside it")
        check_picture(picture, picture.name)
        yield picture.name, {"text": _read(caption).strip(), "target": str(picture.resolve())}


def _listed_pictures(listing: Path) -> Iterator[tuple[str, Any]]:
    for place, row in _json_lines(listing):
        if isinstance(row, dict) and "file_name" in row:
            picture = listing.parent / str(row["file_name"])
            check_picture(picture, place)
            row = {"target": str(picture.resolve()), **{k: v for k, v in row.items() if k != "file_name"}}
        yield place, row


def _saved_rows(folder: Path, split: str) -> Rows:
    datasets = _datasets()
    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"'{folder}' has no split '{split}'{nearest(split, data)}")
        data = data[split]
    return ((f"{folder.name}[{number}]", row) for number, row in enumerate(data))


def _hub_rows(name: str, split: str, options: dict[str, Any]) -> Rows:
    datasets = _datasets()
    try:
        data = datasets.load_dataset(name, split=split, **options)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        # These say "no such data set", "no such split", "needs a name" and "no connection".
        first_line = str(error).strip().split("\n")[0]
        raise UserError(f"data set 'hub:{name}', split '{split}': {first_line}") from error
    return ((f"{name}[{number}]", row) for number, row in enumerate(data))


def _datasets() -> Any:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise UserError("data sets need the package datasets: pip install 'mmrl[datasets]'") from error
    return datasets


def _function_rows(function: Callable, name: str, options: dict[str, Any], key: str) -> Rows:
    rows = function(**options)
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        raise UserError(f"{key}: '{name}' returned {describe(rows)}, but should return rows or prompts")
    return ((f"{name}[{number}]", row) for number, row in enumerate(rows))


class _RowReader:
    """Turns rows into prompts.

    Args:
        folder: that relative picture paths start from.
        columns: field to column name.
    """

    def __init__(self, folder: Path, columns: Mapping[str, str]):
        self.folder = folder
        self.columns = columns

    def __call__(self, place: str, row: Any) -> Prompt:
        if isinstance(row, str):
            row = {self.columns.get("text", "text"): row}
        if not isinstance(row, Mapping):
            raise UserError(f"{place}: a row should be text or a mapping, but is {describe(row)}")
        taken: dict[str, Any] = {}
        used: set[str] = set()
        for field, names in ALIASES.items():
            column = self._column(place, row, field, names)
            if column is not None:
                used.add(column)
                taken[field] = row[column]
        messages = _messages(taken.get("messages"), place)
        taken.setdefault("text", _last_question(messages))
        if not isinstance(taken["text"], str) or not (taken["text"].strip() or messages):
            raise UserError(
                f"{place}: the row has no text: its columns are {', '.join(map(str, row)) or 'none'}, "
                "and data.columns.text can name the one that is"
            )
        inputs = taken.get("inputs") or {}
        if not isinstance(inputs, Mapping):
            raise UserError(f"{place}: 'inputs' is {describe(inputs)}, but should be a mapping of call arguments")
        return Prompt(
            text=taken["text"],
            id="" if taken.get("id") is None else str(taken["id"]),
            images=self._images(taken.get("images"), place),
            videos=self._videos(taken.get("videos"), place),
            messages=messages,
            target=self._target(taken.get("target"), place),
            task=str(taken.get("task") or ""),
            inputs={name: self._input(name, value, place) for name, value in inputs.items()},
            metadata={name: self._other(name, value, place) for name, value in row.items() if name not in used},
        )

    def _other(self, name: str, value: Any, place: str) -> Any:
        """Outputs to learn from, such as the better and the worse of a pair, may be pictures, or clips of frames."""
        if name not in OUTPUTS:
            return value
        if isinstance(value, (list, tuple)) and value and all(_ends(frame, PICTURES) for frame in value):
            return [self._picture(frame, place) for frame in value]
        if _ends(value, CLIPS):
            return self._videos(value, place)[0]
        return self._picture(value, place) if _ends(value, PICTURES) else value

    def _target(self, value: Any, place: str) -> Any:
        """A target that names a picture or a clip beside the rows is that file; other text is an answer."""
        medium = _ends(value, PICTURES) or _ends(value, CLIPS)
        return self._other(OUTPUTS[0], value, place) if medium and (self.folder / value).is_file() else value

    def _column(self, place: str, row: Mapping, field: str, names: Sequence[str]) -> str | None:
        if field in self.columns:
            column = self.columns[field]
            if column not in row:
                raise UserError(
                    f"{place}: data.columns.{field} is '{column}', which the row lacks{nearest(column, row)}"
                )
            return column
        return next((name for name in names if row.get(name) is not None), None)

    def _images(self, value: Any, place: str) -> list[Any]:
        values = [] if value is None or value == "" else value if isinstance(value, (list, tuple)) else [value]
        return [self._picture(item, place) for item in values]

    def _videos(self, value: Any, place: str) -> list[Any]:
        """Clips: paths made absolute, or sequences of frames."""
        values = [] if value is None or value == "" else value if isinstance(value, (list, tuple)) else [value]
        clips = []
        for clip in values:
            if isinstance(clip, (list, tuple)):
                clips.append([self._picture(frame, place) for frame in clip])
            elif isinstance(clip, (str, Path)):
                path = self.folder / clip
                if not path.is_file():
                    raise UserError(f"{place}: there is no video '{path}'")
                clips.append(str(path.resolve()))
            else:
                clips.append(clip)
        return clips

    def _picture(self, value: Any, place: str) -> Any:
        """The absolute path of a picture that was looked at; pictures and tensors as they are."""
        if not isinstance(value, (str, Path)):
            return value
        path = self.folder / value
        check_picture(path, place)
        return str(path.resolve())

    def _input(self, name: str, value: Any, place: str) -> Any:
        """Call arguments go to the pipeline as they are, so those that are pictures are opened here."""
        if not name.endswith(("image", "images")):
            return value
        if isinstance(value, (list, tuple)):
            return [self._input(name, item, place) for item in value]
        if not isinstance(value, str):
            return value
        from PIL import Image

        with Image.open(self._picture(value, place)) as picture:
            return picture.copy()


def _ends(value: Any, endings: tuple[str, ...]) -> bool:
    return isinstance(value, str) and value.lower().endswith(endings)


def _messages(value: Any, place: str) -> tuple[Mapping[str, Any], ...]:
    """A conversation in the chat format: turns with a ``role`` and ``content``, a text or a list of parts."""
    if value is None:
        return ()
    turns = value if isinstance(value, (list, tuple)) else [value]
    for number, turn in enumerate(turns):
        content = turn.get("content") if isinstance(turn, Mapping) else None
        if not isinstance(content, (str, list, tuple)) or not isinstance(turn.get("role"), str):
            raise UserError(
                f"{place}: turn {number} of 'messages' is {describe(turn)}, but should be a mapping with 'role' and "
                "'content', which is a text or a list of parts"
            )
    return tuple(turns)


def _last_question(messages: Sequence[Mapping[str, Any]]) -> str:
    """The text of the last user turn, for reports and rewards."""
    for turn in reversed(messages):
        if turn["role"] == "user":
            content = turn["content"]
            if isinstance(content, str):
                return content
            return " ".join(str(part["text"]) for part in content if isinstance(part, Mapping) and part.get("text"))
    return ""


def check_picture(path: Path, place: str) -> None:
    """Raise ``UserError``, beginning with ``place``, unless the file is a picture that can be read."""
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise UserError(f"{place}: there is no picture '{path}'")
    try:
        with Image.open(path) as picture:
            picture.verify()
    except UnidentifiedImageError as error:
        raise UserError(f"{place}: '{path}' is not a picture") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # What the format readers raise for a file that begins like a picture and goes on otherwise.
        raise UserError(f"{place}: '{path}' is a broken picture: {error}") from error


class PromptSampler:
    """Which prompts a step takes: a pure function of seed and step, so a resumed run takes the same.

    Every epoch is a permutation of all prompts; batches go on across its end, so each prompt comes once before any
    comes twice, also when a batch is larger than the data.

    Args:
        prompts: at least one.
        batch_size: prompts per step over all processes; a multiple of ``world``.
        seed: of the permutations.
        shuffle: without it the order of ``prompts``.
        rank, world: this process and their number; each takes its contiguous share of the batch.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
    ):
        if not prompts:
            raise UserError("there are no prompts to sample from")
        if batch_size < 1 or batch_size % world:
            raise UserError(
                f"data.batch_size is {batch_size}, but should be a positive multiple of {world}, "
                "the number of processes"
            )
        self.prompts = list(prompts)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world = world
        self._order: tuple[int, list[int]] = (-1, [])

    def batch(self, step: int) -> list[Prompt]:
        """This process's prompts of training step ``step``, from 0."""
        share = self.batch_size // self.world
        first = step * self.batch_size + self.rank * share
        return [self._at(position) for position in range(first, first + share)]

    def extra(self, step: int, attempt: int, count: int, used: Collection[str] = ()) -> list[Prompt]:
        """``count`` more prompts for this process, beyond :meth:`batch`, when step ``step`` asks for the n-th time.

        A function of seed, step, attempt and ``used``, ids that are passed over while there are others; the processes'
        prompts differ as long as there are enough.
        """
        drawn = torch.randperm(len(self.prompts), generator=generator(self.seed, "extra", step, attempt)).tolist()
        share = drawn[self.rank :: self.world] or drawn
        share = [place for place in share if self.prompts[place].id not in used] or share
        return [self.prompts[share[k % len(share)]] for k in range(count)]

    def _at(self, position: int) -> Prompt:
        epoch, offset = divmod(position, len(self.prompts))
        if not self.shuffle:
            return self.prompts[offset]
        if self._order[0] != epoch:
            # Kept for speed alone: it is a function of seed and epoch.
            drawn = torch.randperm(len(self.prompts), generator=generator(self.seed, "prompts", epoch))
            self._order = (epoch, drawn.tolist())
        return self.prompts[self._order[1][offset]]
