"""Render and compare: the code in an answer is run, and the picture that it draws compared with the true one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from mmrl.errors import UserError
from mmrl.registry import load_object
from mmrl.types import Prompt, Samples
from rewards.parsing import MOST, answer_of, code_of
from rewards.render_likeness import beyond_blank, nearness, ssim
from rewards.sandbox import Language, Limits, Sandbox
from rewards.text import Row

if TYPE_CHECKING:
    from PIL.Image import Image

Count = Annotated[int, Field(gt=0)]

BLOCKS = {
    "svg": ("svg", "xml", "html", ""),
    "matplotlib": ("python", "py", "python3", ""),
    "tikz": ("latex", "tex", "tikz", ""),
}
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MEASURES: dict[str, Callable[[Tensor, Tensor], float]] = {"ssim": ssim, "pixels": nearness}


def drawing_code(answer: str, language: Language) -> str | None:
    """The code in an answer: its last fenced block of the language, or the whole; None if there is none."""
    code = code_of(answer, BLOCKS[language])
    code = (answer if code is None else code)[-MOST:]
    if language == "svg":
        start, end = code.find("<svg"), code.rfind("</svg>")
        return code[start : end + len("</svg>")] if 0 <= start < end else None
    if language == "tikz" and "\\documentclass" not in code:
        start, end = code.find("\\begin{tikzpicture}"), code.rfind("\\end{tikzpicture}")
        if not 0 <= start < end:
            return None
        body = code[start : end + len("\\end{tikzpicture}")]
        return f"\\documentclass{{standalone}}\\usepackage{{tikz}}\\begin{{document}}{body}\\end{{document}}"
    return code if code.strip() else None


class Render:
    """Likeness, in [0, 1], of the picture that an answer's code draws to the true picture; 0 for code that draws none.

    The code runs in a process of its own with little time, memory and rights; see ``docs/text-rewards.md`` for what
    is guaranteed where.

    Args:
        language: "svg" (drawn by resvg), "matplotlib" (Python), or "tikz", which needs pdflatex and pdftoppm.
        similarity: "ssim" (structural similarity), "pixels" (1 minus the root mean square difference), or your own
            ``module:function`` or ``file.py:function`` from two pictures ``[3, H, W]`` in [0, 1], the drawn one first,
            to a number. The drawn picture is resized to the size of the true one.
        blank_is_zero: move the first two so that an empty page of the true picture's commonest colour gets 0.
        max_side: the true picture is compared at a size of at most so many pixels a side.
        picture: which of the prompt's pictures is the truth, from 0, in rows without a ``target``.
        seconds, memory_mb, file_mb: what one drawing may use.
        workers: drawings at a time.
        confine: "required" refuses to run where the kernel cannot confine the process; "auto" does what it can.
        tag: the code stands in ``<tag>``; without such a tag, in the whole text after ``</think>``. Of fenced blocks,
            the last counts.
        column: of the data with the truth instead of ``target``: a picture (file, PIL or tensor), or code that draws
            it.
    """

    name = "render"
    differentiable = False
    partial = False

    def __init__(
        self,
        language: Language,
        similarity: str = "ssim",
        blank_is_zero: bool = True,
        max_side: Count = 256,
        picture: int = 0,
        seconds: Count = 10,
        memory_mb: Count = 2048,
        file_mb: Count = 16,
        workers: Count = 2,
        confine: Literal["auto", "required"] = "auto",
        tag: str = "answer",
        column: str = "",
    ):
        if similarity not in MEASURES and ":" not in similarity:
            raise UserError(
                f"reward 'render': similarity is {similarity!r}, but should be {', '.join(MEASURES)} or "
                "'module:function'"
            )
        self.own = None if similarity in MEASURES else load_object(similarity)
        self.measure = MEASURES.get(similarity)
        self.blank_is_zero, self.max_side, self.picture = blank_is_zero, max_side, picture
        self.language: Language = language
        self.sandbox = Sandbox(language, Limits(seconds, memory_mb, file_mb, workers, confine))
        self.tag, self.column = tag, column

    def __call__(self, samples: Samples) -> list[float | None]:
        """Scores ``[N]``, None where the reward does not apply.

        Raises:
            UserError: the samples are not texts, or the true picture of a row is missing or broken.
        """
        if samples.texts is None:
            raise UserError(f"reward '{self.name}' scores texts, but the samples have none")
        rows = [Row(samples, number, self.name, self.column) for number in range(len(samples))]
        truths: dict[int, Tensor] = {}
        for row in rows:
            if id(row.prompt) not in truths:
                truths[id(row.prompt)] = self._truth(row)
        answers = [answer_of(row.text, self.tag) for row in rows]
        codes = [None if answer is None else drawing_code(answer, self.language) for answer in answers]
        # Equal answers are drawn once.
        different = list(dict.fromkeys(codes))
        drawn = dict(zip(different, self.sandbox.draw(different, 2 * self.max_side), strict=True))
        return [self._likeness(drawn[code], truths[id(row.prompt)]) for row, code in zip(rows, codes, strict=True)]

    def _likeness(self, picture: Image | None, truth: Tensor) -> float:
        if picture is None:
            return 0.0
        found = _tensor(picture)
        found = F.interpolate(found[None], truth.shape[-2:], mode="bilinear", antialias=True)[0].clamp(0, 1)
        if self.own is not None:
            return float(self.own(found, truth))
        if self.blank_is_zero:
            return beyond_blank(self.measure, found, truth)
        return max(self.measure(found, truth), 0.0)

    def _truth(self, row: Row) -> Tensor:
        value = row.prompt.metadata.get(self.column) if self.column else row.prompt.target
        if value is None and not self.column:
            value = _picture_of(row.prompt, self.picture)
        if value is None:
            value = row.truth()
        return self._smaller(self._open(row, value))

    def _open(self, row: Row, value: Any) -> Tensor:
        from mmrl.media import open_picture

        if isinstance(value, str) and not value.lower().endswith(PICTURES):
            code = drawing_code(value, self.language)
            (picture,) = self.sandbox.draw([code], 2 * self.max_side)
            if picture is None:
                raise row.bad_truth(value, f"a picture, or {self.language} code that draws one")
            return _tensor(picture)
        if isinstance(value, Tensor):
            return value.float().clamp(0, 1)
        if not isinstance(value, (str, Path, Mapping)) and not hasattr(value, "__array_interface__"):
            raise row.bad_truth(value, f"a picture, or {self.language} code that draws one")
        try:
            return _tensor(open_picture(value))
        except UserError as error:
            raise row.refuse(f"has a true picture that cannot be read: {error}") from error

    def _smaller(self, picture: Tensor) -> Tensor:
        longest = max(picture.shape[-2:])
        if longest <= self.max_side:
            return picture
        size = [max(1, round(side * self.max_side / longest)) for side in picture.shape[-2:]]
        return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0].clamp(0, 1)


def _picture_of(prompt: Prompt, number: int) -> Any:
    return prompt.images[number] if -len(prompt.images) <= number < len(prompt.images) else None


def _tensor(picture: Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255
