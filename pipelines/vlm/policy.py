"""RL on vision-language models: any transformers model for images and text is a policy."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mmrl.errors import UserError
from mmrl.seeding import generator, prompt_keys
from mmrl.types import Decisions, Prompt, Rollout, Samples, widened
from pipelines.adapters import LoRA, lora_off
from pipelines.loading import quiet
from pipelines.tools import build_tools
from pipelines.tools.toolbox import Toolbox
from pipelines.vlm import given, loading, training
from pipelines.vlm.decoding import Completions, Decoder, Sampling
from pipelines.vlm.dialogue import Dialogues
from pipelines.vlm.inputs import Processed, Reader
from pipelines.vlm.loading import LoadedVLM
from pipelines.vlm.network import Network
from pipelines.vlm.prefix import Trace, begin, text_trace
from pipelines.vlm.scoring import Scorer, Scores, Share
from pipelines.vlm.supervised import Answers, fit_length
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
        tools: that the model may call in the middle of an answer: ``{type: crop_zoom, ...}`` (see
            :data:`pipelines.tools.TOOLS`) or objects that are tools.
        environment: answers the model's turns in place of tools (:class:`mmrl.dialogue.Environment`).
        max_turns: of the model, in dialogues with tools or an environment; one that wants more is cut.
        max_dialogue_tokens: behind the prompt, those of tools included; the default is what the context leaves.
        bad_calls: a call of a tool that makes no sense is answered by an error (``tell``) or ends the dialogue.
        describe_tools: say in the prompt which tools there are; not needed by a model that was trained with them.
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

    verbs = frozenset({"rollout", "decisions", "fit", "generate", "entropy", "values", "given"})
    load = staticmethod(loading.load_vlm)
    fit_length = staticmethod(fit_length)

    def __init__(
        self,
        model: Any,
        processor: Any = None,
        max_new_tokens: Annotated[int, Field(ge=1)] = 256,
        temperature: Annotated[float, Field(gt=0)] = 1.0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        stop: Sequence[str] = (),
        share_prefix: Share = "auto",
        ban_media_tokens: bool = True,
        max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None,
        system_prompt: str | None = None,
        chat_options: dict[str, Any] | None = None,
        tools: Sequence[Any] = (),
        environment: Any = None,
        max_turns: Annotated[int, Field(ge=1)] = 4,
        max_dialogue_tokens: Annotated[int, Field(ge=1)] | None = None,
        bad_calls: Literal["tell", "end"] = "tell",
        describe_tools: bool = True,
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
        if max_prompt_tokens is None and self.network.context is not None:
            max_prompt_tokens = max(1, self.network.context - max_new_tokens)
        self.reader = Reader(model, processor, self.counters, system_prompt, max_prompt_tokens, chat_options)
        self.tokenizer = self.reader.tokenizer
        self.eos = end_ids(model, self.tokenizer)
        self.banned = banned_ids(model, processor, self.eos) if ban_media_tokens else None
        self.decoder = Decoder(self.network, self.eos, self.banned, self.tokenizer)
        self.answers = Answers(self.reader, self.eos)
        self.lora: LoRA | None = lora
        self.value_head = ValueHead(model.config.get_text_config().hidden_size) if value_head else None
        self.verbs = self.offers(value_head)
        self.parameters = training.choose_parameters(model, lora, freeze, self.value_head)
        self.network.keep_features = not training.features_train(self.parameters)
        if gradient_checkpointing:
            training.enable_checkpointing(model)
            log.warning("gradient_checkpointing: updates run every row in full, since recomputation excludes caches")
        self.scorer = Scorer(self.network, share_prefix, gradient_checkpointing, self.value_head, logits_in_memory)
        if tools:
            environment = Toolbox(build_tools(tools), bad_calls)
        self.dialogues: Dialogues | None = None
        if environment is not None:
            parts = self.reader, self.network, self.decoder, environment
            share = share_prefix != "never"
            self.dialogues = Dialogues(*parts, max_turns, max_dialogue_tokens, describe_tools, share, self.value_head)

    @staticmethod
    def validate(model: str | None = None, tools: Sequence[Any] = (), environment: Any = None, **others: Any) -> None:
        """Check what needs no model in memory; raises ``UserError``."""
        build_tools(tools)
        if tools and environment is not None:
            raise UserError("pipeline has both 'tools' and 'environment': tools are an environment, leave one out")
        if model is not None:
            loading.resolve(model)

    @staticmethod
    def offers(value_head: bool = False, **others: Any) -> frozenset[str]:
        """The verbs of a policy with these options."""
        return VLMPolicy.verbs if value_head else VLMPolicy.verbs - {"values"}

    @staticmethod
    def forwards_per_sample(
        max_new_tokens: int, tools: Sequence[Any] = (), environment: Any = None, max_turns: int = 1, **others: Any
    ) -> dict[str, int]:
        """Network rows that one sample costs per verb at most; a prompt's own run is shared by its group."""
        turns = max_turns if tools or environment is not None else 1
        sampling = turns * max_new_tokens + turns - 1
        return {"rollout": sampling, "decisions": 1, "fit": 1, "generate": sampling}

    @property
    def max_decisions(self) -> int:
        """Longest completion."""
        return self.sampling.max_new_tokens

    def given(
        self, prompts: Sequence[Prompt], completions: Sequence[str | Sequence[int]], score: bool = True
    ) -> Rollout:
        """A rollout of completions that are given; see :func:`pipelines.vlm.given.given`."""
        return given.given(self, prompts, completions, score)

    def completions(self, rollout: Rollout) -> list[list[int]]:
        """Token ids of each row; see :func:`pipelines.vlm.given.completions`."""
        return given.completions(rollout)

    def continued(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], text: str, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Let completions go on after ``text``; see :func:`pipelines.vlm.given.continued`."""
        return given.continued(self, prompts, completions, text, seeds)

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
        """``torch.compile`` the text model in place, for lengths that change.

        Raises:
            UserError: the family has none that stands alone.
        """
        if self.network.text_model is None:
            raise UserError(f"trainer.compile: {type(self.model).__name__} cannot be compiled here; set it to false")
        self.network.text_model.compile(dynamic=True)

    def rollout(self, prompts: Sequence[Prompt], group_size: int, seed: int, step: int = 0) -> Rollout:
        """Sample ``group_size`` completions per prompt; see :class:`mmrl.policy.Policy`.

        What a sample draws depends on ``seed``, its prompt and its number within the group, not on the batch it is in.
        """
        keys = list(prompt_keys(prompts))
        draws = [generator(seed, "sample", *key, k) for key in keys for k in range(group_size)]
        rollout = self._sample(prompts, group_size, draws, self.sampling)
        self.scorer.check_sampling(rollout.trace, rollout.mask.cpu(), rollout.logp, self.temperature, self.banned)
        if self.scorer.resample:
            with torch.no_grad():
                found = self.decisions(rollout)
            rollout.logp, rollout.value = found.logp, found.value
        return rollout

    @torch.no_grad()
    def _sample(
        self, prompts: Sequence[Prompt], group_size: int, draws: Sequence[torch.Generator], sampling: Sampling
    ) -> Rollout:
        portion = max(1, self.rollout_batch_size // group_size) * group_size
        if self.dialogues is not None:
            return self.dialogues.sample(prompts, group_size, draws, sampling, portion)
        processed = [prompt for prompt in self.reader.read(prompts) for _ in range(group_size)]
        uniforms = torch.stack([torch.rand(sampling.max_new_tokens, generator=draw) for draw in draws])
        group = torch.arange(len(prompts)).repeat_interleave(group_size)
        found = Completions.cat(
            [
                self._complete(processed[begin : begin + portion], uniforms[begin : begin + portion], sampling)
                for begin in range(0, len(processed), portion)
            ]
        )
        trace = text_trace(processed, found.tokens, found.lengths)
        samples = Samples(
            [prompts[i] for i in group.tolist()],
            texts=self.decode(found.tokens, found.lengths),
            truncated=found.truncated,
            lengths=found.lengths,
            sizes=[prompt.sizes for prompt in processed],
            group=group,
        )
        mask = trace.live(found.tokens.shape[1])
        return Rollout(samples, found.logp, mask.to(self.device), group, trace, value=found.value)

    def _complete(self, prompts: Sequence[Processed], uniforms: Tensor, sampling: Sampling) -> Completions:
        """Completions of rows; equal prompts run once."""
        state, cache, mask = begin(self.network, prompts, self.share_prefix != "never")
        position = torch.tensor([len(prompt) + prompt.delta for prompt in prompts])
        axes = len(prompts[0].positions)
        # Small operations are a tenth faster so. What comes out may not enter a loss, but its copies in ``cat`` may.
        with torch.inference_mode():
            return self.decoder(state, cache, mask, position, axes, uniforms, sampling, self.value_head)

    def decisions(self, rollout: Rollout, steps: Sequence[int] | None = None) -> Decisions:
        """Score recorded tokens again, with gradient; 0 where there was no decision.

        Args:
            rollout: N rows; rows of one prompt share its run.
            steps: columns of ``rollout.logp``; default all.
        """
        total = rollout.logp.shape[1]
        scores = self._score(rollout.trace, rollout.mask.cpu(), self.temperature, self.banned, self.keep_entropy)
        entropy = None if scores.entropy is None else widened(scores.entropy, total)
        value = None if scores.value is None else widened(scores.value, total)
        found = Decisions(widened(scores.logp, total), entropy=entropy, value=value)
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
        logp = self._score(trace, mask).logp
        total = -logp.sum(1)
        return total / mask.sum(1).clamp(min=1).to(total.device) if self.fit_reduction == "mean" else total

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Samples:
        """One completion per prompt: the likeliest tokens, or with ``eval_temperature`` draws of ``seeds[k]`` alone."""
        draws = [generator(seed, "sample") for seed in seeds]
        sampling = replace(self.sampling, temperature=self.eval_temperature)
        return self._sample(prompts, 1, draws, sampling).samples

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy is the frozen starting point: the snapshot ``reference``, or LoRA off if there is none."""
        if "reference" in self.parameters.snapshots:
            return self.parameters.swapped("reference")
        if self.lora is None:
            raise RuntimeError("take_snapshot('reference') before training starts")
        return lora_off([self.model])

    def export(self, folder: Path) -> None:
        """LoRA: an adapter for peft. Full fine-tuning: a folder for ``from_pretrained``. Both with the processor."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            self.model.save_pretrained(folder)
            self.processor.save_pretrained(folder)
        if self.value_head is not None:
            training.save_value_head(self.value_head, folder)

    def decode(self, tokens: Tensor, lengths: Tensor) -> list[str]:
        """Texts of ``tokens [N, T]`` up to ``lengths [N]``, without special tokens."""
        return [
            self.tokenizer.decode(row[:length], skip_special_tokens=True)
            for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)
        ]

    def _score(self, trace: Trace, mask: Tensor, *how: Any) -> Scores:
        """Scores of all rows; without gradient at most ``batch_size`` at a time."""
        if torch.is_grad_enabled() or len(trace) <= self.batch_size:
            return self.scorer(trace, mask, *how)
        rows = [slice(begin, begin + self.batch_size) for begin in range(0, len(trace), self.batch_size)]
        parts = [vars(self.scorer(trace[part], mask[part], *how)) for part in rows]
        width = max(part["logp"].shape[1] for part in parts)
        return Scores(
            **{
                name: None if parts[0][name] is None else torch.cat([widened(part[name], width) for part in parts])
                for name in parts[0]
            }
        )
