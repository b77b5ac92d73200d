"""What a policy offers to algorithms, and the parameters it trains."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from mmrl.transitions import Transitions
from mmrl.types import Chain, Decisions, Denoising, Prompt, Rollout, Samples

VERB_HELP = {
    "means": "only Gaussian decisions have them: with tokens use kl k1, k2 or k3, and neither guard nor dppo",
    "values": "a value head gives them: pipeline.value_head: true",
    "entropy": "only tokens have one",
    "given": "only language models can be given answers",
    "candidates": "only the steps of a diffusion or flow pipeline can be taken anew",
    "chain": "only through the sampler of a diffusion or flow pipeline can a reward be differentiated",
    "complete": "only the sampler of a diffusion or flow pipeline can complete its own states",
    "branches": "samples share decisions where pipeline.branching is set",
    "steered": "rewards steer the rollouts of a diffusion or flow pipeline where pipeline.steering is set",
    "denoise": "only models that denoise have a forward process: diffusion and flow pipelines, flow heads of robots",
    "transitions": "only the pipeline residual_robot, an actor beside a frozen robot policy, has critics and a replay",
}
"""What to do about a verb that is missing."""


@runtime_checkable
class Policy(Protocol):
    """A model that can be trained by reinforcement. Algorithms name the verbs they need; see ``verbs``.

    Attributes:
        verbs: which of the methods below work for this policy: "rollout", "decisions", "fit", "generate"; and
            "means", when its decisions are Gaussians whose means a rollout keeps once ``keep_mean`` is set;
            "entropy", when ``decisions`` can give the entropy of categorical decisions (once ``keep_entropy`` is set);
            "values", when it has a value head, and rollouts and decisions carry ``value``;
            "given", when it can score completions that it did not sample (``given``, ``completions``);
            "denoise", when outputs can be noised again and denoised (``denoise``);
            "candidates", when single decisions can be taken anew (``candidates``);
            "chain", when gradient flows through its sampler (``chain``);
            "complete", when the states before its decisions can be completed without noise (``complete``);
            "branches", when the samples of a group share their first decisions, and rollouts have ``branch``;
            "steered", when rewards steer its decisions, and rollouts have ``process`` and ``aim``;
            "transitions", when it has an actor, critics and a replay buffer of transitions (``remember``, ``recall``).
        parameters: what trains.
        counters: work done so far (forwards, prompts encoded...), for tests and reports.
        batch_size: samples per network call; updates use the same, so that a replay sees the same batch shapes.
        has_frozen_base: the reference is at hand without a copy, because adapters can be switched off.
        keep_mean: whether rollouts record the means of Gaussian decisions.
        fit_length: optional; about how long a prompt with its response is, so that supervised micro-batches hold
            rows of like length.
        encoded: optional method; ``encoded(samples)`` is a rollout without decisions of outputs, or of the prompts'
            targets, which a policy makes into something else before it can fit them. That is then done once.
        keep_entropy: whether ``decisions`` also gives entropies; only policies that offer them have it.
        max_decisions: longest output, where there is a limit; the default divisor of the "constant" aggregation.
        record: optional, of policies that act in an environment; the first so many episodes of each ``generate`` keep
            pictures (``Episode.frames``). 0, but for evaluations, which show a few episodes to people.
        begin_stage, finish_backward, report, overview: optional methods. ``begin_stage(prompts)`` is called with a
            stage's prompts as it begins, and not when it is resumed: what it sets must be in ``parameters``.
            ``finish_backward()`` is called after the last backward of an update: the place to carry on gradient that
            has been gathered so far. ``report()`` gives numbers to log with each step; ``overview()`` gives lines, by
            name, on what is about to be trained.
    """

    verbs: frozenset[str]
    parameters: Parameters
    counters: Counter
    batch_size: int
    has_frozen_base: bool
    keep_mean: bool

    def rollout(self, prompts: Sequence[Prompt], group_size: int, seed: int, step: int = 0) -> Rollout:
        """Sample ``group_size`` outputs per prompt, without gradient; group members are adjacent rows.

        ``step`` is the number of the training step, for schedules such as a sliding window; it draws nothing.
        """

    def decisions(self, rollout: Rollout, steps: Sequence[int] | None = None) -> Decisions:
        """Score the recorded decisions ``steps`` (columns of ``rollout.logp``; default all), with gradient."""

    def decision_chunks(self, rollout: Rollout) -> list[list[int]]:
        """The columns of ``rollout.logp`` split into the portions that one backward should hold in memory."""

    def fit(self, samples: Samples | Rollout, seeds: Sequence[int]) -> Tensor:
        """Loss ``[N]`` of explaining ``samples`` (token NLL or denoising error), with gradient.

        Row k's noise and timestep are a function of ``seeds[k]`` alone, so that policy and reference, and winner and
        loser of a pair, see the same when given the same seed, however rows are split into micro-batches. A rollout is
        explained without encoding its samples again.
        """

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Samples:
        """One output of the deterministic sampler per prompt; row k's noise is a function of ``seeds[k]`` alone."""

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy is the snapshot "reference" if there is one, else the frozen base it started from."""

    def export(self, folder: Path) -> None:
        """Write what the model's own library loads: a LoRA file or a whole model folder."""


class GivenPolicy(Policy, Protocol):
    """A policy of the verb "given": it can score completions that it did not sample."""

    def given(self, prompts: Sequence[Prompt], completions: Sequence[Any], score: bool = True) -> Rollout:
        """A rollout as if the policy had said ``completions`` (texts, or what :meth:`completions` gave).

        Each row is a group of its own. Log-probs are those of the policy as it is, or 0 without ``score``.
        """

    def completions(self, rollout: Rollout) -> list[list[int]]:
        """What each row said as token ids, from which :meth:`given` makes the same row again."""

    def continued(
        self, prompts: Sequence[Prompt], completions: Sequence[Sequence[int]], text: str, seeds: Sequence[int]
    ) -> list[list[int]]:
        """Completions without their end, ``text`` behind them, and what the policy says next by ``seeds[k]`` alone.

        One that leaves no room within the length limit comes back as it was.
        """


class ChainPolicy(Policy, Protocol):
    """A policy of the verb "chain".

    Attributes:
        num_steps: steps of the sampler that training uses.
    """

    num_steps: int

    def start(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
        """Noise ``[N, ...]`` from which ``chain`` starts for the same seeds."""

    def chain(
        self,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        chain: Chain,
        source: Samples | Rollout | Tensor | None = None,
    ) -> Rollout:
        """Outputs of a stretch of the deterministic sampler, with gradient, as a rollout without decisions.

        Row k's noise is a function of ``seeds[k]`` alone.

        Args:
            source: what the chain starts from, where that is not drawn: states ``[N, ...]`` at its begin, or clean
                outputs (those of a rollout, or the prompts' targets), which are noised to the level of its begin.
        """

    def noised(self, samples: Samples | Rollout, seeds: Sequence[int]) -> Denoising:
        """What ``denoise`` predicts at, without the prediction; gradient flows to outputs that ``chain`` made."""


class CompletingPolicy(Policy, Protocol):
    """A policy of the verb "complete".

    Attributes:
        noise_scale: factors of the noise of decisions, in order, in the rollouts to come; None is 1.
    """

    noise_scale: Sequence[float] | None

    def complete(self, rollout: Rollout, column: int, jump: bool = False) -> Samples:
        """What the deterministic sampler makes of the states before decision ``column``, without gradient.

        Args:
            jump: go straight to its estimate of the clean output from there.
        """


class CandidatesPolicy(Policy, Protocol):
    """A policy of the verb "candidates"."""

    def candidates(self, rollout: Rollout, column: int, copies: int, seed: int) -> Rollout:
        """The decision of a column taken ``copies`` times anew, each time from the state where it was taken.

        The rollout that comes back has that one decision; its samples show what the policy expects right after it.
        Rows that share a state are adjacent and form a group.
        """


class DenoisingPolicy(Policy, Protocol):
    """A policy of the verb "denoise"; its ``fit`` is the mean of the errors of ``denoise``."""

    def denoise(self, samples: Samples | Rollout, seeds: Sequence[int], at: Denoising | None = None) -> Denoising:
        """Noise each sample again and predict, with gradient.

        Row k's noise and time are a function of ``seeds[k]`` alone. With ``at`` nothing is drawn: the prediction is
        made at its states ``x`` and ``time``, everything else is taken over. So the policy before an update, an average
        or the reference is the same call inside ``parameters.swapped(name)`` or ``reference()``.
        """


class TransitionsPolicy(Policy, Protocol):
    """A policy of the verb "transitions": an actor and critics that learn from replayed transitions.

    Attributes:
        log_temperature: parameter, log of the weight of the actor's entropy.
        num_critics: E.
    """

    log_temperature: nn.Parameter
    num_critics: int

    def remember(self, rollout: Rollout, rewards: Sequence[Sequence[float]], prior: bool = False) -> None:
        """Keep the turns of a rollout, with what each turn of each sample earned; ``prior`` ones apart."""

    def recall(self, count: int, prior_share: float, generator: torch.Generator) -> Transitions:
        """Some of those kept; ``prior_share`` of them prior ones, if there are any."""

    def act(self, situation: Tensor, normals: Tensor) -> tuple[Tensor, Tensor]:
        """The actor's action ``[n, A]`` in [-1, 1] from normal numbers ``[n, A]``, and its log-density ``[n]``."""

    def critics(self, situation: Tensor, action: Tensor, which: Literal["trained", "fixed", "slow"]) -> Tensor:
        """Predicted return ``[E, n]``; gradient reaches the critics' parameters only where they are ``trained``."""

    def follow(self, rate: float) -> None:
        """Move the critics' slow copies so far towards them."""


class Parameters:
    """The trainable tensors of a policy, with named copies that can stand in for them.

    Args:
        named: name to parameter; order fixes the order in the optimiser and in checkpoints.
        buffers: name to tensor of what changes in training without a gradient, such as statistics of observations;
            changed in place, kept in checkpoints, the same in every copy.
        lr_scale: name to factor of the learning rate, for those where it is not 1.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        buffers: Mapping[str, Tensor] | None = None,
        lr_scale: Mapping[str, float] | None = None,
    ):
        self.named = dict(named)
        self.lr_scale = dict(lr_scale or {})
        self.buffers = dict(buffers or {})
        self.snapshots: dict[str, dict[str, Tensor]] = {}

    def __iter__(self) -> Iterator[nn.Parameter]:
        return iter(self.named.values())

    def groups(self) -> list[dict[str, Any]]:
        """The parameters as an optimiser takes them: a group for each factor ``scale`` of the learning rate."""
        by_scale: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.named.items():
            by_scale.setdefault(self.lr_scale.get(name, 1.0), []).append(parameter)
        return [{"params": parameters, "scale": scale} for scale, parameters in by_scale.items()]

    @property
    def count(self) -> int:
        """Number of trainable scalars."""
        return sum(p.numel() for p in self)

    @torch.no_grad()
    def take_snapshot(self, name: str) -> None:
        """Copy the current values under ``name``, replacing an older copy."""
        self.snapshots[name] = {key: p.detach().clone() for key, p in self.named.items()}

    @torch.no_grad()
    def update_average(self, name: str, decay: float) -> None:
        """Move the copy ``name`` towards the current values: ``copy = decay * copy + (1 - decay) * current``."""
        for key, copy in self.snapshots[name].items():
            copy.lerp_(self.named[key].detach(), 1 - decay)

    @contextlib.contextmanager
    def swapped(self, name: str) -> Iterator[None]:
        """Inside, the parameters hold the copy ``name``; pointers are swapped, nothing is copied."""
        copies = self.snapshots[name]
        own = {key: p.data for key, p in self.named.items()}
        self._point_to(copies)
        try:
            yield
        finally:
            self._point_to(own)

    def _point_to(self, values: Mapping[str, Tensor]) -> None:
        for key, p in self.named.items():
            p.data = values[key]
        # Autocast keeps the low-precision copies that it made of the values before.
        torch.clear_autocast_cache()

    def state(self) -> dict[str, Tensor]:
        """Name to tensor, for a checkpoint."""
        return {key: tensor.detach() for key, tensor in (*self.named.items(), *self.buffers.items())}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy values in; raises ``ValueError`` when names or shapes differ. A copy without buffers leaves them."""
        state = {**self.buffers, **state}
        check_same_shapes(self.state(), state)
        for key, tensor in self.state().items():
            tensor.copy_(state[key])


def check_same_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` naming the first tensor that is missing, extra or of another shape."""
    for key in expected.keys() | found.keys():
        if key not in found:
            raise ValueError(f"tensor '{key}' is missing from the saved state")
        if key not in expected:
            raise ValueError(f"the saved state has a tensor '{key}' that this policy does not train")
        if expected[key].shape != found[key].shape:
            raise ValueError(
                f"tensor '{key}' is {tuple(found[key].shape)} in the saved state but {tuple(expected[key].shape)} here"
            )
