"""The model behind one interface for all families: features of pictures, hidden states, the head."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipelines.vlm.inputs import TOKEN_TYPES, Processed, join_tensors
from pipelines.vlm.media import Media, moved

if TYPE_CHECKING:
    from pipelines.vlm.prefix import Trace


class Network:
    """A transformers model for images, text and, where it has them, videos.

    Args:
        model: of the class that ``AutoModelForImageTextToText`` gives.
        counters: ``images_encoded``, ``prefill_rows`` and ``forward_tokens`` count up here.

    Attributes:
        keep_features: whether features of pictures stay with them, because nothing that makes them trains.
    """

    def __init__(self, model: Any, counters: Counter):
        self.model = model
        self.counters = counters
        self.keep_features = False
        self._held: list[Media] | None = None
        self.head = model.get_output_embeddings()
        self.accepted = frozenset(inspect.signature(model.forward).parameters)
        text = model.config.get_text_config()
        self.softcap: float | None = getattr(text, "final_logit_softcapping", None)
        self.context: int | None = getattr(text, "max_position_embeddings", None)
        self.encodes_apart = "mm_encoder_outputs" in self.accepted and self._encoder("image") is not None
        self.text_model = _text_model(model)
        self.open_masks = _sees_everything(text)
        self.text_type = {key: _type_of_next_token(model, key) for key in TOKEN_TYPES}

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return self.model.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and pictures."""
        return self.model.get_input_embeddings().weight.dtype

    @property
    def vocabulary(self) -> int:
        """Logits per token."""
        return self.head.weight.shape[0]

    def needs_full_run(self, trace: Trace) -> bool:
        """Whether pictures that come after the prompt are seen in both directions, which a cache cannot give."""
        return any(trace.media) and any("token_type_ids" in prompt.token_types for prompt in trace.prompts)

    def features(self, media: Media) -> dict[str, Any]:
        """Per modality what the vision tower and projector make of processed pictures."""
        if media.features is not None:
            return media.features
        given = {key: moved(value, self.device, self.dtype) for key, value in media.tensors.items()}
        found = {}
        # Some processors write the frames of clips among the pictures.
        for kind, there in (("image", "pixel_values" in given), ("video", "pixel_values_videos" in given)):
            if there:
                encode = self._encoder(kind)
                names = inspect.signature(encode).parameters
                found[kind] = _kept(encode(**{k: v for k, v in given.items() if k in names}, return_dict=True))
        if media.clips_as_pictures and "video" in found:
            found = {"image": found["video"]}
        self.counters["images_encoded"] += media.images
        self.counters["videos_encoded"] += media.videos
        self._keep(media, found)
        return found

    def _keep(self, media: Media, found: dict[str, Any]) -> None:
        if self.keep_features:
            media.features = found
            # The pixels are not needed again, and hold more memory than what was made of them.
            media.tensors = {key: value for key, value in media.tensors.items() if not key.startswith("pixel_values")}
        elif self._held is not None:
            media.features = found
            self._held.append(media)

    @contextlib.contextmanager
    def unchanged(self) -> Iterator[None]:
        """Inside, no weight changes and no gradient is wanted, so that every picture is encoded once."""
        self._held = []
        try:
            yield
        finally:
            for media in self._held:
                media.features = None
            self._held = None

    def media_inputs(self, media: Sequence[Media]) -> dict[str, Any]:
        """The forward's arguments for pictures in the order of their place holders."""
        if not media:
            return {}
        if self.encodes_apart:
            distinct = list({id(one): one for one in media}.values())
            once = self._encoded_together(distinct)
            once |= {id(one): self.features(one) for one in distinct if id(one) not in once}
            parts = [once[id(one)] for one in media]
            kinds = dict.fromkeys(kind for part in parts for kind in part)
            joined = {kind: _join_outputs([part[kind] for part in parts if kind in part]) for kind in kinds}
            return {"mm_encoder_outputs": joined}
        for one in media:
            self.counters["images_encoded"] += one.images
        joined = join_tensors([one.tensors for one in media])
        return {key: moved(value, self.device, self.dtype) for key, value in joined.items() if key in self.accepted}

    def _encoded_together(self, media: Sequence[Media]) -> dict[int, dict[str, Any]]:
        """Features by ``id`` of those pictures that the vision tower takes as one flat list of patches, in one call.

        Only of families whose features are one tensor a picture and nothing else, as those of Qwen2-VL and Qwen2.5-VL.
        """
        new = [one for one in media if one.features is None and set(one.tensors) == {"pixel_values", "image_grid_thw"}]
        if len(new) < 2 or self.model.config.model_type not in ("qwen2_vl", "qwen2_5_vl"):
            return {}
        joined = {
            key: moved(torch.cat([one.tensors[key] for one in new]), self.device, self.dtype) for key in new[0].tensors
        }
        output = _kept(self._encoder("image")(**joined, return_dict=True))
        found, begin = {}, 0
        for one in new:
            part = type(output)(pooler_output=tuple(output.pooler_output[begin : begin + one.images]))
            begin += one.images
            found[id(one)] = {"image": part}
            self.counters["images_encoded"] += one.images
            self._keep(one, found[id(one)])
        return found

    def prefill(self, prompts: Sequence[Processed]) -> tuple[Tensor, Any, Tensor]:
        """Run prompts once, padded on the left.

        Returns:
            hidden state ``[B, H]`` of each last token, the cache, and the attention mask ``[B, P]``.
        """
        inputs = self.padded(prompts)
        self.counters["prefill_rows"] += len(prompts)
        hidden, cache = self.hidden(**inputs, **self.media_inputs(_all_media(prompts)), use_cache=True)
        return hidden[:, -1], cache, inputs["attention_mask"]

    def padded(self, prompts: Sequence[Processed]) -> dict[str, Tensor]:
        """Ids, mask, positions and token types of prompts, padded on the left to the longest."""
        longest = max(len(prompt) for prompt in prompts)

        def pad(rows: Sequence[Tensor], value: int = 0) -> Tensor:
            out = rows[0].new_full((len(rows), *rows[0].shape[:-1], longest), value)
            for target, row in zip(out, rows, strict=True):
                target[..., longest - row.shape[-1] :] = row
            return out.to(self.device)

        types = dict.fromkeys(key for prompt in prompts for key in prompt.token_types)
        filler = int(prompts[0].ids[-1])
        out = {
            "input_ids": pad([prompt.ids for prompt in prompts], filler),
            "attention_mask": pad([torch.ones_like(prompt.ids) for prompt in prompts]),
            "position_ids": position_ids(pad([prompt.positions for prompt in prompts])),
        }
        for key in types:
            out[key] = pad([prompt.token_types.get(key, torch.zeros_like(prompt.ids)) for prompt in prompts])
        return out

    def hidden(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Last hidden states ``[B, S, H]``, as the head takes them, and the cache.

        The head itself is not run: its input is taken where it enters, which works for every family.
        """
        self.counters["forward_tokens"] += inputs["input_ids"].numel()
        inputs.setdefault("use_cache", False)
        with _before(self.head) as taken:
            output = self.model(**{key: value for key, value in inputs.items() if key in self.accepted})
        return taken[0], output.past_key_values if inputs["use_cache"] else None

    def step(self, tokens: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> tuple[Tensor, Any]:
        """One more token of each row, ``[N]`` at positions ``[N, axes]``: states ``[N, H]`` and the cache.

        ``mask`` (bool ``[N, S + 1]``, None where all is there) says which tokens count. Where the family allows, the
        text model runs alone and gets the mask as attention takes it: for small models the rest is half of a step.
        """
        places = position_ids(positions[:, :, None])
        if mask is None and not self.open_masks:
            mask = torch.ones(len(tokens), cache.get_seq_length() + 1, dtype=torch.bool, device=tokens.device)
        if mask is not None and self.open_masks:
            mask = mask[:, None, None]
        given = {"attention_mask": mask, "position_ids": places, "past_key_values": cache, "use_cache": True}
        if self.text_model is None:
            hidden, cache = self.hidden(input_ids=tokens[:, None], **given)
            return hidden[:, -1], cache
        self.counters["forward_tokens"] += len(tokens)
        embedded = self.model.get_input_embeddings()(tokens[:, None])
        output = self.text_model(inputs_embeds=embedded, **given)
        return output.last_hidden_state[:, -1], output.past_key_values

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits ``[..., V]`` of hidden states ``[..., H]``."""
        logits = self.head(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _encoder(self, kind: str) -> Any:
        return getattr(self.model.base_model, f"get_{kind}_features", None)


def position_ids(positions: Tensor) -> Tensor:
    """Positions ``[N, 1 or 3, S]`` as the forward takes them: ``[N, S]`` or ``[3, N, S]``."""
    return positions[:, 0] if positions.shape[1] == 1 else positions.transpose(0, 1)


def _all_media(prompts: Sequence[Processed]) -> list[Media]:
    return [media for prompt in prompts for media in prompt.media]


@contextlib.contextmanager
def _before(head: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what enters the head, and lets it see an empty sequence, so that it costs nothing."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        taken.append(args[0])
        return (args[0][:, :0],)

    handle = head.register_forward_pre_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


def _kept(output: Any) -> Any:
    """What forwards read of encoded pictures; the rest would only hold memory."""
    names = ("pooler_output", "deepstack_features")
    if getattr(output, "pooler_output", None) is None:
        names = ("last_hidden_state",)
    return type(output)(**{name: output[name] for name in names if getattr(output, name, None) is not None})


def _join_outputs(outputs: Sequence[Any]) -> Any:
    """Encoded pictures of several prompts as those of one batch, in order."""
    if len(outputs) == 1:
        # The forward may write into what it gets.
        return type(outputs[0])(**dict(outputs[0]))
    joined = {}
    for name in outputs[0]:
        values = [output[name] for output in outputs]
        if name == "deepstack_features":
            joined[name] = [_join_features(layer) for layer in zip(*values, strict=True)]
        else:
            joined[name] = _join_features(values)
    return type(outputs[0])(**joined)


def _join_features(values: Sequence[Any]) -> Any:
    if not isinstance(values[0], Tensor):
        return [item for value in values for item in value]
    if len({value.shape[1:] for value in values}) == 1:
        return torch.cat(list(values))
    # Place holders are filled in order, so that only the order of the tokens counts.
    return torch.cat([value.reshape(-1, value.shape[-1]) for value in values])[None]


def _text_model(model: Any) -> Any:
    """The part that turns embeddings into hidden states, where it can be told."""
    found = [getattr(model.base_model, name, None) for name in ("language_model", "text_model")]
    found = [part for part in found if part is not None]
    return found[0] if found and found[0].get_output_embeddings() is None else None


def _sees_everything(config: Any) -> bool:
    """Whether every layer attends to all tokens by the attention of torch, so that a mask is the same for all."""
    kinds = set(getattr(config, "layer_types", None) or ())
    limits = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    whole = kinds == {"full_attention"} or (not kinds and limits == [None, None])
    return whole and config._attn_implementation == "sdpa"


def _type_of_next_token(model: Any, key: str) -> int:
    """The token type that the model's own generation gives to new text."""
    from transformers.utils import ModelOutput

    known = {key: torch.zeros(1, 1, dtype=torch.long)}
    return int(model._update_model_kwargs_for_generation(ModelOutput(), known, False)[key][0, -1])
