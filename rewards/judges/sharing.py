"""Pictures that several questions are about: processed once and encoded once by the vision tower.

The forwards of transformers take encoded pictures in place of pixels. What a picture becomes in the text (a row of
place holders, with tiles and marks in some families) is asked of the processor, so that nothing here knows a family.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rewards.judges.subjects import Picture


class CannotShareError(Exception):
    """The family does not keep one row of features per picture."""


@dataclass
class Encoded:
    """A picture as the language model gets it.

    Attributes:
        text: what its place holder is replaced by.
        features: ``[tokens, D]``.
        deep: features for further layers, for families that have them.
        grid: ``[1, 3]`` patches in time, height and width, for families that place tokens by it.
    """

    text: str
    features: Tensor
    deep: list[Tensor]
    grid: Tensor | None


def can_share(model: Any, processor: Any) -> bool:
    """Whether model and processor have what this takes; whether they agree is for a comparison to say."""
    return (
        "mm_encoder_outputs" in inspect.signature(model.forward).parameters
        and hasattr(model.base_model, "get_image_features")
        and hasattr(processor, "create_mm_token_type_ids")
        and bool(getattr(processor, "image_token", None))
        and bool(getattr(processor, "chat_template", None))
    )


class SharedPictures:
    """The pictures of one call, encoded.

    Args:
        model, processor: for which :func:`can_share` holds.
        pictures: distinct ones.
        batch_size: pictures per forward of the vision tower.

    Raises:
        CannotShareError: it turns out that this family cannot.
    """

    def __init__(self, model: Any, processor: Any, pictures: Sequence[Picture], batch_size: int):
        self.model, self.processor = model, processor
        self.encode_images = model.base_model.get_image_features
        self.kind, self.stacked = type(None), False
        self.known: dict[Picture, Encoded] = {}
        for start in range(0, len(pictures), batch_size):
            part = pictures[start : start + batch_size]
            self.known.update(zip(part, self._encode(part), strict=True))

    def _encode(self, pictures: Sequence[Picture]) -> list[Encoded]:
        inputs = self.processor(
            images=[[picture.image] for picture in pictures],
            text=[self.processor.image_token] * len(pictures),
            padding=True,
            return_tensors="pt",
            return_text_replacement_offsets=True,
        )
        texts = [row[0]["replacement"] for row in inputs["text_replacement_offsets"]]
        given = {key: place(inputs[key], self.model) for key in consumed_keys(self.model) if key in inputs}
        found = self.encode_images(**given, return_dict=True)
        self.kind, self.stacked = type(found), isinstance(found.pooler_output, Tensor)
        features = [] if found.pooler_output is None else [part.flatten(0, -2) for part in found.pooler_output]
        layers = [list(layer) for layer in getattr(found, "deepstack_features", None) or ()]
        if any(len(parts) != len(pictures) for parts in (texts, features, *layers)):
            raise CannotShareError
        grids = given["image_grid_thw"].split(1) if "image_grid_thw" in given else [None] * len(pictures)
        deep = [[layer[i] for layer in layers] for i in range(len(pictures))]
        return [Encoded(*parts) for parts in zip(texts, features, deep, grids, strict=True)]

    def inputs(self, texts: Sequence[str], pictures: Sequence[Sequence[Picture]], side: str) -> dict[str, Any]:
        """Inputs of the model for rendered conversations with a place holder per picture.

        Raises:
            CannotShareError: a text has another number of place holders than pictures.
        """
        token = self.processor.image_token
        filled = []
        for text, row in zip(texts, pictures, strict=True):
            pieces = text.split(token)
            if len(pieces) != len(row) + 1:
                raise CannotShareError
            filled.append(
                pieces[0] + "".join(self.known[p].text + rest for p, rest in zip(row, pieces[1:], strict=True))
            )
        tokenizer = self.processor.tokenizer
        options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        if tokenizer.bos_token is not None and filled[0].startswith(tokenizer.bos_token):
            options["add_special_tokens"] = False
        out = dict(tokenizer(filled, **options))
        if getattr(self.processor, "return_mm_token_type_ids", False):
            types = self.processor.create_mm_token_type_ids(out["input_ids"].tolist())
            out["mm_token_type_ids"] = torch.tensor(types)
        out = {key: place(value, self.model) for key, value in out.items()}
        shown = [self.known[picture] for row in pictures for picture in row]
        features = [one.features for one in shown]
        encoded: dict[str, Any] = {"pooler_output": torch.stack(features) if self.stacked else features}
        if shown[0].deep:
            encoded["deepstack_features"] = list(zip(*(one.deep for one in shown), strict=True))
        out["mm_encoder_outputs"] = {"image": self.kind(**encoded)}
        if shown[0].grid is not None:
            out["image_grid_thw"] = torch.cat([one.grid for one in shown])
        return out


def consumed_keys(model: Any) -> list[str]:
    """The inputs that encoding a picture uses up."""
    return [key for key in inspect.signature(model.base_model.get_image_features).parameters if key != "kwargs"]


def place(value: Any, model: Any) -> Any:
    """A tensor on the model's device, and in its number type if it has decimals; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.to(model.device, model.dtype) if value.is_floating_point() else value.to(model.device)
