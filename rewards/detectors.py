"""Object detectors of transformers, of three kinds, behind one call."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.media import to_pil
from rewards.weights import first_line

Box = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Found:
    """One detected object.

    Attributes:
        score: confidence in [0, 1].
        box: left, top, right, bottom in pixels of the picture.
        mask: bool ``[H, W]``, the object's pixels, from detectors that say so.
    """

    score: float
    box: Box
    mask: Tensor | None = None


class Detector(ABC):
    """A frozen detector.

    Attributes:
        labels: the classes it was trained on, in lower case; None if it takes any.
    """

    labels: list[str] | None = None

    def __init__(self, model: nn.Module, processor: Any, device: str | None):
        self.model = model.eval().requires_grad_(False)
        self.processor = processor
        self.device = None if device is None else torch.device(device)

    @torch.no_grad()
    def __call__(
        self, images: Tensor, classes: Sequence[tuple[str, ...]], threshold: float, batch_size: int
    ) -> list[dict[str, list[Found]]]:
        """Look for the classes of each picture.

        Args:
            images: ``[N, 3, H, W]`` in [0, 1].
            classes: N tuples of distinct names, in lower case.
            threshold: lowest confidence that is of interest.
            batch_size: pictures per forward.

        Returns:
            For each picture its classes and what was found of them, in the detector's order.
        """
        device = self.device or images.device
        if self.model.device != device:
            self.model.to(device)
        found: list[dict[str, list[Found]]] = [{name: [] for name in names} for names in classes]
        for rows in self._batches(classes, batch_size):
            pictures = [to_pil(images[row]) for row in rows]
            for row, result in zip(rows, self._detect(pictures, classes[rows[0]], threshold), strict=True):
                for label, one in result:
                    if label in found[row]:
                        found[row][label].append(one)
        return found

    def _batches(self, classes: Sequence[tuple[str, ...]], batch_size: int) -> Iterator[list[int]]:
        rows = list(range(len(classes)))
        yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    @abstractmethod
    def _detect(
        self, pictures: list[Any], names: tuple[str, ...], threshold: float
    ) -> list[list[tuple[str | None, Found]]]:
        """Label and object of all that is found in each picture."""


class BoxDetector(Detector):
    """Closed list of classes, boxes only: DETR, RT-DETR, YOLOS..."""

    def __init__(self, model: nn.Module, processor: Any, device: str | None):
        super().__init__(model, processor, device)
        self._names = {number: label.strip().lower() for number, label in model.config.id2label.items()}
        self.labels = sorted(set(self._names.values()))

    def _detect(
        self, pictures: list[Any], names: tuple[str, ...], threshold: float
    ) -> list[list[tuple[str | None, Found]]]:
        inputs = self.processor(images=pictures, return_tensors="pt").to(self.model.device)
        return self._read(self.model(**inputs), [(p.height, p.width) for p in pictures], threshold)

    def _read(self, outputs: Any, sizes: list, threshold: float) -> list[list[tuple[str | None, Found]]]:
        results = self.processor.post_process_object_detection(outputs, threshold=threshold, target_sizes=sizes)
        return [
            [
                (self._names.get(label), Found(score, tuple(box)))
                for label, score, box in zip(*(r[k].tolist() for k in ("labels", "scores", "boxes")), strict=True)
            ]
            for r in results
        ]


class MaskDetector(BoxDetector):
    """Closed list of classes, instance masks: Mask2Former, MaskFormer... The box is that of the mask."""

    def _read(self, outputs: Any, sizes: list, threshold: float) -> list[list[tuple[str | None, Found]]]:
        process = self.processor.post_process_instance_segmentation
        # Where the library can, masks may overlap.
        overlap = "return_binary_maps" in inspect.signature(process).parameters
        options = {"return_binary_maps": True} if overlap else {}
        results = process(outputs, threshold=threshold, target_sizes=sizes, **options)
        return [self._objects(result["segmentation"], result["segments_info"] or []) for result in results]

    def _objects(self, segmentation: Tensor, segments: list[dict]) -> list[tuple[str | None, Found]]:
        found = []
        for position, segment in enumerate(segments):
            mask = segmentation[position] > 0 if segmentation.ndim == 3 else segmentation == segment["id"]
            # Where masks cannot overlap, one may have been covered by others.
            if mask.any():
                label = self._names.get(segment["label_id"])
                found.append((label, Found(segment["score"], box_of_mask(mask), mask)))
        return found


class ZeroShotDetector(Detector):
    """Any class, asked for by name: OWL-ViT, OWLv2, Grounding DINO, OmDet-Turbo."""

    def _batches(self, classes: Sequence[tuple[str, ...]], batch_size: int) -> Iterator[list[int]]:
        # One batch asks one question: processors pad questions of different length with further, empty ones.
        for names in dict.fromkeys(classes):
            rows = [row for row, other in enumerate(classes) if other == names]
            yield from (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))

    def _detect(
        self, pictures: list[Any], names: tuple[str, ...], threshold: float
    ) -> list[list[tuple[str | None, Found]]]:
        questions = [list(names) for _ in pictures]
        inputs = self.processor(images=pictures, text=questions, return_tensors="pt").to(self.model.device)
        results = self.processor.post_process_grounded_object_detection(
            self.model(**inputs),
            threshold=threshold,
            target_sizes=[(picture.height, picture.width) for picture in pictures],
            text_labels=questions,
        )
        return [
            [
                (match_phrase(phrase, names), Found(score, tuple(box)))
                for phrase, score, box in zip(r["text_labels"], r["scores"].tolist(), r["boxes"].tolist(), strict=True)
            ]
            for r in results
        ]


def box_of_mask(mask: Tensor) -> Box:
    """The smallest box around the True pixels of ``[H, W]``, of which there must be one."""
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def match_phrase(phrase: str, names: Sequence[str]) -> str | None:
    """The class that a detector means which answers in words of the question (Grounding DINO), not in its classes.

    It may drop words of a class or join those of two: the class most of whose words are there is meant; None if there
    is no such class, or more than one.
    """
    phrase = phrase.strip().lower()
    if phrase in names:
        return phrase
    words = set(phrase.split())
    shares = {name: len(words & set(name.split())) / len(name.split()) for name in names}
    best = [name for name in names if shares[name] == max(shares.values()) > 0]
    return best[0] if len(best) == 1 else None


def load_detector(model: str, device: str | None = None) -> Detector:
    """Load a detector; which kind it is follows from the architecture named in its config.

    Args:
        model: a repository on the hub or a folder.
        device: default, that of the pictures.

    Raises:
        UserError: not found, or not a detector.
    """
    import transformers
    from transformers.models.auto import modeling_auto as auto

    kinds = {
        BoxDetector: (auto.MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES,),
        MaskDetector: (
            auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
            auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
        ),
        ZeroShotDetector: (auto.MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES,),
    }
    try:
        config = transformers.AutoConfig.from_pretrained(model)
        name = (config.architectures or [config.model_type])[0]
        fitting = [kind for kind, tables in kinds.items() if any(name in table.values() for table in tables)]
        if not fitting or config.model_type == "oneformer":
            raise UserError(
                f"detector '{model}' is a {name}, but should be a model of transformers for object detection, "
                "instance segmentation or zero-shot object detection"
            )
        network = getattr(transformers, name).from_pretrained(model)
        processors = transformers.AutoProcessor if fitting[0] is ZeroShotDetector else transformers.AutoImageProcessor
        return fitting[0](network, processors.from_pretrained(model), device)
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"detector '{model}' could not be loaded by transformers: {first_line(error)}") from error
