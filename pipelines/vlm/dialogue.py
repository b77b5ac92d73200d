"""Rollouts in several turns: the model speaks, its environment answers with text and pictures, the cache goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmrl.dialogue import Environment, Observation, Situation, record, said
from mmrl.errors import UserError
from mmrl.types import Prompt, Rollout, Samples
from pipelines.vlm.decoding import Completions, Decoder, Sampling
from pipelines.vlm.inputs import Processed, Reader
from pipelines.vlm.media import Shelf
from pipelines.vlm.network import Network
from pipelines.vlm.prefix import begin, extend, joined_trace, select_rows
from pipelines.vlm.turns import Turns


@dataclass(eq=False)
class Row:
    """One dialogue.

    Attributes:
        head: the prompt.
        messages: the conversation as the chat template takes it.
        situation: what the environment sees.
        draw: where all its random numbers come from.
        position: of the next token.
        places: positions ``[1 or 3, t]`` of all tokens behind the prompt, as of the latest answer.
        parts: what followed the prompt, each with whether the model said it.
        logp, value: per turn of the model ``[t]``.
        truncated: cut by a limit of tokens or turns.
    """

    head: Processed
    messages: list[dict[str, Any]]
    situation: Situation
    draw: torch.Generator
    position: int
    places: Tensor | None = None
    parts: list[tuple[Processed, bool]] = field(default_factory=list)
    logp: list[Tensor] = field(default_factory=list)
    value: list[Tensor] = field(default_factory=list)
    truncated: bool = False

    @property
    def used(self) -> int:
        """Tokens behind the prompt."""
        return sum(len(part) for part, _ in self.parts)


class Dialogues:
    """Samples dialogues.

    Args:
        reader, network, decoder: of the policy.
        environment: answers the model.
        max_turns: of the model; one that wants more is cut.
        max_tokens: behind the prompt, the environment's included; None is what the context leaves.
        describe: see :class:`pipelines.vlm.turns.Turns`.
        share: equal prompts run once.
        value_head: of the policy, if it has one.

    Raises:
        UserError: the model's chat template does not write dialogues, or its processor takes no text without pictures.
    """

    def __init__(
        self,
        reader: Reader,
        network: Network,
        decoder: Decoder,
        environment: Environment,
        max_turns: int,
        max_tokens: int | None,
        describe: bool,
        share: bool,
        value_head: Callable[[Tensor], Tensor] | None,
    ):
        self.reader = reader
        self.network = network
        self.decoder = decoder
        self.environment = environment
        self.max_turns = max_turns
        self.max_tokens = max_tokens
        self.share = share
        self.value_head = value_head
        self.turns = Turns(reader, environment.schemas(), describe)
        try:
            reader.process("a", [], [], Shelf(Counter()), "tools", first=False)
        except UserError as error:
            name = type(reader.processor).__name__
            raise UserError(
                f"{name} takes no text without pictures, as tools answer, so they cannot be used"
            ) from error
        self.eos = set(decoder.eos.tolist())
        # Where the marks of calls are special tokens, leaving those out would leave out the calls.
        self.skip_special = "<tool_call>" not in self.turns.special

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        group_size: int,
        draws: Sequence[torch.Generator],
        sampling: Sampling,
        portion: int,
    ) -> Rollout:
        """Dialogues about prompts, ``portion`` of them at a time; all that one draws comes from its own generator."""
        shelf = Shelf(self.reader.counters)
        with shelf.in_processor(self.reader.processor), self.network.unchanged():
            rows = self._rows(prompts, group_size, draws, shelf)
            for first in range(0, len(rows), portion):
                self._run(rows[first : first + portion], sampling, shelf)
        trace, mask = joined_trace(self.reader, [row.head for row in rows], [row.parts for row in rows])
        group = torch.arange(len(prompts)).repeat_interleave(group_size)
        samples = Samples(
            [row.situation.prompt for row in rows],
            texts=[said(row.situation.transcript)[-1] for row in rows],
            truncated=torch.tensor([row.truncated for row in rows]),
            lengths=mask.sum(1),
            sizes=[row.head.sizes for row in rows],
            group=group,
            transcripts=[row.situation.transcript for row in rows],
        )
        mask = mask.to(self.network.device)
        value = None if self.value_head is None else _spread([row.value for row in rows], mask)
        return Rollout(samples, _spread([row.logp for row in rows], mask), mask, group, trace, value=value)

    def _rows(
        self, prompts: Sequence[Prompt], group_size: int, draws: Sequence[torch.Generator], shelf: Shelf
    ) -> list[Row]:
        read: dict[int, tuple[Any, ...]] = {}
        rows = []
        for number, prompt in enumerate(prompts):
            if id(prompt) not in read:
                name = prompt.id or prompt.text[:40]
                messages, pictures, clips = self.reader.conversation(prompt, shelf)
                text = self.reader.render(messages, True)
                read[id(prompt)] = (
                    messages,
                    pictures,
                    self.reader.process(text, pictures, clips, shelf, name, options=prompt.inputs),
                )
            messages, pictures, head = read[id(prompt)]
            for draw in draws[number * group_size : (number + 1) * group_size]:
                situation = Situation(prompt, list(pictures), list(head.sizes))
                rows.append(Row(head, list(messages), situation, draw, len(head) + head.delta))
        return rows

    def _run(self, live: list[Row], sampling: Sampling, shelf: Shelf) -> None:
        """Hold the dialogues of some rows to their ends."""
        state, cache, mask = begin(self.network, [row.head for row in live], self.share)
        for turn in range(1, self.max_turns + 1):
            limits = torch.tensor([min(sampling.max_new_tokens, self._left(row)) for row in live])
            found = self.decoder(
                state,
                cache,
                mask,
                torch.tensor([row.position for row in live]),
                len(live[0].head.positions),
                torch.stack([torch.rand(sampling.max_new_tokens, generator=row.draw) for row in live]),
                sampling,
                self.value_head,
                limits,
                keep_cache=turn < self.max_turns,
            )
            going = [k for k, row in enumerate(live) if self._hear(row, found, k, turn, shelf)]
            if not going:
                return
            live = [live[k] for k in going]
            state, cache, mask = self._tell(live, found.cache, found.mask, torch.tensor(going))

    def _left(self, row: Row) -> int:
        """Tokens that a dialogue may still have."""
        context = self.network.context
        limits = [] if self.max_tokens is None else [self.max_tokens]
        limits += [] if context is None else [context - len(row.head)]
        return min(limits) - row.used if limits else 1 << 30

    def _hear(self, row: Row, found: Completions, k: int, turn: int, shelf: Shelf) -> bool:
        """Write down the model's turn and the answer to it; whether the dialogue goes on."""
        ids = found.tokens[k, : int(found.lengths[k])]
        row.parts.append((_spoken(ids), True))
        row.logp.append(found.logp[k, : len(ids)])
        if found.value is not None:
            row.value.append(found.value[k, : len(ids)])
        row.position += len(ids)
        last = int(ids[-1])
        ended = last in self.eos
        text = self.reader.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=self.skip_special)
        row.situation.transcript.append({"role": "assistant", "text": text})
        self.reader.counters["turns"] += 1
        if found.truncated[k]:
            row.truncated = True
            return False
        answer = self.environment.step(text, row.situation)
        if answer is None:
            return False
        end = self.reader.tokenizer.convert_ids_to_tokens(last) if ended else ""
        if turn < self.max_turns:
            answer, message, told = self._told(row, answer, end, shelf)
            if len(told) < self._left(row):
                self._take(row, text, answer, message, told)
                return True
        row.truncated = True
        return False

    def _told(self, row: Row, answer: Observation, end: str, shelf: Shelf) -> tuple[Observation, Any, Processed]:
        """The answer as tokens; a picture that the model's processor refuses becomes an error."""
        name = row.situation.row
        pictures = [shelf.picture(image, name) for image in answer.images]
        message = self.turns.observation(answer.text, len(pictures))
        try:
            text = self.turns.between(row.messages, message, end)
            told = self.reader.process(text, pictures, [], shelf, name, first=False)
        except UserError as error:
            if not pictures:
                raise
            sentence = "error: the picture cannot be shown: " + str(error).rpartition(": ")[2]
            return self._told(row, Observation(sentence, errors=answer.errors + 1), end, shelf)
        return replace(answer, images=pictures), message, told

    def _take(self, row: Row, text: str, answer: Observation, message: Any, told: Processed) -> None:
        """Make the environment's answer part of a dialogue."""
        spoken = {"role": "assistant", "content": [{"type": "text", "text": text}]}
        row.messages += [spoken, message]
        row.situation.transcript.append(dict(record(answer)))
        row.situation.pictures += answer.images
        row.situation.sizes += told.sizes
        row.parts.append((told, False))
        self.reader.counters["tool_calls"] += len(answer.calls)
        self.reader.counters["tool_errors"] += answer.errors
        row.places = self._positions(row)
        row.position = int(row.places[:, -len(told) :].max()) + 1

    def _positions(self, row: Row) -> Tensor:
        parts = [part for part, _ in row.parts]
        ids, types = torch.cat([part.ids for part in parts]), torch.cat([part.types for part in parts])
        return self.reader.positions_after(row.head, ids, types, [one for part in parts for one in part.media])

    def _tell(self, rows: Sequence[Row], cache: Any, mask: Tensor, kept: Tensor) -> tuple[Tensor, Any, Tensor]:
        """Run the answers behind the caches of the rows ``kept`` of them."""
        if not _plain(cache, mask.shape[1]):
            return begin(self.network, [self._whole(row) for row in rows], False)
        kept = kept.to(mask.device)
        select_rows(cache, kept)
        mask = mask[kept]
        there = mask.bool().any(0)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys[:, :, there], layer.values[:, :, there]
        ids, positions, types = [], [], []
        for row in rows:
            # The last token that the model drew has not run yet.
            drawn, told = row.parts[-2][0].ids[-1:], row.parts[-1][0]
            ids.append(torch.cat([drawn, told.ids]))
            positions.append(row.places[:, -len(told) - 1 :])
            types.append(torch.cat([torch.zeros_like(drawn), told.types]))
        media = [one for row in rows for one in row.parts[-1][0].media]
        return extend(self.network, cache, mask[:, there], ids, positions, media, types)

    def _whole(self, row: Row) -> Processed:
        """A dialogue so far as one prompt, for models whose caches cannot go on by pictures."""
        parts = [row.head, *(part for part, _ in row.parts)]
        ids = torch.cat([part.ids for part in parts])
        types = {
            key: torch.cat([row.head.token_types[key], *(part.types for part in parts[1:])])
            for key in row.head.token_types
        }
        positions = torch.cat([row.head.positions, row.places], 1)
        media = [one for part in parts for one in part.media]
        return Processed(ids, types, media, positions, row.position - len(ids))


def _plain(cache: Any, length: int) -> bool:
    """Whether every layer of a cache holds all ``length`` tokens and nothing else."""
    from transformers.cache_utils import DynamicLayer

    return all(type(layer) is DynamicLayer and layer.keys.shape[-2] == length for layer in cache.layers)


def _spoken(ids: Tensor) -> Processed:
    return Processed(ids, {}, [], torch.zeros(1, len(ids), dtype=torch.long), 0)


def _spread(turns: Sequence[Sequence[Tensor]], mask: Tensor) -> Tensor:
    """What was recorded at the model's tokens, in order, as ``[N, T]``; 0 elsewhere."""
    values = torch.cat([turn for row in turns for turn in row])
    return torch.zeros(mask.shape, device=mask.device, dtype=values.dtype).masked_scatter(mask, values)
