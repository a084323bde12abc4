"""The plan: which documents make up every pack of every optimizer step, computed from the index alone.

It is a deterministic stream of (index, configuration, seed). Its state is a few kilobytes of cursors and sample numbers,
and knows nothing of ranks or workers.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from m4train.config import CostConfig, DataConfig
from m4train.data.mixture import Mixture
from m4train.data.packing import Packer, Unit
from m4train.data.permutation import Permutation
from m4train.data.source import Source
from m4train.data.splitting import is_document, split_pieces
from m4train.errors import ConfigError, DataError

_CHUNK = 4096  # samples of the order computed at a time


@dataclass(frozen=True)
class PlannedPack:
    """One pack: `number` counts the packs of the run."""

    number: int
    units: tuple[Unit, ...]

    @property
    def tokens(self) -> int:
        return sum(unit.tokens for unit in self.units)

    @property
    def frames(self) -> int:
        return sum(unit.frames for unit in self.units)

    def cost(self, weights: CostConfig) -> float:
        """Estimated work, in tokens."""
        squared = sum(unit.tokens * unit.tokens for unit in self.units)
        return self.tokens + weights.squared * squared + weights.frame * self.frames


@dataclass(frozen=True)
class Dropped:
    """A sample the plan passed over: the index knows it is bad, or it is too long to be packed."""

    source: int
    sample: int
    reason: str
    detail: str


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `step` counts from 1, `state` continues with the next one."""

    step: int
    packs: tuple[PlannedPack, ...]
    dropped: tuple[Dropped, ...]
    state: dict[str, Any]


class Plan:
    """The steps of a run, each of `global_batch_size` packs.

    Raises ConfigError for weights or budgets that cannot work.
    """

    def __init__(self, sources: Sequence[Source], data: DataConfig, seed: int, global_batch_size: int) -> None:
        if not sources:
            raise ConfigError("data.sources is empty: name at least one source with a path.")
        for source in sources:
            if not source.config.weight > 0:
                raise ConfigError(f"data.sources.{source.name}.weight is {source.config.weight}, but must be positive.")
        self.sources = list(sources)
        self.data = data
        self.seed = seed
        self.global_batch_size = global_batch_size

    def fingerprint(self) -> str:
        """Names everything the sequence of packs depends on; a state is only good for the plan that made it."""
        data = self.data
        settings = [
            data.sequence_length,
            data.images_per_pack,
            data.open_packs,
            data.long_documents,
            data.shuffle,
            data.epochs,
        ]
        sources = [[source.name, source.config.weight, source.index.digest()] for source in self.sources]
        described = json.dumps([self.seed, self.global_batch_size, settings, sources])
        return hashlib.blake2b(described.encode(), digest_size=8).hexdigest()

    def steps(self, state: dict[str, Any] | None = None) -> Iterator[StepPlan]:
        """The steps from the beginning, or those after `state`. Raises DataError for the state of another plan."""
        cursor = _Cursor(self)
        if state is not None:
            if state["plan"] != self.fingerprint():
                raise DataError(
                    "The data of this run is not what the checkpoint was made with (sources, weights, budgets, batch size, "
                    "seed or tokenizer differ): restore the settings, or start a new run from the checkpoint's weights."
                )
            cursor.load_state(state)
        while (step := cursor.next_step()) is not None:
            yield step


class _Cursor:
    """A position in the plan."""

    def __init__(self, plan: Plan) -> None:
        data = plan.data
        self._plan = plan
        self._fingerprint = plan.fingerprint()
        self._orders = {source.name: _Order(source, number, plan) for number, source in enumerate(plan.sources)}
        self._mixture = Mixture({source.name: source.config.weight for source in plan.sources})
        self._packer = Packer(data.sequence_length, data.images_per_pack, data.open_packs)
        self._waiting: deque[Unit] = deque()  # parts of a document that was cut
        self._closed: deque[list[Unit]] = deque()
        self._step = self._packs = 0

    def next_step(self) -> StepPlan | None:
        """The next step; the last one of a finite plan may have fewer packs."""
        size = self._plan.global_batch_size
        dropped: list[Dropped] = []
        while len(self._closed) < size:
            unit = self._next_unit(dropped)
            if unit is None:
                self._closed.extend(self._packer.flush())
                break
            self._closed.extend(self._packer.add(unit))
        if not self._closed:
            return None
        packs = []
        for _ in range(min(size, len(self._closed))):
            packs.append(PlannedPack(self._packs, tuple(self._closed.popleft())))
            self._packs += 1
        self._step += 1
        return StepPlan(self._step, tuple(packs), tuple(dropped), self.state())

    def _next_unit(self, dropped: list[Dropped]) -> Unit | None:
        fruitless, samples = 0, sum(len(source) for source in self._plan.sources)
        while not self._waiting:
            if not self._mixture.active:
                return None
            if fruitless > 2 * samples:
                raise DataError(f"None of {samples} samples can be packed, last: {dropped[-1].detail}.")
            fruitless += 1
            name = self._mixture.next()
            drawn = self._orders[name].next()
            if drawn is None:
                self._mixture.end(name)
                continue
            self._waiting.extend(self._units(*drawn, dropped))
        return self._waiting.popleft()

    def _units(self, source: int, sample: int, epoch: int, dropped: list[Dropped]) -> list[Unit]:
        data = self._plan.data
        shard, number = self._plan.sources[source].index.locate(sample)
        tokens, frames = int(shard.lengths[number]), int(shard.frames[number])
        if number in shard.bad:
            dropped.append(Dropped(source, sample, *shard.bad[number]))
            return []
        if tokens <= data.sequence_length and frames <= data.images_per_pack:
            return [Unit(source, sample, epoch, 0, -1, tokens, frames)]
        pieces = shard.pieces(number)
        runs = []
        if data.long_documents == "split" and is_document(pieces):
            runs = split_pieces(pieces, data.sequence_length, data.images_per_pack)
        if not runs:
            limits = f"data.sequence_length={data.sequence_length} and data.images_per_pack={data.images_per_pack}"
            dropped.append(
                Dropped(source, sample, "too_long", f"{tokens} tokens and {frames} frames do not fit {limits}")
            )
        return [
            Unit(
                source,
                sample,
                epoch,
                first,
                last,
                int(pieces.tokens[first:last].sum()),
                int(pieces.frames[first:last].sum()),
            )
            for first, last in runs
        ]

    def state(self) -> dict[str, Any]:
        """JSON, kilobytes."""
        return {
            "plan": self._fingerprint,
            "step": self._step,
            "packs": self._packs,
            "orders": {name: order.state() for name, order in self._orders.items()},
            "mixture": self._mixture.state(),
            "open": self._packer.state(),
            "waiting": [list(unit) for unit in self._waiting],
            "closed": [[list(unit) for unit in units] for units in self._closed],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._step, self._packs = state["step"], state["packs"]
        for name, order in self._orders.items():
            order.load_state(state["orders"][name])
        self._mixture.load_state(state["mixture"])
        self._packer.load_state(state["open"])
        self._waiting = deque(Unit(*unit) for unit in state["waiting"])
        self._closed = deque([Unit(*unit) for unit in units] for units in state["closed"])


class _Order:
    """The samples of one source: every one once per epoch, in an order of its own each epoch."""

    def __init__(self, source: Source, number: int, plan: Plan) -> None:
        self._source, self._number, self._plan = source, number, plan
        self._epoch = self._position = 0
        self._chunk: list[int] = []
        self._chunk_start = 0

    def next(self) -> tuple[int, int, int] | None:
        """Source number, sample and epoch of the next sample; None after the last epoch."""
        if self._position == len(self._source):
            self._epoch, self._position, self._chunk = self._epoch + 1, 0, []
        epochs = self._plan.data.epochs
        if epochs is not None and self._epoch >= epochs:
            return None
        if not self._plan.data.shuffle:
            sample = self._position
        else:
            if not self._chunk_start <= self._position < self._chunk_start + len(self._chunk):
                key = f"{self._plan.seed} {self._source.name} {self._epoch}"
                self._chunk_start = self._position
                self._chunk = Permutation(len(self._source), key).take(self._position, _CHUNK).tolist()
            sample = self._chunk[self._position - self._chunk_start]
        self._position += 1
        return self._number, sample, self._epoch

    def state(self) -> dict[str, int]:
        return {"epoch": self._epoch, "position": self._position}

    def load_state(self, state: dict[str, int]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        self._chunk = []
