"""The nouns every modality shares: Prompt, Samples, Rollout, Decisions.

Axes: ``N`` samples, ``T`` decisions of a sample. A *decision* is one token, one denoising step or one action step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a policy is asked.

    Attributes:
        text: the instruction or caption.
        id: stable name of the row, e.g. ``"prompts.jsonl:12"``; seeds and error messages use it.
        images: condition images (paths, PIL images or tensors), as the pipeline at hand takes them.
        videos: clips, each a path or a sequence of frames.
        messages: a conversation in the chat format of transformers instead of ``text``; its image and video parts stand
            for ``images`` and ``videos`` in order, unless they bring their own.
        target: ground truth for rewards and for supervised training (an answer, boxes, a picture...).
        task: tag by which rewards can be routed.
        inputs: extra keyword arguments for the generating call of this prompt alone (an image to edit, embeddings).
        metadata: every other column of the row; plain-function rewards get it as keywords.
    """

    text: str = ""
    id: str = ""
    images: Sequence[Any] = ()
    videos: Sequence[Any] = ()
    messages: Sequence[Mapping[str, Any]] = ()
    target: Any = None
    task: str = ""
    inputs: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def _take(value: Any, index: Tensor) -> Any:
    """Rows ``index`` (long, on the CPU) of a tensor, sequence or anything that indexes like a tensor."""
    if value is None:
        return None
    if isinstance(value, Tensor):
        return value[index.to(value.device)]
    if isinstance(value, (list, tuple)):
        return [value[i] for i in index.tolist()]
    return value[index]


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    return value.detached() if isinstance(value, Rows) else value


def _join(values: Sequence[Any]) -> Any:
    first = values[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, (list, tuple)):
        return [item for value in values for item in value]
    return type(first).cat(values)


def widened(values: Tensor, width: int, axis: int = 1) -> Tensor:
    """``values`` with zeros at the end of ``axis`` up to ``width``."""
    missing = width - values.shape[axis]
    return values if missing == 0 else pad(values, (*[0, 0] * (values.ndim - 1 - axis), 0, missing))


class Rows:
    """Row-wise indexing and joining for dataclasses whose every field is aligned on the sample axis.

    Attributes:
        ragged: names of tensors whose size along an axis may differ from part to part, each with that axis; joining
            fills the shorter ones up with zeros.
    """

    ragged: ClassVar[Mapping[str, int]] = {}

    def __getitem__(self, index: slice | Tensor | Sequence[int]):
        if isinstance(index, slice):
            index = range(len(self))[index]
        index = torch.as_tensor(index if isinstance(index, Tensor) else list(index), dtype=None)
        index = index.nonzero().flatten() if index.dtype == torch.bool else index.long().cpu()
        return replace(self, **{f.name: _take(getattr(self, f.name), index.cpu()) for f in fields(self)})

    def detached(self):
        """The same rows without gradient."""
        return replace(self, **{f.name: _detached(getattr(self, f.name)) for f in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence):
        """Join row-wise; all parts must have the same fields set."""
        if len(parts) == 1:
            return parts[0]
        columns = {f.name: [getattr(part, f.name) for part in parts] for f in fields(cls)}
        for name, axis in cls.ragged.items():
            if columns[name][0] is not None:
                width = max(value.shape[axis] for value in columns[name])
                columns[name] = [widened(value, width, axis) for value in columns[name]]
        return cls(**{name: _join(values) for name, values in columns.items()})


@dataclass(eq=False)
class Episode:
    """One run of an environment in C turns; in a turn the policy commits to up to H actions of D numbers.

    Attributes:
        rewards: float32 ``[C, H]``, the environment's reward for each action; 0 where none was executed.
        executed: long ``[C]``, actions executed in each turn, at least 1.
        actions: float32 ``[C, H, D]`` as the environment got them.
        success: whether the environment ever said that its task is done.
        terminated: the environment came to an end of its own, not by a time limit.
        states: float32 ``[C + 1, S]``, what the environment says of its state before each turn and at the end.
        frames: uint8 ``[C + 1, 3, h, w]``, pictures at the same moments, where they were recorded.
        info: numbers that the environment gave at the end.
    """

    rewards: Tensor
    executed: Tensor
    actions: Tensor
    success: bool
    terminated: bool
    states: Tensor | None = None
    frames: Tensor | None = None
    info: Mapping[str, float] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """Turns that were taken."""
        return len(self.executed)

    @property
    def steps(self) -> int:
        """Actions that were executed."""
        return int(self.executed.sum())


@dataclass(eq=False)
class Samples(Rows):
    """What rewards see: prompts aligned with exactly one kind of output.

    Attributes:
        prompts: N prompts; the members of a group repeat theirs.
        texts: N completions.
        images: ``[N, 3, H, W]`` in [0, 1].
        videos: ``[N, F, 3, H, W]`` in [0, 1].
        audios: waveforms ``[N, channels, samples]``, about in [-1, 1].
        sample_rate: long ``[N]``, of waveforms, samples a second.
        episodes: N runs of an environment.
        truncated: bool ``[N]``, set where the output was cut by a length or time limit.
        lengths: long ``[N]``, tokens (or environment steps) of each output.
        sizes: per sample the (height, width) of its prompt's pictures as the model saw them; boxes that are given in
            pixels of the processed picture are relative to these.
        transcripts: of dialogues, all turns after the prompt (see :mod:`mmrl.dialogue`); ``texts`` has the last one.
        group: long ``[N]``, which prompt of the batch each sample answers; group-wise rewards use it.
    """

    prompts: list[Prompt]
    texts: list[str] | None = None
    images: Tensor | None = None
    videos: Tensor | None = None
    audios: Tensor | None = None
    sample_rate: Tensor | None = None
    episodes: list[Episode] | None = None
    truncated: Tensor | None = None
    lengths: Tensor | None = None
    sizes: list[list[tuple[int, int]]] | None = None
    group: Tensor | None = None
    transcripts: list[list[dict[str, Any]]] | None = None

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(eq=False)
class Rollout(Rows):
    """Samples with what is needed to score them again under a changed policy.

    Attributes:
        samples: what rewards see.
        logp: behaviour log-probs ``[N, T]``, float32.
        mask: bool ``[N, T]``; False where there was no decision.
        group: long ``[N]``, index of the prompt in the batch.
        trace: the policy's private record to replay from; indexes and joins like the rollout itself.
        mean: means ``[N, T, ...]`` of Gaussian decisions under the behaviour policy, kept only when asked for.
        value: ``[N, T]`` predicted return at each decision, from a policy with a value head.
        turn: long ``[N, T]``, from policies whose output is made in turns of several decisions each, such as the
            denoising steps of a chunk of actions: the turn that a decision belongs to, counted from 0. Returns and
            advantages are then those of turns, and the decisions of a turn share them.
        final_value: ``[N]`` predicted return after the last decision, 0 where the output came to its natural end; from
            a policy with a value head whose outputs a time limit may cut.
        std: ``[N, T]`` standard deviation of one element of each decision, from policies with Gaussian decisions that
            record it.
        branch: long ``[N, T]``, from rollouts whose samples share their first decisions: rows with the same number in a
            column made that decision together. Numbers say nothing else.
        process: ``[N, T]`` rewards of the states before decisions, from policies that rewards steer; NaN where there is
            none.
        aim: ``[N, T, ...]``, from such policies where ``mean`` is kept: the means that decisions were steered to.
    """

    samples: Samples
    logp: Tensor
    mask: Tensor
    group: Tensor
    trace: Any = None
    mean: Tensor | None = None
    value: Tensor | None = None
    turn: Tensor | None = None
    final_value: Tensor | None = None
    std: Tensor | None = None
    branch: Tensor | None = None
    process: Tensor | None = None
    aim: Tensor | None = None

    ragged: ClassVar[Mapping[str, int]] = dict.fromkeys(
        ("logp", "mask", "mean", "value", "turn", "std", "branch", "process", "aim"), 1
    )

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(eq=False)
class Decisions:
    """Recorded decisions scored under the current policy, with gradient.

    Attributes:
        logp: ``[N, t]`` float32. For Gaussian decisions the mean over the action's elements, as in Flow-GRPO.
        action, mean: ``[N, t, ...]`` recorded outcome and current mean, for Gaussian decisions.
        std: ``[N, t]`` standard deviation of one element, for Gaussian decisions.
        dt: ``[N, t]`` size of the time step (positive), for denoising steps.
        entropy: ``[N, t]``, for categorical decisions, when ``policy.keep_entropy`` is set.
        value: ``[N, t]`` predicted return with gradient, from a policy with a value head.
    """

    logp: Tensor
    action: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    dt: Tensor | None = None
    entropy: Tensor | None = None
    value: Tensor | None = None

    def columns(self, columns: Sequence[int]) -> Decisions:
        """Some of the decisions, in the order given."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return Decisions(**{name: None if x is None else x[:, list(columns)] for name, x in present.items()})


@dataclass(frozen=True)
class Chain:
    """A stretch of a deterministic sampler; place p is before step p, place 0 is noise, the last one the output.

    Attributes:
        begin, end: places; one step at least lies between them.
        grad_steps: how many of its last steps carry gradient.
        jump: from the last step go straight to its estimate of the clean output.
        decode: make outputs that rewards can see; otherwise only the sampler's own states come of it.
    """

    begin: int
    end: int
    grad_steps: int
    jump: bool = False
    decode: bool = True


@dataclass(eq=False)
class Denoising:
    """Outputs that were noised again, and what a denoiser predicts for them, with gradient.

    M things are denoised: the picture or clip of each sample, or each chunk of actions of an episode. With
    ``x = (1 - time) x0 + time e`` a flow's prediction is its velocity and the target ``e - x0``; DDPM-type models
    predict what they were trained to.

    Attributes:
        target: float32 ``[M, ...]``, what the prediction should be.
        x: ``[M, ...]``, the noised states.
        time: ``[M]`` in (0, 1], the noise level sigma for flows.
        x0_scale: ``[M]``, by how much the estimate of the clean output falls where the prediction rises by 1; sigma for
            flows, -1 for models that predict the clean output itself.
        prediction: ``[M, ...]``; None before there is one.
        row: long ``[M]``, the sample that each belongs to; None where there is one each.
    """

    target: Tensor
    x: Tensor
    time: Tensor
    x0_scale: Tensor
    prediction: Tensor | None = None
    row: Tensor | None = None

    def spread(self, per_sample: Tensor) -> Tensor:
        """Values ``[N]`` of samples as those ``[M]`` of what belongs to them."""
        return per_sample if self.row is None else per_sample[self.row.to(per_sample.device)]

    def mean(self, per_thing: Tensor) -> Tensor:
        """Means ``[N]`` over what belongs to each sample of values ``[M]``."""
        if self.row is None:
            return per_thing
        row = self.row.to(per_thing.device)
        count = int(row.max()) + 1
        total = per_thing.new_zeros(count).index_add(0, row, per_thing)
        return total / row.bincount(minlength=count).to(total)

    @property
    def error(self) -> Tensor:
        """``[M]``: mean over elements of the squared difference of prediction and target."""
        return mean_square(self.prediction - self.target)


def mean_square(difference: Tensor) -> Tensor:
    """``[M]``: mean over the elements of each row of their squares."""
    return difference.square().flatten(1).mean(1)
