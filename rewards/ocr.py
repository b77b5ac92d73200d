"""Whether a picture carries the text that its prompt asks for: what a text recogniser reads against what was wanted."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.media import to_pil
from mmrl.registry import load_object
from mmrl.scoring import describe_sample
from mmrl.types import Prompt, Samples
from rewards.encoders import Dtype
from rewards.media import images_of
from rewards.text_overlap import edit_distance
from rewards.weights import first_line

Count = Annotated[int, Field(gt=0)]

# GOT-OCR ends its answer with this token, but its generation config names another.
_END_OF_TURN = "<|im_end|>"


def bare(text: str) -> str:
    """Lower case and without white space."""
    return "".join(text.lower().split())


def text_score(read: str, wanted: str) -> float:
    """``1 - min(d, n) / n`` with the edit distance d of the bare texts and n the length of the wanted one, in [0, 1].

    1 if the wanted text is part of what was read, as in Flow-GRPO's OCR reward (arXiv 2505.05470).
    """
    read, wanted = bare(read), bare(wanted)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def wanted_text(prompt: Prompt, where: str) -> str:
    """``prompt.target``, or where there is none, the first text in double quotes of the prompt.

    Raises:
        UserError: neither is there, or it is empty; ``where`` begins the message.
    """
    if prompt.target is None:
        quoted = re.search(r'"([^"]*)"|“([^”]*)”', prompt.text)
        if quoted is None:
            raise UserError(f"{where} has no target, which should be the text to show, and no text in double quotes")
        text = quoted[1] or quoted[2] or ""
    else:
        text = prompt.target
    if not isinstance(text, str) or not bare(text):
        raise UserError(f"{where} has the target {text!r}, but it should be the text to show")
    return text


class ModelReader:
    """Reads with an image-to-text model of transformers: GOT-OCR, TrOCR, or any model that chats about pictures.

    Args: as for :class:`Ocr`.

    Raises:
        UserError: not found, not such a model, or one that needs a prompt.
    """

    def __init__(
        self, model: str, prompt: str | None, max_new_tokens: int, batch_size: int, dtype: Dtype, device: str | None
    ):
        from PIL import Image
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            network = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype))
            self.processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"text reader '{model}' could not be loaded by transformers as a model from picture to text: "
                f"{first_line(error)}"
            ) from error
        self.model = network.eval().requires_grad_(False)
        self.prompt, self.batch_size = prompt, batch_size
        self.device = None if device is None else torch.device(device)
        self.tokenizer = self.processor.tokenizer
        self.limits = {"max_new_tokens": max_new_tokens, "do_sample": False, **self._ends()}
        try:
            self._inputs([Image.new("RGB", (64, 64))])
        except (ValueError, TypeError) as error:
            hint = "give it one (prompt: ...)" if prompt is None else f"prompt is {prompt!r}"
            raise UserError(
                f"text reader '{model}' cannot take a picture {'without a' if prompt is None else 'with this'} prompt, "
                f"{hint}: {first_line(error)}"
            ) from error

    def __call__(self, images: Tensor) -> list[str]:
        """The text in each of ``images [N, 3, H, W]``."""
        device = self.device or images.device
        if self.model.device != device:
            self.model.to(device)
        texts: list[str] = []
        for part in images.split(self.batch_size):
            inputs = self._inputs([to_pil(image) for image in part]).to(device, self.model.dtype)
            with torch.no_grad():
                tokens = self.model.generate(**inputs, **self.limits)
            # Models without an encoder repeat the question; it is the same for all, so that none is padded.
            asked = 0 if self.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
            texts += self.tokenizer.batch_decode(tokens[:, asked:], skip_special_tokens=True)
        return texts

    def _inputs(self, pictures: list[Any]) -> Any:
        if self.prompt is None:
            inputs = self.processor(images=pictures, return_tensors="pt")
            if not self.model.config.is_encoder_decoder and "input_ids" not in inputs:
                raise ValueError("it makes no tokens of a picture alone")
            return inputs
        if getattr(self.processor, "chat_template", None) is None:
            return self.processor(images=pictures, text=[self.prompt] * len(pictures), return_tensors="pt")
        turns = [
            [{"role": "user", "content": [{"type": "image", "image": one}, {"type": "text", "text": self.prompt}]}]
            for one in pictures
        ]
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        return self.processor.apply_chat_template(turns, **options)

    def _ends(self) -> dict[str, Any]:
        config = self.model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        ends = list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        further = self.tokenizer.get_vocab().get(_END_OF_TURN)
        ends += [further] if further is not None and further not in ends else []
        padding = next((i for i in (config.pad_token_id, self.tokenizer.pad_token_id, *ends) if i is not None), None)
        return {"eos_token_id": ends or None, "pad_token_id": padding}


class FunctionReader:
    """Reads with a function ``"module:name"`` or ``"file.py:name"`` from a list of PIL pictures to a list of texts.

    A class is built once, without arguments, and its object called.
    """

    def __init__(self, target: str):
        found = load_object(target)
        self.target = target
        self.read: Callable[[list[Any]], Sequence[str]] = found() if inspect.isclass(found) else found
        if not callable(self.read):
            raise UserError(f"reward 'ocr': reader '{target}' is {type(self.read).__name__}, not a function or class")

    def __call__(self, images: Tensor) -> list[str]:
        """The text in each of ``images [N, 3, H, W]``."""
        texts = self.read([to_pil(image) for image in images])
        if not isinstance(texts, (list, tuple)) or len(texts) != len(images):
            what = f"{len(texts)} texts" if isinstance(texts, (list, tuple)) else type(texts).__name__
            raise UserError(f"reward 'ocr': reader '{self.target}' returned {what} for {len(images)} pictures")
        for text in texts:
            if not isinstance(text, str):
                raise UserError(f"reward 'ocr': reader '{self.target}' returned {type(text).__name__}, not text")
        return list(texts)


class Ocr:
    """Edit distance of the text in the picture to the text wanted, see :func:`text_score` and :func:`wanted_text`.

    Args:
        model: image-to-text model of transformers, hub repository or folder.
        prompt: what to ask a model that takes a question with the picture. GOT-OCR and TrOCR take none.
        reader: instead of the model, ``module:name`` or ``file.py:name``: a function from a list of PIL pictures to a
            list of texts, or a class whose object is one. A file is looked for from the working directory.
        max_new_tokens: longest answer.
        batch_size: pictures per forward.
        dtype: of the network.
        device: default, that of the pictures.
    """

    name = "ocr"
    differentiable = False

    def __init__(
        self,
        model: str = "stepfun-ai/GOT-OCR-2.0-hf",
        prompt: str | None = None,
        reader: str | None = None,
        max_new_tokens: Count = 128,
        batch_size: Count = 8,
        dtype: Dtype = "float32",
        device: str | None = None,
    ):
        if reader is not None:
            self.read = FunctionReader(reader)
        else:
            self.read = ModelReader(model, prompt, max_new_tokens, batch_size, dtype, device)

    def __call__(self, samples: Samples) -> Tensor:
        """Scores ``[N]`` in [0, 1].

        Raises:
            UserError: a sample has no text to show; or the reader returned something else than a text per picture.
        """
        images = images_of(samples, self.name)
        wanted = [
            wanted_text(prompt, f"reward '{self.name}': {describe_sample(samples, row)}")
            for row, prompt in enumerate(samples.prompts)
        ]
        scores = [text_score(read, text) for read, text in zip(self.read(images), wanted, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)
