"""The plan: which documents make up every pack of every optimizer step, computed from the index alone.

It is a deterministic stream of (index, configuration, seed). Its state is a few kilobytes of cursors and sample numbers,
and knows nothing of ranks or workers.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from m4train.config import BatchRampConfig, DataConfig
from m4train.data.plan.balance import assign_by_kind
from m4train.data.plan.mixture import Shares, check_mixture, weights_at
from m4train.data.plan.packing import Packer, Unit
from m4train.data.plan.sample_order import Dropped, NextSample, SampleOrder
from m4train.data.source import Source
from m4train.errors import ConfigError, DataError
from m4train.pack_costs import PackCosts


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

    @property
    def squared(self) -> int:
        """Squared tokens, summed over the segments."""
        return sum(unit.tokens * unit.tokens for unit in self.units)

    def cost(self, costs: PackCosts) -> float:
        """Estimated work, in the unit of `costs`."""
        return costs.of(self.tokens, self.squared, self.frames)


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: `step` counts from 1, `state` continues with the next one."""

    step: int
    packs: tuple[PlannedPack, ...]
    dropped: tuple[Dropped, ...]
    state: dict[str, Any]


_NO_RAMP = BatchRampConfig()


def packs_at(step: int, global_batch_size: int, ramp: BatchRampConfig) -> int:
    """Packs of optimizer step `step`, counted from 1: a function of the step alone, so that a resumed run continues the same."""
    if ramp.start is None:
        return global_batch_size
    return min(global_batch_size, ramp.start + ramp.increment * ((step - 1) // ramp.steps))


class Plan:
    """The steps of a run, each of `global_batch_size` packs, or fewer while `batch_ramp` lasts.

    Picklable; computes nothing before `steps` is iterated.

    Raises ConfigError for a mixture that cannot work.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        data: DataConfig,
        seed: int,
        global_batch_size: int,
        batch_ramp: BatchRampConfig = _NO_RAMP,
    ) -> None:
        if not sources:
            raise ConfigError("data.sources is empty: name at least one source with a path.")
        check_mixture(sources, data.mixture)
        self.sources = list(sources)
        self.data = data
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.batch_ramp = batch_ramp
        self.costs = [PackCosts(0.0, 1.0, data.cost.squared, data.cost.frame)]  # of each kind of device, in tokens
        self.kinds: list[int] = []  # of which kind that of each rank is; empty: all of the first

    def measured(self, costs: Sequence[PackCosts], kinds: Sequence[int]) -> None:
        """From now on packs are shared among ranks by these costs, one for each kind of device; kinds[rank] is that of a rank."""
        self.costs, self.kinds = list(costs), list(kinds)

    def shared(self, packs: Sequence[PlannedPack], ranks: int, micro_batch_size: int) -> list[list[list[int]]]:
        """Which rank takes which of the packs of a step, by their estimated costs: result[rank][micro_batch]."""
        costs = [[pack.cost(each) for pack in packs] for each in self.costs]
        return assign_by_kind(costs, self.kinds or [0] * ranks, micro_batch_size)

    def fingerprint(self) -> str:
        """Names everything the sequence of packs depends on."""
        data = self.data
        settings: list[Any] = [data.sequence_length, data.images_per_pack, data.packing_pool]
        settings += [data.long_documents, data.shuffle, data.shuffle_window, data.epochs, asdict(data.mixture)]
        settings += ["truncate"] if data.long_conversations == "truncate" else []
        if self.batch_ramp.start is not None:
            settings.append(asdict(self.batch_ramp))
        sources = [
            [source.name, source.config.weight, source.config.epochs, source.config.images.scaled_decode]
            + [source.index.digest()]
            for source in self.sources
        ]
        sources += [[s.name, "taken down", s.index.taken_down()] for s in self.sources if s.index.taken_down()]
        sources += [[source.name, "by shard"] for source in self.sources if source.ordered_by_shard]
        sources += [[s.name, "image range", *s.config.image_range] for s in self.sources if s.config.image_range]
        return _named([self.seed, self.global_batch_size, settings, sources])

    def content(self) -> str:
        """Names what a state refers to: the samples, their order and their sizes. Other weights, epochs or batch sizes give
        other steps from there on, but leave a state its meaning."""
        data = self.data
        settings = [data.sequence_length, data.images_per_pack, data.packing_pool, data.long_documents]
        settings += [data.shuffle, data.shuffle_window]
        sources = [
            [source.name, source.config.images.scaled_decode, source.index.digest(), source.ordered_by_shard]
            + list(source.config.image_range)
            for source in self.sources
        ]
        return _named([self.seed, settings, sources])

    def made(self, state: dict[str, Any]) -> bool:
        """Whether a state is of this very plan, and not of one with other weights, epochs or batch sizes. Raises DataError for one
        of other data."""
        same = state.get("plan") == self.fingerprint()
        if not same and state.get("content") != self.content():
            named = ", ".join(f"{source.name} in {source.config.path}" for source in self.sources)
            raise DataError(
                "The data of this run is not what the checkpoint was made with (sources, budgets, seed, tokenizer, or the "
                f"content of the shards differ; it has {named[:500]}): restore them, or start a new run from its weights."
            )
        return bool(same)

    def steps(self, state: dict[str, Any] | None = None) -> Iterator[StepPlan]:
        """The steps from the beginning, or those after `state`. Raises DataError for the state of another plan."""
        cursor = _Cursor(self)
        if state is not None:
            cursor.load_state(state, self.made(state))
        while (step := cursor.next_step()) is not None:
            yield step


def _named(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()


class _Cursor:
    """A position in the plan."""

    def __init__(self, plan: Plan) -> None:
        data = plan.data
        self._plan = plan
        self._names = {"plan": plan.fingerprint(), "content": plan.content()}
        self._orders = {s.name: SampleOrder(s, n, data, plan.seed) for n, s in enumerate(plan.sources)}
        self._changes = sorted(data.mixture.schedule)
        self._shares = Shares(weights_at(1, plan.sources, data.mixture))
        self._packer = Packer(data.sequence_length, data.images_per_pack, data.packing_pool)
        self._active = list(self._orders)
        self._waiting: deque[Unit] = deque()  # parts of a document that was cut
        self._closed: deque[list[Unit]] = deque()
        self._step = self._packs = 0

    def next_step(self) -> StepPlan | None:
        """The next step; the last one of a finite plan may have fewer packs."""
        size = packs_at(self._step + 1, self._plan.global_batch_size, self._plan.batch_ramp)
        if self._step and self._step + 1 in self._changes:
            self._shares.restart(weights_at(self._step + 1, self._plan.sources, self._plan.data.mixture))
        dropped: list[Dropped] = []
        while len(self._closed) < size:
            unit = self._next_unit(dropped)
            if unit is None:
                self._closed.extend(self._packer.flush())
                break
            self._closed.extend(self._packer.add(unit))
        if not self._closed:
            return None
        self._heads(dropped)  # what the end of a source drops is reported with the last step
        packs = []
        for _ in range(min(size, len(self._closed))):
            packs.append(PlannedPack(self._packs, tuple(self._closed.popleft())))
            self._packs += 1
        self._step += 1
        return StepPlan(self._step, tuple(packs), tuple(dropped), self.state())

    def _next_unit(self, dropped: list[Dropped]) -> Unit | None:
        while not self._waiting:
            draw = self._next_sample(dropped)
            if draw is None:
                return None
            self._waiting.extend(draw.units)
            dropped.extend(draw.dropped)
        return self._waiting.popleft()

    def _next_sample(self, dropped: list[Dropped]) -> NextSample | None:
        """Takes the next sample from the source whose turn it is; None when all have ended."""
        sizes = {name: head.amount for name, head in self._heads(dropped).items()}
        if not sizes:
            return None
        name = self._shares.next(sizes)
        self._shares.add(name, sizes[name])
        return self._orders[name].take()

    def _heads(self, dropped: list[Dropped]) -> dict[str, NextSample]:
        """The next sample of every source that has one; those that have ended leave the mixture."""
        heads = {}
        for name in list(self._active):
            head = self._orders[name].peek()
            if head is not None:
                heads[name] = head
                continue
            dropped.extend(self._orders[name].take().dropped)
            self._active.remove(name)
            self._shares.restart()
        return heads

    def state(self) -> dict[str, Any]:
        """JSON, kilobytes."""
        return {
            **self._names,
            "step": self._step,
            "packs": self._packs,
            "streams": {name: stream.state() for name, stream in self._orders.items()},
            "active": list(self._active),
            "shares": dict(self._shares.amounts),
            "pool": self._packer.state(),
            "waiting": [list(unit) for unit in self._waiting],
            "closed": [[list(unit) for unit in units] for units in self._closed],
        }

    def load_state(self, state: dict[str, Any], same: bool) -> None:
        """Goes to `state`. If it is not of the `same` plan, sources that had ended may go on, and shares are counted again from zero."""
        self._step, self._packs = state["step"], state["packs"]
        for name, stream in self._orders.items():
            stream.load_state(state["streams"][name])
        self._shares.restart(weights_at(max(1, self._step), self._plan.sources, self._plan.data.mixture))
        if same:
            self._active = list(state["active"])
            self._shares.amounts = {name: int(amount) for name, amount in state["shares"].items()}
        self._packer.load_state(state["pool"])
        self._waiting = deque(Unit(*unit) for unit in state["waiting"])
        self._closed = deque([Unit(*unit) for unit in units] for units in state["closed"])
