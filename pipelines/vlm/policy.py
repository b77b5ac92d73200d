"""RL on vision-language models: any transformers model for images and text is a policy."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.seeding import generator
from mmrl.types import Decisions, Prompt, Rollout, Samples
from pipelines.adapters import LoRA
from pipelines.loading import quiet
from pipelines.vlm import loading, training
from pipelines.vlm.decoding import Decoder, Sampling
from pipelines.vlm.inputs import Reader, prompt_keys
from pipelines.vlm.loading import LoadedVLM
from pipelines.vlm.network import Network
from pipelines.vlm.prefix import Trace, states_plain, states_shared, text_trace, unique_prompts
from pipelines.vlm.supervised import Answers
from pipelines.vlm.token_logps import token_logps
from pipelines.vlm.training import Part, ValueHead, VLMLoRA
from pipelines.vlm.vocabulary import banned_ids, end_ids

log = logging.getLogger(__name__)


class VLMPolicy:
    """A vision-language model as a policy: a decision is a token.

    The group is the unit: each picture is processed and encoded once, each prompt runs once, and its cache is repeated
    for the completions, when sampling and, with gradient, when scoring.

    Args:
        model: a transformers model for images and text, or the pair that ``VLMPolicy.load`` makes.
        processor: that belongs to the model.
        max_new_tokens: longest completion.
        temperature: divides the logits, in sampling and in scoring.
        top_p, top_k: limit what is sampled (1.0 and 0 do not); log-probs stay those of the whole distribution.
        stop: strings that end a completion, besides the model's own end tokens.
        share_prefix: ``auto`` shares a prompt among its completions where a check on the first rollout finds that this
            is exact, ``always`` leaves out the check, ``never`` runs every row in full.
        ban_media_tokens: place holders of pictures, and ids that are no token, are neither sampled nor scored.
        max_prompt_tokens: longer prompts are refused; the default is what the context leaves.
        system_prompt: put in front of conversations that have none.
        chat_options: further variables of the chat template.
        lora: adapters to train; None trains weights.
        freeze: parts that do not train.
        batch_size: rows per scoring call.
        rollout_batch_size: rows sampled at a time.
        gradient_checkpointing: recompute activations in the backward pass; every row then runs in full.
        keep_entropy: ``decisions`` gives the entropies of the distributions as well.
        value_head: predict returns with a linear head on the last hidden state.
        eval_temperature: of ``generate``; 0 takes the likeliest token.
        fit_reduction: ``sum`` or ``mean`` of the negative log-likelihood over a response's tokens.
        logits_in_memory: logits held at a time when scoring.

    Raises:
        UserError: model and processor do not belong together, or an option does not fit them.
    """

    verbs = frozenset({"rollout", "decisions", "fit", "generate", "entropy", "values"})
    load = staticmethod(loading.load_vlm)

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        max_new_tokens: Annotated[int, Field(ge=1)] = 256,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        stop: Sequence[str] = (),
        share_prefix: Literal["auto", "always", "never"] = "auto",
        ban_media_tokens: bool = True,
        max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None,
        system_prompt: str | None = None,
        chat_options: dict[str, Any] | None = None,
        lora: VLMLoRA | None = None,
        freeze: Sequence[Part] = (),
        batch_size: Annotated[int, Field(ge=1)] = 8,
        rollout_batch_size: Annotated[int, Field(ge=1)] = 64,
        gradient_checkpointing: bool = False,
        keep_entropy: bool = False,
        value_head: bool = False,
        eval_temperature: Annotated[float, Field(ge=0)] = 0.0,
        fit_reduction: Literal["sum", "mean"] = "sum",
        logits_in_memory: Annotated[int, Field(ge=1)] = 1 << 24,
    ):
        if isinstance(model, LoadedVLM):
            model, processor = model.model, processor or model.processor
        loading.check_pair(model, processor)
        self.model = model
        self.processor = processor
        self.counters: Counter = Counter()
        self.network = Network(model, self.counters)
        self.sampling = Sampling(max_new_tokens, temperature, top_p, top_k, tuple(stop))
        self.temperature = temperature
        self.eval_temperature = eval_temperature
        self.share_prefix = share_prefix
        self.batch_size = batch_size
        self.rollout_batch_size = rollout_batch_size
        self.keep_entropy = keep_entropy
        self.keep_mean = False
        self.fit_reduction = fit_reduction
        self.logits_in_memory = logits_in_memory
        if max_prompt_tokens is None and self.network.context is not None:
            max_prompt_tokens = max(1, self.network.context - max_new_tokens)
        self.reader = Reader(model, processor, self.counters, system_prompt, max_prompt_tokens, chat_options)
        self.tokenizer = self.reader.tokenizer
        self.eos = end_ids(model, self.tokenizer)
        self.banned = banned_ids(model, processor, self.eos) if ban_media_tokens else None
        self.decoder = Decoder(self.network, self.eos, self.banned, self._texts)
        self.answers = Answers(self.reader, self.eos)
        self.lora: LoRA | None = lora
        self.value_head = ValueHead(model.config.get_text_config().hidden_size) if value_head else None
        if not value_head:
            self.verbs = self.verbs - {"values"}
        self.parameters = training.choose_parameters(model, lora, freeze, self.value_head)
        self.network.keep_features = not training.features_train(self.parameters)
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            training.enable_checkpointing(model)
            log.warning("gradient_checkpointing: updates run every row in full, since recomputation excludes caches")
        self._sharing: bool | None = {"auto": None, "always": True, "never": False}[share_prefix]

    @staticmethod
    def validate(model: str | None = None, **others: Any) -> None:
        """Check what needs no model in memory; raises ``UserError``."""
        if model is not None:
            loading.resolve(model)

    @staticmethod
    def forwards_per_sample(max_new_tokens: int, **others: Any) -> dict[str, int]:
        """Network rows that one sample costs per verb at most; a prompt's own run is shared by its group."""
        return {"rollout": max_new_tokens, "decisions": 1, "fit": 1, "generate": max_new_tokens}

    @property
    def has_frozen_base(self) -> bool:
        """The start is at hand without a copy, by switching adapters off."""
        return self.lora is not None

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.network.device

    def to(self, device: torch.device | str) -> VLMPolicy:
        """Move the model."""
        self.model.to(device)
        if self.value_head is not None:
            self.value_head.to(device)
        return self

    def compile(self) -> None:
        """``torch.compile`` the model in place, for lengths that change."""
        self.model.compile(dynamic=True)

    def rollout(self, prompts: Sequence[Prompt], group_size: int, seed: int, step: int = 0) -> Rollout:
        """Sample ``group_size`` completions per prompt; see :class:`mmrl.policy.Policy`.

        What a sample draws depends on ``seed``, its prompt and its number within the group, not on the batch it is in.
        """
        keys = list(prompt_keys(prompts))
        draws = [generator(seed, "sample", *key, k) for key in keys for k in range(group_size)]
        return self._sample(prompts, group_size, draws, self.sampling)

    @torch.no_grad()
    def _sample(
        self, prompts: Sequence[Prompt], group_size: int, draws: Sequence[torch.Generator], sampling: Sampling
    ) -> Rollout:
        processed = self.reader.read(prompts)
        longest = sampling.max_new_tokens
        uniforms = torch.stack([torch.rand(longest, generator=draw) for draw in draws])
        numbers = torch.arange(len(prompts)).repeat_interleave(group_size)
        parts = []
        # Prompts that are there twice run once, if they are in the same portion.
        for begin in range(0, len(numbers), max(1, self.rollout_batch_size // group_size) * group_size):
            rows = slice(begin, begin + max(1, self.rollout_batch_size // group_size) * group_size)
            own = [processed[i] for i in numbers[rows].tolist()]
            distinct, place = unique_prompts(own)
            state, cache, mask = self.network.prefill(distinct)
            place = place.to(self.device)
            if len(distinct) < len(own):
                cache.batch_select_indices(place)
            start = torch.tensor([len(prompt) + prompt.delta for prompt in own])
            axes = len(own[0].positions)
            parts.append(
                self.decoder(state[place], cache, mask[place], start, axes, uniforms[rows], sampling, self.value_head)
            )
        width = max(part.tokens.shape[1] for part in parts)
        join = [torch.cat([_widened(getattr(part, name), width) for part in parts]) for name in ("tokens", "logp")]
        value = None
        if self.value_head is not None:
            value = torch.cat([_widened(part.value, width) for part in parts])
        lengths = torch.cat([part.lengths for part in parts])
        truncated = torch.cat([part.truncated for part in parts])
        tokens, logp = join
        own = [processed[i] for i in numbers.tolist()]
        trace = text_trace(own, tokens, lengths)
        samples = Samples(
            [prompts[i] for i in numbers.tolist()],
            texts=self._completion_texts(tokens, lengths),
            truncated=truncated,
            lengths=lengths,
            sizes=[prompt.sizes for prompt in own],
            group=numbers,
        )
        mask = trace.live(width).to(self.device)
        rollout = Rollout(samples, logp, mask, numbers, trace, value=value)
        return rollout

    def decisions(self, rollout: Rollout, steps: Sequence[int] | None = None) -> Decisions:
        """Score recorded tokens again, with gradient; 0 where there was no decision.

        Args:
            rollout: N rows; rows of one prompt share its run.
            steps: columns of ``rollout.logp``; default all.
        """
        total = rollout.logp.shape[1]
        scored = self._score(rollout.trace, rollout.mask.cpu(), self.temperature, self.banned, self.keep_entropy)
        found = Decisions(*(None if x is None else _widened(x, total) for x in scored[:1]))
        found.entropy = None if scored[1] is None else _widened(scored[1], total)
        found.value = None if scored[2] is None else _widened(scored[2], total)
        return found if steps is None or list(steps) == list(range(total)) else found.columns(list(steps))

    def decision_chunks(self, rollout: Rollout) -> list[list[int]]:
        """All tokens at once: they share a forward."""
        return [list(range(rollout.logp.shape[1]))]

    def fit(self, samples: Samples | Rollout, seeds: Sequence[int] = ()) -> Tensor:
        """Negative log-likelihood ``[N]`` of responses and their end tokens, at temperature 1, with gradient.

        A sample's response is its text, else its prompt's ``metadata["response"]``, else its ``target`` if that is
        text; a conversation that holds turns of the assistant is explained in all of them. Nothing is drawn.
        """
        if isinstance(samples, Rollout):
            trace, mask = samples.trace, samples.mask.cpu()
        else:
            trace, mask = self.answers.trace(samples)
        logp = self._score(trace, mask, 1.0, None, False)[0]
        total = -logp.sum(1)
        return total / mask.sum(1).clamp(min=1).to(total.device) if self.fit_reduction == "mean" else total

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int], grad_steps: int = 0) -> Samples:
        """One completion per prompt: the likeliest tokens, or with ``eval_temperature`` draws of ``seeds[k]`` alone."""
        if grad_steps:
            raise UserError("a language model's samples carry no gradient: grad_steps needs a diffusion pipeline")
        draws = [generator(seed, "sample") for seed in seeds]
        sampling = Sampling(
            self.sampling.max_new_tokens,
            self.eval_temperature,
            self.sampling.top_p,
            self.sampling.top_k,
            self.sampling.stop,
        )
        return self._sample(prompts, 1, draws, sampling).samples

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy is the frozen starting point: the snapshot ``reference``, or LoRA off if there is none."""
        if "reference" in self.parameters.snapshots:
            return self.parameters.swapped("reference")
        if self.lora is None:
            raise RuntimeError("take_snapshot('reference') before training starts")
        return training.lora_off(self.model)

    def export(self, folder: Path) -> None:
        """LoRA: an adapter for peft. Full fine-tuning: a folder for ``from_pretrained``. Both with the processor."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if self.value_head is not None:
            training.save_value_head(self.value_head, folder)

    def _score(
        self, trace: Trace, mask: Tensor, temperature: float, banned: Tensor | None, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, entropies and values ``[N, t]`` for the tokens that are there, up to the longest row."""
        parts = []
        for begin in range(0, len(trace.prompts), self.batch_size):
            rows = slice(begin, begin + self.batch_size)
            parts.append(self._score_batch(trace[rows], mask[rows], temperature, banned, with_entropy))
        if len(parts) == 1:
            return parts[0]
        width = max(part[0].shape[1] for part in parts)
        joined = [
            None if column[0] is None else torch.cat([_widened(x, width) for x in column])
            for column in zip(*parts, strict=True)
        ]
        return tuple(joined)

    def _score_batch(
        self, trace: Trace, mask: Tensor, temperature: float, banned: Tensor | None, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        states = self._states(trace)
        length = states.shape[1]
        mask = mask[:, :length].to(self.device)
        tokens = trace.tokens[:, :length].to(self.device)
        logp, entropy = token_logps(
            states[mask],
            tokens[mask],
            self.network.logits,
            temperature,
            None if banned is None else banned.to(self.device),
            with_entropy,
            self.logits_in_memory,
            self.model.get_output_embeddings().weight.shape[0],
        )

        def spread(values: Tensor) -> Tensor:
            return torch.zeros(mask.shape, device=self.device).masked_scatter(mask, values)

        value = None if self.value_head is None else self.value_head(states) * mask
        return spread(logp), None if entropy is None else spread(entropy), value

    def _states(self, trace: Trace) -> Tensor:
        """Hidden states ``[N, t, H]`` that each token is predicted from."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            with training.checkpointing(self.model):
                return states_plain(self.network, trace)
        if self._sharing is None:
            self._sharing = True
        return states_shared(self.network, trace) if self._sharing else states_plain(self.network, trace)

    def _texts(self, tokens: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def _completion_texts(self, tokens: Tensor, lengths: Tensor) -> list[str]:
        return [
            self.tokenizer.decode(row[:length], skip_special_tokens=True)
            for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]


def _widened(values: Tensor, width: int) -> Tensor:
    """``[N, t]`` with zeros up to ``[N, width]``."""
    missing = width - values.shape[1]
    return values if missing == 0 else torch.nn.functional.pad(values, (0, missing))
