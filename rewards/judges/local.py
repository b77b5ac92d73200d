"""A frozen vision-language model of transformers, asked about cases: next-token scores, likelihoods and answers."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mmrl.errors import UserError
from rewards.encoders import Dtype
from rewards.judges.sharing import CannotShareError, SharedPictures, can_share, consumed_keys, place
from rewards.judges.subjects import Case, Picture
from rewards.weights import find_model, first_line

log = logging.getLogger(__name__)

# Their prompt attends to what follows it within the prompt, so that the answer's place must be marked.
_PREFIX_MODELS = ("paligemma",)


class LocalVLM:
    """A frozen model with its processor; equal cases are looked at once, and nothing keeps a gradient.

    Args:
        model: a repository on the hub, a folder, or ``builtin:NAME``.
        dtype: of the network; scores are float32 in any case.
        device: default, that of the first pictures it judges.

    Attributes:
        counters: ``cases`` asked about and ``cases_run`` of them that were not answered by an equal one in the same
            call; ``images_processed`` and ``images_encoded``.

    Raises:
        UserError: not found, or not a model of pictures and texts.
    """

    def __init__(self, model: str, dtype: Dtype = "float32", device: str | None = None):
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            network = AutoModelForImageTextToText.from_pretrained(model, dtype=getattr(torch, dtype))
            self.processor = AutoProcessor.from_pretrained(model)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(
                f"judge '{model}' could not be loaded by transformers as a model of pictures and texts: "
                f"{first_line(error)}"
            ) from error
        if getattr(self.processor, "tokenizer", None) is None:
            raise UserError(f"judge '{model}': its processor is a {type(self.processor).__name__} without a tokenizer")
        if network.config.is_encoder_decoder:
            raise UserError(f"judge '{model}' is a {type(network).__name__}, which is not one that chats")
        self.name = model
        self.model = network.eval().requires_grad_(False)
        self.device = None if device is None else torch.device(device)
        self.tokenizer = self.processor.tokenizer
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        marks = {*self.tokenizer.all_special_tokens}
        marks |= {getattr(self.processor, name, None) or "" for name in ("image_token", "video_token")}
        marks |= {str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        # The longest first, where one begins with another; "(?!)" matches nothing.
        marks_found = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True) if mark)
        self._marks = re.compile(marks_found or "(?!)")
        # By the pictures in a case, as some families treat one and several differently: whether sharing is exact.
        self._exact: dict[int, bool] = {}
        self._can_share, self._told = can_share(self.model, self.processor), False
        self.counters = {"cases": 0, "cases_run": 0, "images_processed": 0, "images_encoded": 0}

    def place(self, device: torch.device | None) -> None:
        """Move to ``device`` unless one was given at the start; None is CUDA where there is one."""
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model.to(self.device or device)

    def next_scores(self, cases: Sequence[Case], ids: Sequence[int], batch_size: int, system: str = "") -> Tensor:
        """Logits ``[N, len(ids)]``, float32 on the CPU, of these tokens as the first of the answer."""

        def run(part: Sequence[Case], shared: SharedPictures | None) -> Tensor:
            inputs = self._inputs(part, system, "right", shared)
            last = inputs["attention_mask"].sum(1) - 1
            logits = self._logits(inputs, last[:, None])[:, 0]
            return logits[:, torch.tensor(ids, device=logits.device)].float().cpu()

        return torch.stack(self._each(cases, batch_size, run)) if cases else torch.zeros(0, len(ids))

    def answer_nll(self, cases: Sequence[tuple[Case, str]], batch_size: int, system: str = "") -> Tensor:
        """Mean negative log-likelihood ``[N]`` of the tokens of each case's answer, float32 on the CPU.

        Raises:
            UserError: an answer without tokens; or a model whose prompt is no causal prefix.
        """
        if self.model.config.model_type in _PREFIX_MODELS:
            raise UserError(f"judge '{self.name}' is a {self.model.config.model_type}, which gives no such likelihood")

        def run(part: Sequence[tuple[Case, str]], shared: SharedPictures | None) -> Tensor:
            inputs = self._inputs([case for case, _ in part], system, "right", shared)
            answers = [self._answer_ids(answer) for _, answer in part]
            inputs, places, wanted = append_tokens(inputs, answers, self.tokenizer.pad_token_id)
            logits = self._logits(inputs, places).float()
            wanted = wanted.to(logits.device)
            nll = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none", ignore_index=-100)
            return (nll.view_as(wanted).sum(1) / (wanted >= 0).sum(1)).cpu()

        return torch.stack(self._each(cases, batch_size, run)) if cases else torch.zeros(0)

    def write(
        self,
        cases: Sequence[Case],
        batch_size: int,
        max_new_tokens: int,
        system: str = "",
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[str]:
        """What the model answers: greedy, or sampled at ``temperature`` with a seed per case.

        A seed's answer does not depend on the other cases, but for rounding.
        """
        from transformers import LogitsProcessorList

        seeds = [0] * len(cases) if seeds is None else seeds

        def run(part: Sequence[tuple[Case, int]], shared: SharedPictures | None) -> list[str]:
            inputs = self._inputs([case for case, _ in part], system, "left", shared)
            options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens}
            if temperature > 0:
                noise = GumbelNoise([seed for _, seed in part], temperature)
                options["logits_processor"] = LogitsProcessorList([noise])
            with _greedy_defaults(self.model):
                tokens = self.model.generate(**inputs, **options, **self._ends())
            return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

        return self._each(list(zip(cases, seeds, strict=True)), batch_size, run)

    def says_nothing(self, text: str) -> bool:
        """Whether a text is blank but for the model's own marks."""
        return not self._plain(text).strip()

    def word_tokens(self, words: Sequence[str]) -> list[int]:
        """The tokens of those words that are one token; where none is, the first token of each."""
        vocabulary = self.tokenizer.get_vocab()
        whole, first = set(), set()
        for word in words:
            ids = self.tokenizer.encode(word, add_special_tokens=False)
            whole |= {vocabulary[word]} if word in vocabulary else set(ids if len(ids) == 1 else ())
            first |= set(ids[:1])
        return sorted(whole or first)

    @torch.no_grad()
    def _each(
        self,
        items: Sequence[Any],
        batch_size: int,
        run: Callable[[Sequence[Any], SharedPictures | None], Sequence[Any]],
    ) -> list[Any]:
        """``run`` over batches of the distinct items; its results in the order of ``items``."""
        distinct = list(dict.fromkeys(items))
        self.counters["cases"] += len(items)
        self.counters["cases_run"] += len(distinct)
        found: dict[Any, Any] = {}
        without = [item for item in distinct if not _pictures(item)]
        shown = [item for item in distinct if _pictures(item)]
        shared = self._shared(shown, batch_size)
        # Cases with pictures apart from those without: processors want none or all, and lengths differ less.
        for some, pictures in ((without, None), (shown, shared)):
            for start in range(0, len(some), batch_size):
                part = some[start : start + batch_size]
                found.update(zip(part, run(part, pictures), strict=True))
        return [found[item] for item in items]

    def _shared(self, items: Sequence[Any], batch_size: int) -> SharedPictures | None:
        """The encoded pictures of these items, if some are in several and the family allows it."""
        pictures = [picture for item in items for picture in _pictures(item)]
        distinct = list(dict.fromkeys(pictures))
        if not self._can_share or len(distinct) == len(pictures):
            return None
        examples = {len(_pictures(item)): _case(item) for item in items}
        try:
            shared = SharedPictures(self.model, self.processor, distinct, batch_size)
            for count in examples.keys() - self._exact.keys():
                self._exact[count] = self._same(examples[count], shared)
        except CannotShareError:
            self._can_share = False
        if not self._can_share or not all(self._exact[count] for count in examples):
            if not self._told:
                self._told = True
                kind = self.model.config.model_type
                log.warning("judge '%s': pictures of a %s are encoded once per question", self.name, kind)
            return None
        self._count_pictures(len(distinct))
        return shared

    def _same(self, case: Case, shared: SharedPictures) -> bool:
        """Whether a case scores the same with encoded pictures as from the start."""
        plain, quick = self._inputs([case], "", "right"), self._inputs([case], "", "right", shared)
        left = set(plain) - set(quick) - set(consumed_keys(self.model))
        if left or not torch.equal(plain["input_ids"], quick["input_ids"]):
            return False
        one, other = (self._logits(inputs, inputs["attention_mask"].sum(1)[:, None] - 1) for inputs in (plain, quick))
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 0.05
        return torch.allclose(one.float(), other.float(), atol=tolerance * max(1.0, one.abs().max().item()))

    def _count_pictures(self, count: int) -> None:
        self.counters["images_processed"] += count
        self.counters["images_encoded"] += count

    def _inputs(
        self, cases: Sequence[Case], system: str, side: str, shared: SharedPictures | None = None
    ) -> dict[str, Any]:
        """Padded inputs of the model for questions that an assistant is about to answer."""
        pictures = [[part for part in case if isinstance(part, Picture)] for case in cases]
        turns = [self._turns(case, system) for case in cases]
        if shared is not None:
            texts = self.processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            return shared.inputs(texts, pictures, side)
        self._count_pictures(sum(map(len, pictures)))
        padding = {"padding": True, "padding_side": side}
        if getattr(self.processor, "chat_template", None) is None:
            texts = ["".join(self._plain(part) for part in case if isinstance(part, str)) for case in cases]
            texts = [f"{system}\n{text}" if system else text for text in texts]
            images = [[picture.image for picture in row] for row in pictures] if any(pictures) else None
            inputs = self.processor(images=images, text=texts, return_tensors="pt", **padding)
        else:
            inputs = self.processor.apply_chat_template(
                turns,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                processor_kwargs=padding,
            )
        # Labels, which some processors make, would only be turned into a loss.
        wanted = {key: value for key, value in inputs.items() if isinstance(value, Tensor) and key != "labels"}
        return {key: place(value, self.model) for key, value in wanted.items()}

    def _turns(self, case: Case, system: str) -> list[dict[str, Any]]:
        content = [
            {"type": "text", "text": self._plain(part)}
            if isinstance(part, str)
            else {"type": "image", "image": part.image}
            for part in case
        ]
        turns = [{"role": "user", "content": content}]
        return [{"role": "system", "content": [{"type": "text", "text": system}]}, *turns] if system else turns

    def _plain(self, text: str) -> str:
        # A completion must not be able to end the judge's question, answer in its place or stand for a picture.
        return self._marks.sub(" ", text)

    def _answer_ids(self, answer: str) -> list[int]:
        ids = self.tokenizer.encode(self._plain(answer), add_special_tokens=False)
        if not ids:
            raise UserError(f"judge '{self.name}' was given an answer without tokens: {answer!r}")
        return ids

    def _logits(self, inputs: Mapping[str, Any], places: Tensor) -> Tensor:
        """Logits ``[N, P, V]`` at ``places [N, P]``, computed at these positions alone where the model can do so."""
        kept, rows = places.unique(return_inverse=True)
        options: dict[str, Any] = {"use_cache": False}
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            options["logits_to_keep"] = kept
        else:
            rows = places
        logits = self.model(**inputs, **options).logits
        return logits.gather(1, rows.to(logits.device)[..., None].expand(-1, -1, logits.shape[-1]))

    def _ends(self) -> dict[str, Any]:
        config = self.model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        return {"eos_token_id": ends, "pad_token_id": self.tokenizer.pad_token_id}


def append_tokens(
    inputs: Mapping[str, Any], answers: Sequence[Sequence[int]], padding: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Put tokens behind the real ones of each right-padded row.

    Returns:
        The inputs; ``[N, A]`` positions whose logits predict the answer's tokens; ``[N, A]`` these tokens, -100 behind
        the end of an answer.
    """
    ids = inputs["input_ids"]
    lengths = inputs["attention_mask"].sum(1).tolist()
    longest = max(map(len, answers))
    wanted = torch.full((len(ids), longest), -100)
    places = torch.zeros(len(ids), longest, dtype=torch.long)
    out = dict(inputs)
    for key, value in inputs.items():
        # Types of tokens are 0 for text in every family.
        if isinstance(value, Tensor) and value.shape == ids.shape:
            fill = value.new_full((len(ids), longest), padding if key == "input_ids" else 0)
            out[key] = torch.cat([value, fill], 1)
    for row, (start, answer) in enumerate(zip(lengths, answers, strict=True)):
        end = start + len(answer)
        wanted[row, : len(answer)] = torch.tensor(answer)
        places[row] = torch.arange(start - 1, start - 1 + longest).clamp(max=end - 2)
        for key, value in out.items():
            if isinstance(value, Tensor) and value.shape == out["input_ids"].shape:
                value[row, start:end] = {"attention_mask": 1}.get(key, 0)
        out["input_ids"][row, start:end] = torch.tensor(answer, device=ids.device)
        out["input_ids"][row, end:] = padding
    return out, places.to(ids.device), wanted


class GumbelNoise:
    """Turns greedy search into sampling: ``argmax(logits / temperature + Gumbel noise)`` follows the softmax.

    Each row has its own generator, so that what it writes does not depend on its neighbours.
    """

    def __init__(self, seeds: Sequence[int], temperature: float):
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Noisy scores ``[N, V]``."""
        uniform = torch.stack([torch.rand(scores.shape[1], generator=rng) for rng in self.generators])
        noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1 - 1e-7)))
        return scores.float() / self.temperature + noise.to(scores.device)


@contextmanager
def _greedy_defaults(model: Any) -> Iterator[None]:
    """Without the sampling settings that a model ships with, about which greedy search would warn at every call."""
    config = model.generation_config
    kept = {key: getattr(config, key, None) for key in ("temperature", "top_p", "top_k")}
    for key in kept:
        setattr(config, key, None)
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(config, key, value)


def _case(item: Any) -> Case:
    """A case by itself, or of a case with something."""
    return item[0] if item and isinstance(item[0], tuple) else item


def _pictures(item: Any) -> list[Picture]:
    return [part for part in _case(item) if isinstance(part, Picture)]


_loaded: weakref.WeakValueDictionary[tuple, LocalVLM] = weakref.WeakValueDictionary()


def load_vlm(model: str, dtype: Dtype = "float32", device: str | None = None) -> LocalVLM:
    """The judge; rewards that ask for the same one share it."""
    key = (find_model(model), dtype, device)
    found = _loaded.get(key)
    if found is None:
        found = _loaded[key] = LocalVLM(*key)
    return found
