"""RL on robot policies: an encoder of observations and an action head over environments are a policy."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mmrl.errors import UserError
from mmrl.policy import Parameters
from mmrl.seeding import generator, prompt_keys
from mmrl.types import Decisions, Denoising, Prompt, Rollout, Samples
from pipelines.robot import building
from pipelines.robot.building import Item
from pipelines.robot.envs import Envs, Observation, make_envs
from pipelines.robot.explaining import Chunks, cut, demonstrated, of_rollout, widened_rows
from pipelines.robot.heads import HEADS
from pipelines.robot.heads.base import HeadShape
from pipelines.robot.loading import Clone, load_clone, save_clone
from pipelines.robot.networks import NETWORKS, Spaces, ValueNetwork
from pipelines.robot.normalise import ActionScale, Statistics
from pipelines.robot.rollout import Chosen, Ends, Played, Player, Trace

ROWS = 16
"""Network calls have a multiple of so many rows, because matrix products treat odd ends by other code: so the numbers
of a row do not depend on how many others there are. What is added is cut off again."""

REPLAY_TOLERANCE = 1e-2
"""Largest deviation of a log-prob when the first rollout is scored again."""


class RobotPolicy:
    """A robot's policy: in each turn it commits to a chunk of ``horizon`` actions; its decisions are the action head's.

    A prompt is the start of an episode: ``inputs["seed"]`` fixes it, the text is the instruction. Episodes run side by
    side; those that are over leave the batch.

    Args:
        network: encoder of observations: a name in :data:`pipelines.robot.networks.NETWORKS`, ``{type: name,
            ...options}``, a module with ``context_dim``, or what ``RobotPolicy.load`` makes of a folder.
        env: as :func:`pipelines.robot.envs.make_envs` takes it, or :class:`pipelines.robot.envs.Envs`.
        action_head: a name in :data:`pipelines.robot.heads.HEADS` or ``{type: name, ...options}``; ``flow`` when not
            given, or as the folder has it.
        horizon: actions of a chunk; 4 when not given, or as the folder has it.
        execute: how many of them are carried out before the next chunk is made; all when not given.
        num_steps: denoising steps, of heads that have them.
        env_options: keywords for ``make_envs``.
        envs: episodes that run at a time.
        normalise: of states. ``fixed``: by mean and spread in the first demonstrations that are trained on, or as the
            folder has them; ``running``: by these and those in all rollouts so far; ``none``.
        value_head: predict returns from the context, by a network of its own.
        value_hidden: widths of its layers.
        value_lr_scale: its learning rate as a multiple of ``trainer.lr``.
        batch_size: episodes of a backward pass (unless ``trainer.micro_batch_size`` says otherwise) or an evaluation.
        turns_per_backward: turns of an episode that a backward pass holds; all when not given.
        frames: all episodes keep pictures of every turn, for rewards that look at them; else only those that an
            evaluation shows.

    Raises:
        UserError: network, head, environment and folder do not go together, or an option is wrong.
    """

    verbs = frozenset({"rollout", "decisions", "fit", "generate", "means", "entropy", "values", "denoise"})
    offers = staticmethod(building.offers)
    validate = staticmethod(building.validate)
    forwards_per_sample = staticmethod(building.forwards_per_sample)
    has_frozen_base = False

    def __init__(
        self,
        network: Any,
        env: Any,
        action_head: Item | None = None,
        horizon: Annotated[int, Field(ge=1)] | None = None,
        execute: Annotated[int, Field(ge=1)] | None = None,
        num_steps: Annotated[int, Field(ge=1)] | None = None,
        env_options: dict[str, Any] | None = None,
        envs: Annotated[int, Field(ge=1)] = 64,
        normalise: Literal["fixed", "running", "none"] = "fixed",
        value_head: bool = False,
        value_hidden: Sequence[int] = (128, 128),
        value_lr_scale: Annotated[float, Field(gt=0)] = 1.0,
        batch_size: Annotated[int, Field(ge=1)] = 256,
        turns_per_backward: Annotated[int, Field(ge=1)] | None = None,
        frames: bool = False,
    ):
        clone = network if isinstance(network, Clone) else None
        saved = clone.config if clone is not None else {}
        network = saved["network"] if clone is not None else network
        head_item = building.head_item(action_head, num_steps, saved.get("action_head"))
        self.horizon = horizon or saved.get("horizon", building.HORIZON)
        self.execute = execute or self.horizon
        if self.execute > self.horizon:
            raise UserError(f"pipeline.execute is {execute}, but a chunk has only {self.horizon} actions")
        self.envs: Envs = make_envs(env, envs, **(env_options or {})) if isinstance(env, str) else env
        spaces = Spaces(self.envs.state_dim or 0, self.envs.image_shape, self.envs.action_dim)
        encoder = network
        if not isinstance(network, nn.Module):
            encoder = building.build(NETWORKS, network, "pipeline.network", spaces)
        shape = HeadShape(encoder.context_dim, self.horizon, spaces.action_dim, encoder)
        self.head = building.build(HEADS, head_item, "pipeline.action_head", shape)
        self.encoder = encoder
        self.value = ValueNetwork(encoder.context_dim, value_hidden) if value_head else None
        self.modules = nn.ModuleDict({"encoder": encoder, "head": self.head})
        if self.value is not None:
            self.modules["value"] = self.value
        # Nothing may be drawn or averaged over the batch when a rollout is scored again.
        self.modules.eval()
        self.statistics = Statistics(spaces.state_dim)
        self.scale = getattr(encoder, "scale", None) or ActionScale(self.envs.action_low, self.envs.action_high)
        self.normalise = normalise
        if clone is not None:
            clone.put_into(self.modules, self.statistics.buffers)
        self._config = {"network": network, "action_head": head_item, "horizon": self.horizon}
        self.parameters = Parameters(
            {name: parameter for name, parameter in self.modules.named_parameters() if parameter.requires_grad},
            {f"statistics.{name}": tensor for name, tensor in self.statistics.buffers.items()} | self.head.kept(),
            {f"value.{name}": value_lr_scale for name, _ in self.value.named_parameters()} if value_head else {},
        )
        self.verbs = building.BASE_VERBS | self.head.verbs | ({"values"} if value_head else set())
        self.batch_size = batch_size
        self.turns_per_backward = turns_per_backward
        self.keep_mean = False
        self.frames = frames
        self.record = 0
        self.counters: Counter = Counter()
        self.seconds: Counter = Counter()
        self._replayed = False

    @staticmethod
    def load(model: str | None = None, network: Item | None = None) -> Any:
        """What the constructor takes as ``network``.

        Args:
            model: a folder that ``export`` wrote; its network, head, weights and statistics are taken over.
            network: see :class:`RobotPolicy`; ``mlp`` when not given.
        """
        if model is None:
            return network or building.NETWORK
        if network is not None:
            raise UserError(
                "pipeline has both 'model' and 'network', but a folder brings its own network: leave it out"
            )
        return load_clone(model)

    @property
    def device(self) -> torch.device:
        """Where the networks live; environments are on the CPU."""
        return next(iter(self.parameters)).device

    @property
    def max_turns(self) -> int:
        """Turns of the longest episode."""
        return -(-self.envs.max_steps // self.execute)

    @property
    def max_decisions(self) -> int:
        """Decisions of the longest episode."""
        return self.max_turns * self.head.decisions_per_turn

    @property
    def keep_entropy(self) -> bool:
        """Whether ``decisions`` also gives entropies, of heads that have them."""
        return self.head.keep_entropy

    @keep_entropy.setter
    def keep_entropy(self, keep: bool) -> None:
        self.head.keep_entropy = keep

    def to(self, device: torch.device | str) -> RobotPolicy:
        """Move the networks."""
        self.modules.to(device)
        return self

    def compile(self) -> None:
        """``torch.compile`` the networks in place, for batches that change."""
        for module in self.modules.values():
            module.compile(dynamic=True)

    def overview(self) -> dict[str, str]:
        """What is about to be trained, for the terminal."""
        return {"decisions": self.head.overview()}

    def report(self) -> dict[str, float]:
        """Seconds that environments and networks took in rollouts since the last call, for the metrics of a step."""
        found = {f"time/{name}": seconds for name, seconds in self.seconds.items()}
        self.seconds.clear()
        return found

    def begin_stage(self, prompts: Sequence[Prompt]) -> None:
        """As a stage begins: take statistics from its demonstrations, and let heads keep what stays as it is now."""
        shown = [prompt for prompt in prompts if prompt.target is not None]
        if shown and self.normalise != "none" and self.envs.state_dim and not self.statistics.known:
            self.statistics.add(demonstrated(shown).observation.state)
        self.head.begin_stage()

    def rollout(self, prompts: Sequence[Prompt], group_size: int, seed: int, step: int = 0) -> Rollout:
        """``group_size`` episodes from each start; see :class:`mmrl.policy.Policy`.

        What an episode draws depends on ``seed``, its prompt and its number within the group, not on the others.
        """
        turns = self.max_turns
        draws = [
            self.head.draw(turns, generator(seed, "sample", *key, k))
            for key in prompt_keys(prompts)
            for k in range(group_size)
        ]
        group = torch.arange(len(prompts)).repeat_interleave(group_size)
        samples, played, ends = self._play([prompts[i] for i in group.tolist()], torch.stack(draws), False)
        samples.group = group
        rollout = self._rollout(samples, played, ends, group)
        if not self._replayed:
            self._check_replay(rollout)
        if self.normalise == "running" and self.envs.state_dim:
            self.statistics.add(torch.cat([episode.states for episode in samples.episodes]))
        return rollout

    def generate(self, prompts: Sequence[Prompt], seeds: Sequence[int]) -> Samples:
        """One episode per start by the deterministic sampler, whose only chance is the noise that chunks start from."""
        turns = self.max_turns
        draws = [self.head.draw(turns, generator(seed, "sample"), deterministic=True) for seed in seeds]
        return self._play(prompts, torch.stack(draws), True)[0]

    @torch.no_grad()
    def _play(self, prompts: Sequence[Prompt], draws: Tensor, deterministic: bool) -> tuple[Samples, Played, Ends]:
        starts = [building.start_of(prompt) for prompt in prompts]
        # Evaluations come between training steps, whose seconds are reported.
        seconds = Counter() if deterministic else self.seconds
        player = Player(self.envs, self.counters, seconds)
        recorded = len(prompts) if self.frames else self.record if deterministic else 0
        choose = self._chooser(draws, deterministic, seconds)
        played, ends, episodes = player.play(starts, choose, recorded)
        lengths = torch.tensor([episode.steps for episode in episodes])
        return Samples(list(prompts), episodes=episodes, truncated=ends.truncated, lengths=lengths), played, ends

    def _chooser(
        self, draws: Tensor, deterministic: bool, seconds: Counter
    ) -> Callable[[Observation, Tensor, int], Chosen]:
        """What :meth:`Player.play` asks for chunks; ``draws`` ``[N, turns, m]`` are those of all episodes."""

        def choose(observation: Observation, rows: Tensor, turn: int) -> Chosen:
            began = time.perf_counter()
            n = len(rows)
            observation = self._normalised(observation)
            value = None
            # What comes of it is indexed before it enters a loss, and so no inference tensor any more.
            with torch.inference_mode():
                context = self._context(observation)
                sampled = self.head.sample(context, padded(draws[rows, turn]).to(self.device), deterministic)
                if self.value is not None and not deterministic:
                    value = self.value(context)[:n].cpu()
            if not self.keep_mean:
                sampled.mean = None
            sampled = sampled.first(n)
            actions = self.scale.clipped(sampled.actions.float().cpu())
            seconds["network"] += time.perf_counter() - began
            return Chosen(observation, sampled, actions, self.scale.to_env(actions[:, : self.execute]), value)

        return choose

    def _normalised(self, observation: Observation) -> Observation:
        if self.normalise == "none" or observation.state is None:
            return observation
        return replace(observation, state=self.statistics.normalised(observation.state))

    def _context(self, observation: Observation) -> Any:
        """The encoder's context of normalised observations, with rows added up to a multiple of :data:`ROWS`."""
        self.counters["network_rows"] += len(observation)
        observation = padded(observation)
        return self.encoder(building.moved(observation, self.device))

    def _rollout(self, samples: Samples, played: Played, ends: Ends, group: Tensor) -> Rollout:
        """Turns ``[M]`` as decisions ``[N, C * t]``."""
        turns = played.turns
        executed = turns.executed.to(played.elements.device)
        counts = played.row.bincount(minlength=len(samples))
        trace = Trace(turns, counts.cumsum(0) - counts, counts)
        _, row, number = trace.places()
        width = int(counts.max())

        def table(values: Tensor, fill: float = 0) -> Tensor:
            return spread_out(values.cpu(), row, number, len(samples), width, fill)

        t = self.head.decisions_per_turn
        value = None if played.value is None else table(played.value[:, None].expand(-1, t))
        return Rollout(
            samples,
            table(self.head.logp(played.elements, executed)),
            table(self.head.mask(executed)),
            group,
            trace,
            mean=None if played.mean is None else table(played.mean),
            value=value,
            turn=torch.arange(width).repeat_interleave(t).expand(len(samples), -1).contiguous(),
            final_value=None if value is None else self._final_value(ends),
        )

    def _final_value(self, ends: Ends) -> Tensor:
        """Predicted return ``[N]`` after the last turn, 0 where the environment came to its end."""
        observation = self._normalised(ends.observation)
        value = self.value(self._context(observation))[: len(observation)].cpu()
        return torch.where(ends.truncated, value, 0.0)

    def decisions(self, rollout: Rollout, steps: Sequence[int] | None = None) -> Decisions:
        """Score recorded decisions again, with gradient; all turns that are asked for share one call of the networks.

        Args:
            steps: columns of ``rollout.logp``; default all.
        """
        t, total = self.head.decisions_per_turn, rollout.logp.shape[1]
        columns = list(range(total)) if steps is None else list(steps)
        wanted = sorted({column // t for column in columns})
        within = sorted({column % t for column in columns})
        trace: Trace = rollout.trace
        places, row, number = trace.places(None if len(wanted) * t == total else wanted)
        turns = trace.turns[places]
        n = len(turns)
        context = self._context(turns.observation)
        record = {name: padded(tensor).to(self.device) for name, tensor in turns.record.items()}
        found = self.head.decisions(context, record, padded(turns.executed).to(self.device), within)
        if self.value is not None:
            value = self.value(context)
            found = replace(found, value=value[:, None].expand(-1, len(within)))

        def table(values: Tensor, fill: float) -> Tensor:
            wide = spread_out(values[:n], row, number, len(trace), len(wanted), fill)
            return wide if order == list(range(wide.shape[1])) else wide[:, order]

        order = [wanted.index(column // t) * len(within) + within.index(column % t) for column in columns]
        # A divergence divides by std: where there is no decision it must not be 0.
        fills = {"std": 1.0, "dt": 1.0}
        present = {name: value for name, value in vars(found).items() if value is not None}
        return Decisions(**{name: table(value, fills.get(name, 0.0)) for name, value in present.items()})

    def decision_chunks(self, rollout: Rollout) -> list[list[int]]:
        """Columns of ``turns_per_backward`` turns each."""
        t, turns = self.head.decisions_per_turn, int(rollout.trace.count.max())
        if self.turns_per_backward is None or turns <= self.turns_per_backward:
            return [list(range(rollout.logp.shape[1]))]
        size = self.turns_per_backward
        return [list(range(first * t, min(first + size, turns) * t)) for first in range(0, turns, size)]

    def fit(self, samples: Samples | Rollout, seeds: Sequence[int]) -> Tensor:
        """Loss ``[N]`` of explaining the actions of episodes (mean over turns) or of prompts' demonstrations."""
        chunks, context, normals = self._explained(samples, seeds)
        loss = self.head.fit(context, chunks.actions, chunks.executed, normals)[: len(chunks.row)]
        return chunks.mean(loss)

    def denoise(self, samples: Samples | Rollout, seeds: Sequence[int], at: Denoising | None = None) -> Denoising:
        """Noise all chunks again and predict; see :meth:`mmrl.policy.Policy.denoise`."""
        chunks, context, normals = self._explained(samples, seeds)
        at = None if at is None else widened_rows(at, padded)
        found = self.head.denoise(context, chunks.actions, chunks.executed, normals, at)
        return cut(found, chunks.row)

    def _explained(self, samples: Samples | Rollout, seeds: Sequence[int]) -> tuple[Chunks, Any, Tensor]:
        """Chunks to explain, padded but for their ``row``, with contexts and normal numbers."""
        if isinstance(samples, Rollout):
            chunks = of_rollout(samples.trace)
        else:
            chunks = demonstrated(samples.prompts)
            chunks.observation = self._normalised(chunks.observation)
            chunks.actions = self.scale.from_env(chunks.actions)
        normals = chunks.normals(seeds, self.head.fit_normals)
        context = self._context(chunks.observation)
        actions, executed = (padded(x).to(self.device) for x in (chunks.actions, chunks.executed))
        return replace(chunks, actions=actions, executed=executed), context, padded(normals).to(self.device)

    def reference(self) -> contextlib.AbstractContextManager[None]:
        """Inside, the policy is the snapshot ``reference``."""
        if "reference" not in self.parameters.snapshots:
            raise RuntimeError("take_snapshot('reference') before training starts")
        return self.parameters.swapped("reference")

    def export(self, folder: Path) -> None:
        """A folder that ``pipeline.model`` takes: weights, statistics of observations and what they are for."""
        config = {name: None if isinstance(item, nn.Module) else item for name, item in self._config.items()}
        save_clone(folder, config, self.modules, self.statistics.buffers)

    @torch.no_grad()
    def _check_replay(self, rollout: Rollout) -> None:
        """Score some episodes of the first rollout again: the sampler's log-probs must be the scorer's."""
        part = rollout[: self.batch_size]
        off = torch.where(part.mask, (self.decisions(part).logp.cpu() - part.logp).abs(), 0.0)
        if off.max() > REPLAY_TOLERANCE:
            row, column = divmod(int(off.argmax()), off.shape[1])
            raise UserError(
                f"the action head does not score what it sampled: the log-prob of decision {column} of "
                f"'{part.samples.prompts[row].id}' was {part.logp[row, column]:.4f} and is off by "
                f"{off[row, column]:.4f} when scored again; its sampler and scorer differ, or a network draws at "
                "random or looks at other rows"
            )
        self._replayed = True


def padded(rows: Any) -> Any:
    """``rows`` with the first repeated at the end, up to a multiple of :data:`ROWS`."""
    n = len(rows)
    missing = -n % ROWS
    return rows if missing == 0 else rows[torch.cat([torch.arange(n), torch.zeros(missing, dtype=torch.long)])]


def spread_out(values: Tensor, row: Tensor, turn: Tensor, rows: int, turns: int, fill: float) -> Tensor:
    """Values ``[M, k, ...]`` of turns as ``[rows, turns * k, ...]``, ``fill`` where there is no turn."""
    row, turn = row.to(values.device), turn.to(values.device)
    wide = values.new_full((rows * turns, *values.shape[1:]), fill)
    return wide.index_copy(0, row * turns + turn, values).unflatten(0, (rows, turns)).flatten(1, 2)
