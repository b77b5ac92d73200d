"""Whether a picture shows the objects that its prompt asks for, in number, colour and position, as GenEval scores it.

GenEval (arXiv 2310.11513) looks for objects with a detector and names their colours with CLIP. The rules are functions
of what was found; :class:`Detection` puts models before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from mmrl.errors import UserError, nearest
from mmrl.options import Strict, validate
from mmrl.scoring import describe_sample
from mmrl.types import Samples
from rewards.detectors import Box, Found, load_detector
from rewards.encoders import Encoder, load_encoder
from rewards.media import images_of

Share = Annotated[float, Field(ge=0, lt=1)]
Overlap = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(gt=0)]

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# Things of a colour come in shades: a firebrick bicycle is red, though nearer to brown than to pure red.
SHADES = {
    "red": ("red", "crimson", "firebrick", "darkred"),
    "orange": ("orange", "darkorange", "sandybrown"),
    "yellow": ("yellow", "gold", "khaki"),
    "green": ("green", "lime", "darkgreen", "seagreen", "yellowgreen", "lightgreen"),
    "blue": ("blue", "royalblue", "dodgerblue", "skyblue", "darkblue"),
    "purple": ("purple", "indigo", "darkviolet", "mediumorchid", "mediumpurple"),
    "pink": ("pink", "hotpink", "deeppink", "lightpink"),
    "brown": ("saddlebrown", "sienna", "brown", "#4b2e1a"),
    "black": ("black", "#282828"),
    "white": ("white", "gainsboro"),
}
# Classes that GenEval calls by other names than COCO, on which its detector was trained.
GENEVAL_NAMES = {"computer mouse": "mouse", "computer keyboard": "keyboard", "tv remote": "remote"}


class Wanted(Strict):
    """Objects of one class that a prompt asks for.

    Attributes:
        kind: the class (``class`` in the data).
        count: exactly so many.
        color: of each of them.
    """

    kind: Annotated[str, Field(alias="class", min_length=1)]
    count: Count = 1
    color: str | None = None


class Request(Strict):
    """``Prompt.target``: the objects, and where the first is seen from the second."""

    objects: Annotated[list[Wanted], Field(min_length=1)]
    relation: Literal["left of", "right of", "above", "below"] | None = None

    @model_validator(mode="after")
    def _relation_has_two_ends(self) -> Request:
        if self.relation is not None:
            ends = {(wanted.kind, wanted.color) for wanted in self.objects[:2]}
            if len(ends) < 2:
                raise ValueError(f"has the relation '{self.relation}', which needs two different objects")
        return self


def read_request(target: Any, where: str) -> Request:
    """Check ``Prompt.target``; ``where`` begins the message of the UserError."""
    asked = validate(Request, target, where=where, path="target")
    for wanted in asked.objects:
        wanted.kind = wanted.kind.strip().lower()
        wanted.color = None if wanted.color is None else wanted.color.strip().lower()
    return asked


def select(found: Sequence[Found], threshold: float, most: int = 16, nms: float = 1.0) -> list[Found]:
    """What counts of the objects found of a class: best first.

    Args:
        threshold: only scores above it.
        most: only so many.
        nms: of two whose boxes have this or a higher intersection over union, only the better; 1 keeps all.
    """
    ranked = sorted((one for one in found if one.score > threshold), key=lambda one: -one.score)[:most]
    if nms == 1:
        return ranked
    kept: list[Found] = []
    for one in ranked:
        if all(overlap(one.box, other.box) < nms for other in kept):
            kept.append(one)
    return kept


def overlap(a: Box, b: Box) -> float:
    """Intersection over union of two boxes."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)) - shared
    return shared / union if union > 0 else 0.0


def positions(a: Box, b: Box, margin: float = 0.1) -> set[str]:
    """Where ``a`` is as seen from ``b``: none, one or two of left of, right of, above, below.

    The offset of the centres is shortened along each axis by ``margin`` times the sum of both boxes' sizes; a direction
    holds if what is left along it is more than half the length of the whole offset. This is GenEval's rule.
    """
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    sizes = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    length = (offset[0] ** 2 + offset[1] ** 2) ** 0.5
    names = (("left of", "right of"), ("above", "below"))
    return {
        pair[shift > 0]
        for pair, shift, size in zip(names, offset, sizes, strict=True)
        if abs(shift) - margin * size > length / 2
    }


def closeness(wanted: int, found: int) -> float:
    """``1 - |wanted - found| / wanted``, at least 0: the mark for a number of objects in Flow-GRPO's reward."""
    return max(0.0, 1 - abs(wanted - found) / wanted)


def marks(
    request: Request,
    found: Mapping[str, Sequence[Found]],
    color_of: Callable[[str, Found], str],
    margin: float = 0.1,
) -> list[float]:
    """A mark in [0, 1] for each requirement: the number and, if given, the colour of each object, then the relation.

    The number is that of the class: if two entries share one, that of both. Colour gets a mark only where the number is
    right. The relation must hold between all of the first and all of the second, which must be right in number and
    colour. Follows ``evaluate_reward`` of Flow-GRPO (arXiv 2505.05470), but no mark is negative, and a relation that
    does not hold gets 0 where a slip there gives one half.

    Args:
        request: what the prompt asks for.
        found: class to the objects that count.
        color_of: class and object to the name of the object's colour; asked only where it matters.
        margin: of :func:`positions`.
    """
    numbers = Counter()
    for wanted in request.objects:
        numbers[wanted.kind] += wanted.count
    given: list[float] = []
    groups: list[list[Found]] = []
    for wanted in request.objects:
        group = list(found.get(wanted.kind, ()))
        given.append(closeness(numbers[wanted.kind], len(group)))
        group = group if len(group) == numbers[wanted.kind] else []
        if wanted.color is not None:
            group = [one for one in group if color_of(wanted.kind, one) == wanted.color]
            given.append(closeness(wanted.count, len(group)))
            group = group if len(group) == wanted.count else []
        groups.append(group)
    if request.relation is not None:
        pairs = [(a, b) for a in groups[0] for b in groups[1]]
        holds = all(request.relation in positions(a.box, b.box, margin) for a, b in pairs)
        given.append(float(bool(pairs) and holds))
    return given


def total(given: Sequence[float], strict: bool = False) -> float:
    """The mean of the marks; with ``strict`` 1 if all are 1, else 0."""
    return float(all(mark == 1 for mark in given)) if strict else sum(given) / len(given)


def crop(image: Tensor, one: Found, background: float | None) -> Tensor:
    """The object's box ``[3, h, w]``, at least one pixel, cut from ``image [3, H, W]``.

    Args:
        background: value of the pixels outside the mask; None, or no mask, leaves them as they are.
    """
    if one.mask is not None and background is not None:
        image = torch.where(one.mask.to(image.device), image, background)
    height, width = image.shape[-2:]
    left, top = min(max(round(one.box[0]), 0), width - 1), min(max(round(one.box[1]), 0), height - 1)
    right, bottom = max(min(round(one.box[2]), width), left + 1), max(min(round(one.box[3]), height), top + 1)
    return image[:, top:bottom, left:right]


def color_by_clip(encoder: Encoder, image: Tensor, kind: str, one: Found, colors: Sequence[str]) -> str:
    """The colour that CLIP sees, by GenEval's three sentences on a crop whose background is grey."""
    # The picture first: it moves the model to its device.
    view = encoder.images(crop(image, one, background=0.6)[None])[0]
    sentences = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")
    texts = encoder.texts([sentence.format(color, kind) for color in colors for sentence in sentences])
    texts = F.normalize(texts.unflatten(0, (len(colors), len(sentences))).mean(1), dim=-1)
    return colors[int((texts @ view).argmax())]


def color_by_pixels(image: Tensor, one: Found, colors: Sequence[str]) -> str:
    """The colour that most pixels of the mask, or of the middle half of the box, are nearest to.

    Nearest in CIELAB to one of its :data:`SHADES`, or for other colours, to what CSS understands by its name.
    """
    if one.mask is not None:
        pixels = image[:, one.mask.to(image.device)].T
    else:
        x0, y0, x1, y1 = one.box
        middle = ((3 * x0 + x1) / 4, (3 * y0 + y1) / 4, (x0 + 3 * x1) / 4, (y0 + 3 * y1) / 4)
        pixels = crop(image, Found(one.score, middle), None).flatten(1).T
    shades, owner = _shades(tuple(colors))
    nearest_shade = torch.cdist(_lab(pixels), _lab(shades.to(pixels))).argmin(1).cpu()
    return colors[int(owner[nearest_shade].bincount(minlength=len(colors)).argmax())]


def _shades(colors: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """RGB ``[S, 3]`` in [0, 1] of the shades of all colours, and which colour ``[S]`` each is of."""
    from PIL import ImageColor

    pairs = [(shade, number) for number, color in enumerate(colors) for shade in SHADES.get(color, (color,))]
    try:
        rgb = [ImageColor.getrgb(shade)[:3] for shade, _ in pairs]
    except ValueError as error:
        raise UserError(f"reward 'detection': colors: {error}; color_by=pixels takes the names that CSS has") from error
    return torch.tensor(rgb) / 255, torch.tensor([number for _, number in pairs])


def _lab(rgb: Tensor) -> Tensor:
    """sRGB ``[N, 3]`` in [0, 1] to CIELAB (white point D65)."""
    linear = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    xyz = linear @ rgb.new_tensor(to_xyz).T / rgb.new_tensor([0.95047, 1.0, 1.08883])
    root = torch.where(xyz > 216 / 24389, xyz.clamp(min=1e-6) ** (1 / 3), (24389 / 27 * xyz + 16) / 116)
    x, y, z = root.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=1)


class Detection:
    """Objects, numbers, colours and positions as in GenEval; ``Prompt.target`` is a :class:`Request` as a mapping.

    ``{"objects": [{"class": "clock", "count": 2, "color": "red"}, {"class": "dog"}], "relation": "left of"}``

    Args:
        model: a detector of transformers, hub repository or folder: for object detection, instance segmentation
            (GenEval: Mask2Former) or zero-shot object detection, which takes any class.
        color_by: ``pixels`` (nearest colour, see :func:`color_by_pixels`), or a CLIP model of transformers, hub
            repository or folder.
        strict: 1 if all requirements are met and else 0, instead of the mean of their marks (:func:`marks`).
        threshold: lowest confidence, and ``count_threshold`` for prompts that ask for more than one of something.
        nms: see :func:`select`; GenEval's 1 is off.
        max_objects: of one class.
        margin: of :func:`positions`.
        colors: to tell apart.
        names: class of the prompts to class of the detector, where they differ; besides :data:`GENEVAL_NAMES`.
        batch_size: pictures per forward.
        device: default, that of the pictures.
    """

    name = "detection"
    differentiable = False

    def __init__(
        self,
        model: str = "facebook/mask2former-swin-small-coco-instance",
        color_by: str = "openai/clip-vit-large-patch14",
        strict: bool = False,
        threshold: Share = 0.3,
        count_threshold: Share = 0.9,
        nms: Overlap = 1.0,
        max_objects: Count = 16,
        margin: Share = 0.1,
        colors: tuple[str, ...] = COLORS,
        names: dict[str, str] | None = None,
        batch_size: Count = 8,
        device: str | None = None,
    ):
        self.detector = load_detector(model, device)
        self.model = model
        self.encoder = None
        if color_by == "pixels":
            _shades(colors)
        else:
            self.encoder = load_encoder(color_by, "transformers", None, None, "float32", device, None)
        self.names = {key.lower(): label.lower() for key, label in (names or {}).items()}
        self.strict, self.threshold, self.count_threshold = strict, threshold, count_threshold
        self.nms, self.max_objects, self.margin = nms, max_objects, margin
        self.colors, self.batch_size = tuple(colors), batch_size

    def __call__(self, samples: Samples) -> Tensor:
        """Scores ``[N]`` in [0, 1].

        Raises:
            UserError: a target is not a request, or asks for a class or colour that is not known; names the sample.
        """
        images = images_of(samples, self.name)
        places = [f"reward '{self.name}': {describe_sample(samples, row)}" for row in range(len(samples))]
        requests = [read_request(p.target, place) for p, place in zip(samples.prompts, places, strict=True)]
        labels = [self._labels(request, place) for request, place in zip(requests, places, strict=True)]
        classes = [tuple(dict.fromkeys(known.values())) for known in labels]
        lowest = min(self.threshold, self.count_threshold)
        found = self.detector(images, classes, lowest, self.batch_size)
        found = [{kind: row[label] for kind, label in known.items()} for known, row in zip(labels, found, strict=True)]
        scores = [self._score(*each) for each in zip(images, requests, found, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def _labels(self, request: Request, where: str) -> dict[str, str]:
        """The classes of a request and what the detector calls them; also looks at the colours."""
        labels = {}
        for wanted in request.objects:
            label = self.names.get(wanted.kind, wanted.kind)
            if self.detector.labels is not None and label not in self.detector.labels:
                label = GENEVAL_NAMES.get(label, label)
                if label not in self.detector.labels:
                    hint = nearest(label, self.detector.labels)
                    raise UserError(f"{where} asks for class '{label}', which '{self.model}' does not know{hint}")
            if wanted.color is not None and wanted.color not in self.colors:
                hint = nearest(wanted.color, self.colors)
                raise UserError(f"{where} asks for color '{wanted.color}', which is not in the reward's colors{hint}")
            labels[wanted.kind] = label
        return labels

    def _score(self, image: Tensor, request: Request, found: Mapping[str, Sequence[Found]]) -> float:
        counting = any(wanted.count > 1 for wanted in request.objects)
        threshold = self.count_threshold if counting else self.threshold
        counted = {kind: select(ones, threshold, self.max_objects, self.nms) for kind, ones in found.items()}

        def color_of(kind: str, one: Found) -> str:
            if self.encoder is None:
                return color_by_pixels(image, one, self.colors)
            return color_by_clip(self.encoder, image, kind, one, self.colors)

        return total(marks(request, counted, color_of, self.margin), self.strict)
