"""Episodes of a policy: rows of environments played side by side, each until it is over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmrl.errors import UserError
from mmrl.types import Episode, Rows
from pipelines.robot.envs import Envs, Observation, Step
from pipelines.robot.heads.base import Sampled

ATTEMPTS = 3
"""How often an episode is begun whose environment crashes or hangs."""


class Record(Mapping[str, Tensor]):
    """Tensors by name with one row a turn; indexes and joins like one of them."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = dict(tensors)

    def __getitem__(self, key: str | slice | Tensor) -> Tensor | Record:
        if isinstance(key, str):
            return self.tensors[key]
        return Record({name: tensor[key] for name, tensor in self.tensors.items()})

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    @classmethod
    def cat(cls, parts: Sequence[Record]) -> Record:
        """Join row-wise."""
        return cls({name: torch.cat([part[name] for part in parts]) for name in parts[0]})


@dataclass(eq=False)
class Turns(Rows):
    """Turns with what scores them again; of one episode in order, or of several one after the other.

    Attributes:
        observation: as the network saw it, normalised.
        actions: ``[n, H, D]`` in the policy's scale, as far as they took effect.
        executed: long ``[n]``.
        record: the action head's.
    """

    observation: Observation
    actions: Tensor
    executed: Tensor
    record: Record

    def __len__(self) -> int:
        return len(self.executed)


class Trace:
    """The turns of N episodes without padding; slicing copies nothing.

    Args:
        turns: of all episodes, maybe of others as well.
        start, count: long ``[N]``, where each episode's turns begin and how many there are.
    """

    def __init__(self, turns: Turns, start: Tensor, count: Tensor):
        self.turns, self.start, self.count = turns, start, count

    def __len__(self) -> int:
        return len(self.start)

    def __getitem__(self, rows: Tensor) -> Trace:
        return Trace(self.turns, self.start[rows], self.count[rows])

    @classmethod
    def cat(cls, parts: Sequence[Trace]) -> Trace:
        """Join row-wise; parts of one rollout go on sharing its turns."""
        shared = {id(part.turns): part.turns for part in parts}
        ends = torch.tensor([len(turns) for turns in shared.values()]).cumsum(0)
        offsets = dict(zip(shared, [0, *ends.tolist()], strict=False))
        start = torch.cat([part.start + offsets[id(part.turns)] for part in parts])
        return cls(Turns.cat(list(shared.values())), start, torch.cat([part.count for part in parts]))

    def places(self, chosen: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """For M turns: their place in ``turns``, their row and their number in ``chosen`` (by default: in the episode).

        Args:
            chosen: numbers of the turns to take of each episode, where it has them; by default all.
        """
        if chosen is None:
            row = torch.arange(len(self)).repeat_interleave(self.count)
            number = torch.arange(len(row)) - (self.count.cumsum(0) - self.count)[row]
            return self.start[row] + number, row, number
        numbers = torch.tensor(list(chosen))
        row, place = (numbers < self.count[:, None]).nonzero(as_tuple=True)
        return self.start[row] + numbers[place], row, place


@dataclass(eq=False)
class Chosen:
    """Chunks for n episodes that go on, and how they came about.

    Attributes:
        observation: normalised.
        sampled: by the action head.
        actions: ``[n, H, D]``, those of ``sampled`` as far as they take effect.
        env_actions: ``[n, h, D]``, the first of these as the environment takes them.
        value: ``[n]`` predicted return, from a policy with a value head.
    """

    observation: Observation
    sampled: Sampled
    actions: Tensor
    env_actions: Tensor
    value: Tensor | None = None


@dataclass(eq=False)
class Played(Rows):
    """All turns of N episodes, those of an episode together and in order.

    Attributes:
        row: long ``[M]``, the episode of each turn.
        turns: what scores them again.
        rewards, env_actions: ``[M, H]`` and ``[M, H, D]``.
        elements: ``[M, ...]`` log-probs before reduction; None from the deterministic sampler.
        mean, value: ``[M, t, H, D]`` and ``[M]``, where there are any.
    """

    row: Tensor
    turns: Turns
    rewards: Tensor
    env_actions: Tensor
    elements: Tensor | None
    mean: Tensor | None
    value: Tensor | None

    def __len__(self) -> int:
        return len(self.row)


@dataclass(eq=False)
class Seen(Rows):
    """States before each turn and at the end, with the episode that each belongs to."""

    row: Tensor
    state: Tensor | None


@dataclass
class Ends:
    """How N episodes ended; ``observation`` is the final one."""

    observation: Observation
    success: Tensor
    terminated: Tensor
    truncated: Tensor
    info: list[dict[str, float]]


class Player:
    """Plays one set of episodes in environments, as many at a time as there are.

    Args:
        envs: where.
        counters: get ``episodes``, ``turns``, ``env_steps`` and ``dropped``.
        seconds: gets those that the environments took, as ``env``.
    """

    def __init__(self, envs: Envs, counters: Counter, seconds: Counter):
        self.envs, self.counters, self.seconds = envs, counters, seconds
        self._parts: list[Played] = []
        self._seen: list[Seen] = []
        self._frames: dict[int, list[Tensor]] = {}
        self._last: dict[int, tuple[Step, int]] = {}
        self._success = torch.zeros(0, dtype=torch.bool)

    def play(
        self, starts: Sequence[int], choose: Callable[[Observation, Tensor, int], Chosen], record: int = 0
    ) -> tuple[Played, Ends, list[Episode]]:
        """One episode from each start.

        An episode that is lost with a crashed or hung worker is counted and played again.

        Args:
            starts: seeds of the environments.
            choose: ``choose(observation, rows, turn)`` gives chunks for the episodes ``rows`` that are not over.
            record: the first so many episodes keep pictures.

        Raises:
            UserError: an episode was lost three times.
        """
        self._success = torch.zeros(len(starts), dtype=torch.bool)
        waiting = list(range(len(starts)))
        for _ in range(ATTEMPTS):
            lost: list[int] = []
            for begin in range(0, len(waiting), self.envs.size):
                lost += self._wave(waiting[begin : begin + self.envs.size], starts, choose, record)
            waiting = lost
            if not waiting:
                break
        else:
            raise UserError(
                f"env '{self.envs.name}' crashed or hung {ATTEMPTS} times in the episode from seed "
                f"{starts[waiting[0]]}: mend the environment, or raise its timeout"
            )
        played = Played.cat(self._parts)
        played = played[played.row.argsort(stable=True)]
        ends = self._ends(len(starts))
        self.counters.update(episodes=len(starts), turns=len(played), env_steps=int(played.turns.executed.sum()))
        return played, ends, self._episodes(played, ends)

    def _wave(self, rows: list[int], starts: Sequence[int], choose: Callable, record: int) -> list[int]:
        """Play the episodes ``rows`` side by side; returns those that were lost."""
        numbers = torch.tensor(rows)
        parts: list[Played] = []
        seen: list[Seen] = []
        lost: list[int] = []
        observation = self._timed(self.envs.reset, [starts[row] for row in rows])
        live, turn = torch.arange(len(rows)), 0
        while len(live):
            row = numbers[live]
            seen.append(self._look(observation, row, live, record))
            chosen = choose(observation, row, turn)
            step = self._timed(self.envs.step, live, chosen.env_actions)
            sampled = chosen.sampled
            turns = Turns(chosen.observation, chosen.actions, step.executed, Record(sampled.record))
            parts.append(
                Played(row, turns, step.rewards, chosen.env_actions, sampled.elements, sampled.mean, chosen.value)
            )
            self._success[row] |= step.success
            done = step.done
            if done.any():
                over = done.nonzero().flatten()
                lost += row[step.dropped].tolist()
                seen.append(self._look(step.observation[over], row[over], live[over], record))
                for place, number in zip(over.tolist(), row[over].tolist(), strict=True):
                    self._last[number] = (step, place)
            live, observation, turn = live[~done], step.observation[~done] if done.any() else step.observation, turn + 1
        if lost:
            self.counters["dropped"] += len(lost)
            self._success[lost] = False
            gone = torch.tensor(lost)
            parts = [part[~torch.isin(part.row, gone)] for part in parts]
            seen = [part[~torch.isin(part.row, gone)] for part in seen]
            self._frames = {row: frames for row, frames in self._frames.items() if row not in lost}
        self._parts += parts
        self._seen += seen
        return lost

    def _timed(self, call: Callable, *args) -> Observation | Step:
        began = time.perf_counter()
        found = call(*args)
        self.seconds["env"] += time.perf_counter() - began
        return found

    def _look(self, observation: Observation, row: Tensor, live: Tensor, record: int) -> Seen:
        wanted = row < record
        if record and wanted.any():
            pictures = self._timed(self.envs.render, live[wanted])
            for number, picture in zip(row[wanted].tolist(), pictures, strict=True):
                self._frames.setdefault(number, []).append(picture)
        return Seen(row, observation.state)

    def _ends(self, count: int) -> Ends:
        """What the last step said of each episode."""
        by_step: dict[int, tuple[Step, list[int], list[int]]] = {}
        for number in range(count):
            step, place = self._last[number]
            _, places, numbers = by_step.setdefault(id(step), (step, [], []))
            places.append(place)
            numbers.append(number)
        order = torch.tensor([number for _, _, numbers in by_step.values() for number in numbers]).argsort()
        groups = [(step, torch.tensor(places)) for step, places, _ in by_step.values()]
        observation = Observation.cat([step.observation[places] for step, places in groups])[order]
        terminated, truncated = (
            torch.cat([getattr(step, name)[places] for step, places in groups])[order]
            for name in ("terminated", "truncated")
        )
        info = [numbers for step, places in groups for numbers in _numbers(step.info, places)]
        return Ends(observation, self._success, terminated, truncated, [info[i] for i in order.tolist()])

    def _episodes(self, played: Played, ends: Ends) -> list[Episode]:
        counts = played.row.bincount(minlength=len(ends.success))
        sizes, longer = counts.tolist(), (counts + 1).tolist()
        row = torch.cat([part.row for part in self._seen])
        order = row.argsort(stable=True)
        states = [None] * len(sizes)
        if self._seen[0].state is not None:
            states = torch.cat([part.state for part in self._seen])[order].split(longer)
        frames = [torch.stack(self._frames[row]) if row in self._frames else None for row in range(len(sizes))]
        parts = [x.split(sizes) for x in (played.rewards, played.turns.executed, played.env_actions)]
        success, terminated = ends.success.tolist(), ends.terminated.tolist()
        return [
            Episode(*columns) for columns in zip(*parts, success, terminated, states, frames, ends.info, strict=True)
        ]


def _numbers(info: Mapping[str, Tensor], places: Tensor) -> list[dict[str, float]]:
    """What an environment gave with the last action, by row, where it gave anything."""
    columns = {name: values[places].tolist() for name, values in info.items()}
    return [{name: values[k] for name, values in columns.items() if values[k] == values[k]} for k in range(len(places))]
