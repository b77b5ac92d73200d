"""Questions about pictures of coloured shapes, their exact answers, and responses to learn the answering from.

    data: {prompts: "mmrl.world.questions:rows", options: {count: 512, tasks: [ground, count]}}

A response is ``<think>...</think><answer>...</answer>``; the thought names what the answer rests on and where it is, in
pixels. The tasks:

* ``ground``: "Where is the red circle?", answered by its box ``[left, top, right, bottom]`` in pixels;
* ``count``: "How many circles are there?", with or without a colour, or of a colour alone;
* ``relation``: "Is the red circle left of the blue square?", yes or no;
* ``colour``: "What colour is the shape above the blue square?";
* ``judge``: "Does the picture show a red circle above a blue square? Answer yes or no.", answered by the bare word, by
  which a judge is read; the pictures are those of the image quickstart.

Held out are pairs of kinds, such as a red circle with a blue square: no picture of the training split has both, and
each picture of the eval split has such a pair, which its question is about. The judge's captions are held out as those
of the image quickstart are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mmrl.errors import UserError, nearest
from mmrl.world.captions import KINDS, PLURALS, all_targets, caption, is_held_out, key_of
from mmrl.world.captions import TASKS as CAPTION_TASKS
from mmrl.world.drawing import draw
from mmrl.world.scenes import RELATIONS, Object, Scene, holds, place

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 64
"""Pixels of a picture's side, as the quickstart's model sees it."""

JUDGED_SIDE = 32
"""Pixels of the pictures of the image quickstart, which the model is shown enlarged."""

TASKS = ("ground", "count", "relation", "colour", "judge", "describe")
Task = Literal["ground", "count", "relation", "colour", "judge", "describe"]

SHADE = 0.3
"""How much darker the far edges of a picture are, see :func:`picture`."""

MIN_HALF, MAX_HALF = 0.11, 0.15
GAP = 0.03
MARGIN = 0.08
"""Of half-sides, distances of boxes and offsets of related objects, as fractions of the picture's side."""

Kind = Mapping[str, str]


@dataclass(frozen=True)
class Question:
    """What is asked, apart from its wording.

    Attributes:
        task: one of ``TASKS`` but "judge".
        kind: the colour and shape asked about; a count may leave one of them out.
        relation: of "relation" and "colour".
        other: of these two, the kind on the relation's right-hand side.
    """

    task: str
    kind: Kind
    relation: str = ""
    other: Kind | None = None

    @property
    def text(self) -> str:
        """The question in words."""
        name = " ".join(self.kind.values())
        if self.task == "ground":
            return f"Where is the {name}?"
        if self.task == "count":
            shape = self.kind.get("shape")
            plural = PLURALS[shape] if shape else "shapes"
            return f"How many {' '.join(filter(None, [self.kind.get('colour'), plural]))} are there?"
        other = " ".join(self.other.values())
        if self.task == "relation":
            return f"Is the {name} {self.relation} the {other}?"
        return f"What colour is the shape {self.relation} the {other}?"


def matching(scene: Scene, kind: Kind) -> list[Object]:
    """The objects of a scene that have the colour and the shape of ``kind``, as far as it names them."""
    return [o for o in scene.objects if all(getattr(o, key) == value for key, value in kind.items())]


def related(scene: Scene, relation: str, anchor: Object) -> list[Object]:
    """The objects that are, say, above ``anchor``."""
    return [o for o in scene.objects if o is not anchor and holds(relation, (o.x, o.y), (anchor.x, anchor.y))]


def evidence(question: Question, scene: Scene) -> list[Object]:
    """The objects that the answer rests on, in the order in which a response names them.

    Raises:
        ValueError: the scene does not answer the question, because what it calls "the ..." is not there just once.
    """
    if question.task == "count":
        return sorted(matching(scene, question.kind), key=lambda o: (o.y, o.x))
    if question.task == "colour":
        anchors = matching(scene, question.other)
        found = related(scene, question.relation, anchors[0]) if len(anchors) == 1 else []
        groups = [anchors, found]
    else:
        groups = [matching(scene, kind) for kind in (question.kind, question.other) if kind is not None]
    if any(len(group) != 1 for group in groups):
        raise ValueError(f"{question.text!r} has no single answer in {scene}")
    return [group[0] for group in groups]


def answer(question: Question, scene: Scene, side: int = SIDE) -> list[int] | int | str:
    """The true answer: a box in pixels of a ``side`` by ``side`` picture, a number, "yes" or "no", or a colour."""
    objects = evidence(question, scene)
    if question.task == "ground":
        return pixel_box(objects[0], side)
    if question.task == "count":
        return len(objects)
    if question.task == "colour":
        return objects[1].colour
    a, b = objects
    return "yes" if holds(question.relation, (a.x, a.y), (b.x, b.y)) else "no"


def pixel_box(thing: Object, side: int) -> list[int]:
    """(left, top, right, bottom) in whole pixels."""
    return [round(edge * side) for edge in thing.box]


def response(question: Question, scene: Scene, given: Any, side: int = SIDE) -> str:
    """A worked-out response that ends in the answer ``given``."""
    return f"<think>{told(evidence(question, scene), side)}</think><answer>{given}</answer>"


def told(objects: Sequence[Object], side: int = SIDE) -> str:
    """Objects and their centres in pixels, e.g. ``red circle (20, 31), blue square (40, 12)``."""
    return ", ".join(f"{o.colour} {o.shape} ({round(o.x * side)}, {round(o.y * side)})" for o in objects)


def careless(question: Question, scene: Scene, rng: np.random.Generator, share: float, loose: int, side: int) -> Any:
    """An answer as a hasty annotator would give it.

    Every box is drawn too large, each edge by 1 to ``loose`` pixels. In ``share`` of the cases where that is wrong a
    count leaves one out, a relation is agreed with, and the colour is that of the shape named in the question.
    """
    truth = answer(question, scene, side)
    if question.task == "ground":
        out = rng.integers(1, loose + 1, 4) if loose else np.zeros(4, int)
        edges = [truth[0] - out[0], truth[1] - out[1], truth[2] + out[2], truth[3] + out[3]]
        return [int(min(max(edge, 0), side)) for edge in edges]
    if rng.random() >= share:
        return truth
    if question.task == "count":
        return max(truth - 1, 1)
    return "yes" if question.task == "relation" else question.other["colour"]


def rows(
    count: Annotated[int, Field(ge=1)] = 1024,
    seed: Annotated[int, Field(ge=0)] = 0,
    tasks: Sequence[Task] = ("ground", "count", "relation", "colour"),
    split: Literal["train", "eval"] = "train",
    share: Annotated[float, Field(ge=0, le=1)] = 0.0,
    loose: Annotated[int, Field(ge=0)] = 0,
) -> Iterator[dict[str, Any]]:
    """Rows of text, images (one PIL picture), target, task, id and response, the tasks in turn.

    Args:
        count: how many.
        seed: of everything; the splits differ at any seed.
        tasks: which tasks.
        split: "train" or "eval"; see the top of the file.
        share, loose: how careless the responses (not the targets) are, see :func:`careless`. A model that is trained
            on such responses sees well and answers badly, which is what reinforcement learning is there to mend.

    Raises:
        UserError: a task that there is not.
    """
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"tasks has {task!r}{nearest(str(task), TASKS)}")
    rng = np.random.default_rng([seed, 3, split == "eval"])
    for number in range(count):
        task = tasks[number % len(tasks)]
        row = {"id": f"{split}-{seed}-{task}-{number}", "task": task}
        if task in ("judge", "describe"):
            yield row | (_judge_row if task == "judge" else _description_row)(rng, split)
            continue
        question, scene = ask(task, rng, split)
        given = careless(question, scene, rng, share, loose, SIDE)
        yield row | {
            "text": question.text,
            "images": [picture(scene)],
            "target": answer(question, scene),
            "response": response(question, scene, given),
        }


def picture(scene: Scene, side: int = SIDE, shade: float = SHADE) -> Image:
    """A scene as a PIL picture of ``side`` pixels, its light fading to the right in red and downwards in blue.

    On a plain ground nothing but the objects would tell one part of the picture from another to a vision tower whose
    positions are all relative, as Qwen2.5-VL's are.
    """
    from PIL import Image

    pixels = draw([scene], side)[0].permute(1, 2, 0).numpy()
    fade = 1 - shade * (np.arange(side) + 0.5) / side
    pixels[:, :, 0] *= fade
    pixels[:, :, 2] *= fade[:, None]
    return Image.fromarray((pixels * 255).round().astype(np.uint8))


def ask(task: str, rng: np.random.Generator, split: str) -> tuple[Question, Scene]:
    """A random question of a task with a scene that answers it."""
    while True:
        pair = [KINDS[k] for k in rng.choice(len(KINDS), 2, replace=False)]
        if _held_out(*pair) != (split == "eval"):
            continue
        question = _question(task, pair, rng)
        kinds = _kinds(task, pair, rng)
        if split == "train" and any(_held_out(a, b) for i, a in enumerate(kinds) for b in kinds[:i] if a != b):
            continue
        scene = scatter(kinds, rng)
        if scene is None or not _clear(question, scene):
            continue
        if task == "relation":
            true = _relation(question, scene)
            wrong = [relation for relation in RELATIONS if relation != true]
            question = replace(question, relation=str(true if rng.random() < 0.5 else rng.choice(wrong)))
        return question, scene


def scatter(kinds: Sequence[Kind], rng: np.random.Generator) -> Scene | None:
    """Objects of these kinds at random places with ``GAP`` between their boxes; None when they did not find room."""
    objects: list[Object] = []
    for kind in kinds:
        for _ in range(20):
            half = rng.uniform(MIN_HALF, MAX_HALF)
            x, y = rng.uniform(half + 0.01, 0.99 - half, 2)
            if all(max(abs(x - o.x), abs(y - o.y)) >= half + o.size + GAP for o in objects):
                objects.append(Object(kind["shape"], kind["colour"], float(x), float(y), float(half)))
                break
        else:
            return None
    return Scene(tuple(objects))


def _held_out(a: Kind, b: Kind) -> bool:
    return is_held_out({"objects": [a, b], "relation": None})


def _question(task: str, pair: Sequence[Kind], rng: np.random.Generator) -> Question:
    relation = RELATIONS[rng.integers(len(RELATIONS))]
    if task == "count":
        keys = (("colour", "shape"), ("shape",), ("colour",))[rng.integers(3)]
        return Question(task, {key: pair[0][key] for key in keys})
    if task == "colour":
        return Question(task, {}, relation, pair[1])
    return Question(task, pair[0], *((relation, pair[1]) if task == "relation" else ()))


def _kinds(task: str, pair: Sequence[Kind], rng: np.random.Generator) -> list[Kind]:
    """The kinds in the picture: the pair, and others that look like it in part more often than not."""
    kinds = list(pair)
    if task == "count":
        kinds = [pair[0]] * int(rng.integers(1, 4)) + [pair[1]]
    for _ in range(int(rng.integers(5 - len(kinds)))):
        kinds.append(KINDS[rng.integers(len(KINDS))])
    return kinds


def _clear(question: Question, scene: Scene) -> bool:
    """Whether the answer is unique and not a matter of a pixel."""
    try:
        evidence(question, scene)
    except ValueError:
        return False
    return question.relation == "" or _relation(question, scene, MARGIN) is not None


def _relation(question: Question, scene: Scene, margin: float = 0.0) -> str | None:
    """The relation that holds between the two objects of the question."""
    a, b = [(o.x, o.y) for o in evidence(question, scene)]
    return next((relation for relation in RELATIONS if holds(relation, a, b, margin)), None)


def _description_row(rng: np.random.Generator, split: str) -> dict[str, Any]:
    scene = ask("ground", rng, split)[1]
    objects = sorted(scene.objects, key=lambda o: (o.y, o.x))
    words = told(objects)
    return {"text": "What is in the picture?", "images": [picture(scene)], "target": words, "response": words}


def _judge_row(rng: np.random.Generator, split: str) -> dict[str, Any]:
    """A caption of the image quickstart and a picture that shows it, or one that shows something like it."""
    held_out = split == "eval"
    names = CAPTION_TASKS[1:] if held_out else CAPTION_TASKS
    choices = [t for t in all_targets(str(rng.choice(names))) if is_held_out(t) == held_out]
    asked = choices[rng.integers(len(choices))]
    shown, verdict = asked, "yes"
    if rng.random() < 0.5:
        shown, verdict = _altered(asked, rng), "no"
    scene = place(shown, rng)
    return {
        "text": f"Does the picture show {caption(asked, rng)}? Answer yes or no.",
        "images": [picture(scene, JUDGED_SIDE, shade=0)],
        "target": verdict,
        "response": verdict,
    }


def _altered(target: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """A target that differs in a kind, in the number or in the relation."""
    while True:
        objects, relation = list(target["objects"]), target["relation"]
        if relation and rng.random() < 0.5:
            relation = [relation[0], RELATIONS[rng.integers(len(RELATIONS))], relation[2]]
        elif not relation and rng.random() < 0.3:
            objects = objects[:-1] if len(objects) > 1 and rng.random() < 0.5 else [*objects, objects[0]]
        else:
            changed = int(rng.integers(len(objects)))
            kind = KINDS[rng.integers(len(KINDS))]
            objects = [kind if i == changed else o for i, o in enumerate(objects)]
        altered = {"objects": objects, "relation": relation}
        if len(objects) <= 3 and key_of(altered) != key_of(target):
            return altered
