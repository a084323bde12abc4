"""The loader: reads, decodes and collates this rank's part of the plan in worker processes, in order.

Workers hand batches over through shared memory held by file descriptors, which the kernel frees with the last process,
however it ends.
"""

from __future__ import annotations

import signal
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice, repeat
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from m4train.batch import PackedBatch
from m4train.config import AugmentConfig, DataConfig, MixtureConfig
from m4train.data.documents.image_layout import FRAMES, Frames
from m4train.data.loading.collate import Collator
from m4train.data.loading.processes import lifeline, live_with_the_trainer, worker_context
from m4train.data.loading.quarantine import QuarantineEntry
from m4train.data.loading.rank_plan import RankPlan, RankStep, planned_aside
from m4train.data.loading.whereabouts import Whereabouts
from m4train.data.plan.plan import Plan, PlannedPack
from m4train.data.source import Source
from m4train.errors import DataError, M4Error
from m4train.processing.protocol import SampleProcessor

# Micro-batches of each worker that are asked of an object store before their turn: so many, and enough for so many samples.
# A sample takes 10 ms or more to decode and a store 50 to 100 ms to answer.
_READ_AHEAD, _SAMPLES_AHEAD = 2, 16


@dataclass(frozen=True)
class StepBatch:
    """What one rank consumes in one optimizer step.

    `step` counts from 1; `state` continues with the step after it, on any number of ranks and workers. `bad` names the
    samples this rank had to leave out. `wait` is how long the trainer waited for this batch, in seconds.
    """

    step: int
    micro_batches: list[PackedBatch]
    state: dict[str, Any]
    bad: list[QuarantineEntry] = field(default_factory=list)
    wait: float = 0.0

    @property
    def loss_tokens(self) -> int:
        """Targets of this rank in this step."""
        return sum(batch.loss_tokens for batch in self.micro_batches)

    @property
    def documents(self) -> int:
        """Documents of this rank in this step."""
        return sum(len(batch.documents) for batch in self.micro_batches)

    def counts(self) -> dict[str, Counter[str]]:
        """Per source: `documents`, `tokens`, `images` and `loss_tokens` of this rank in this step."""
        result: dict[str, Counter[str]] = {}
        for batch in self.micro_batches:
            for record in batch.documents:
                counter = result.setdefault(record.source, Counter())
                counter.update(documents=1, tokens=record.tokens, images=record.images, loss_tokens=record.loss_tokens)
        return result


@dataclass(frozen=True)
class _Task:
    """One micro-batch, as a worker is told to build it, and packs of later ones that the same worker builds."""

    step: int
    packs: tuple[PlannedPack, ...]
    soon: tuple[PlannedPack, ...] = ()


class _Builder(Dataset):
    """The map from task to micro-batch that runs in the workers. An error comes back as a value, to be raised in order."""

    def __init__(self, collator: Collator, whereabouts: Whereabouts) -> None:
        self._collator = collator
        self._whereabouts = whereabouts

    def __getitem__(self, task: _Task) -> tuple[PackedBatch, list[QuarantineEntry]] | M4Error:
        try:
            return self._collator.batch(task.packs, task.step, self._whereabouts, task.soon)
        except M4Error as error:
            return error
        finally:
            self._whereabouts(None)


class Loader:
    """Iterates over the optimizer steps of one rank, as `StepBatch`es.

    `layout` says how the model takes images. Continues after `state` if one is given; otherwise begins with step
    `start_step` + 1. Ends after `stop_step`, or with the plan. Every rank gets the same number of micro-batches in each
    step. Iterating raises DataError when a worker dies, naming the step and the sample it was at.
    """

    def __init__(
        self,
        plan: Plan,
        processor: SampleProcessor,
        data: DataConfig,
        *,
        seed: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        layout: Frames = FRAMES,
    ) -> None:
        if state is not None:
            plan.made(state)  # is refused before processes start, which would say that they were left
        self.plan = plan
        self.data = data
        self._ahead = data.prefetch_steps * -(-plan.global_batch_size // (world_size * micro_batch_size))
        self._collator = Collator(plan.sources, processor, data, seed, layout)
        start = state["step"] if state is not None else start_step
        self._rank_plan = RankPlan(plan, rank, world_size, micro_batch_size, state, start, stop_step)
        self._in_flight: deque[_Task] = deque()
        self._planned: deque[RankStep] = deque()  # steps of which micro-batches were handed to workers

    def __iter__(self) -> Iterator[StepBatch]:
        self._in_flight.clear()
        self._planned.clear()
        batches = self._batches()
        while True:
            begun = time.perf_counter()
            micro_batches, bad = [], []
            first = next(batches, None)
            if first is None:
                return
            step = self._planned.popleft()
            for built in (first, *(next(batches) for _ in step.micro_batches[1:])):
                micro_batches.append(built[0])
                bad.extend(built[1])
            if self._rank_plan.rank == 0:
                bad.extend(self._dropped(step))
            yield StepBatch(step.step, micro_batches, step.state, bad, time.perf_counter() - begun)

    def _tasks(self) -> Iterator[_Task]:
        """This rank's micro-batches, in order; runs ahead of what is consumed by no more than the loader prefetches."""
        steps = planned_aside(self._rank_plan) if self.data.num_workers else iter(self._rank_plan)
        for step in steps:
            self._planned.append(step)
            for packs in step.micro_batches:
                yield _Task(step.step, packs)

    def _handed_out(self) -> Iterator[_Task]:
        """The tasks as they go to the workers, in turns; of sources in an object store each comes with what to read ahead, the
        first of a worker with all that is to come until then."""
        tasks, held, workers, number = self._tasks(), deque[_Task](), max(1, self.data.num_workers), 0
        remote, ahead = any(source.is_remote for source in self.plan.sources), 0
        for task in chain(tasks, repeat(None)):
            held += [task] if task is not None else []
            if not held:
                return
            if remote and number == 0:
                ahead = workers * _micro_batches_ahead(held[0])
            if len(held) > ahead or task is None:
                given = held.popleft()
                later = islice(held, (workers if number < workers else ahead) - 1, ahead, workers) if ahead else ()
                given = replace(given, soon=tuple(pack for each in later for pack in each.packs))
                number += 1
                self._in_flight.append(given)
                yield given

    def _batches(self) -> Iterator[tuple[PackedBatch, list[QuarantineEntry]]]:
        self._whereabouts = Whereabouts(self.data.num_workers)
        builder = _Builder(self._collator, self._whereabouts)
        if self.data.num_workers == 0:
            results: Iterator[Any] = map(builder.__getitem__, self._handed_out())
        else:
            results = self._from_workers(builder)
        for result in results:
            self._in_flight.popleft()
            if isinstance(result, M4Error):
                raise result
            yield result

    def _from_workers(self, builder: _Builder) -> Iterator[Any]:
        loader: DataLoader = DataLoader(
            builder,
            sampler=self._handed_out(),
            batch_size=None,
            num_workers=self.data.num_workers,
            prefetch_factor=max(1, -(-self._ahead // self.data.num_workers)),
            collate_fn=_unchanged,
            worker_init_fn=StartWorker(lifeline()[0]),
            multiprocessing_context=worker_context(),
        )
        handler = signal.getsignal(signal.SIGCHLD)
        iterator = iter(loader)
        if signal.getsignal(signal.SIGCHLD) is not handler:
            # torch raises from the signal, anywhere in the trainer; without it a dead worker is noticed in next().
            signal.signal(signal.SIGCHLD, handler)
        while True:
            try:
                result = next(iterator)
            except StopIteration:
                return
            except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
                if isinstance(error, RuntimeError) and "worker" not in str(error):
                    raise
                raise DataError(self._obituary(error)) from error
            yield result

    def _obituary(self, error: Exception) -> str:
        steps = sorted({task.step for task in self._in_flight})
        sources = self.plan.sources
        units = [unit for task in self._in_flight for pack in task.packs for unit in pack.units]
        exact = self._whereabouts.of_the_dead()
        places = exact or [(unit.source, unit.sample) for unit in units]
        keys = [f"{sources[source].name}:{sources[source].key(sample)}" for source, sample in places]
        shown = ", ".join(keys[:50]) + (f" and {len(keys) - 50} more" if len(keys) > 50 else "")
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"A data worker died while building step {steps[0]} to {steps[-1]} ({why}); "
            f"{'it was at sample' if exact else 'it was between samples, of which these come next:'} {shown}: look at that "
            "sample, or if it ran out of memory, lower data.num_workers or data.prefetch_steps."
        )

    def _dropped(self, step: RankStep) -> list[QuarantineEntry]:
        entries = []
        for dropped in step.dropped:
            where = self.plan.sources[dropped.source].locate(dropped.sample)
            place = (where.source.name, where.key, where.shard.shard)
            entries.append(QuarantineEntry(step.step, -1, *place, dropped.reason, dropped.detail))
        return entries


def validation_steps(
    sources: list[Source],
    processor: SampleProcessor,
    data: DataConfig,
    *,
    micro_batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    layout: Frames = FRAMES,
) -> Loader:
    """One pass over held-out sources in stored order, without augmentation.

    Every rank gets the same number of micro-batches, the last of which may be empty; the packs are the same on any
    number of ranks.
    """
    once = replace(data, shuffle=False, epochs=1, augment=AugmentConfig(), mixture=MixtureConfig())
    plan = Plan(sources, once, seed=0, global_batch_size=micro_batch_size * world_size)
    place: dict[str, Any] = {"rank": rank, "world_size": world_size, "micro_batch_size": micro_batch_size}
    return Loader(plan, processor, once, seed=0, layout=layout, **place)


def _micro_batches_ahead(first: _Task) -> int:
    """How many micro-batches of a worker are asked of an object store before their turn, by the samples of the first one."""
    samples = sum(len(pack.units) for pack in first.packs)
    return max(_READ_AHEAD, -(-_SAMPLES_AHEAD // max(1, samples)))


def _unchanged(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class StartWorker:
    """The first thing a worker does: tie itself to the trainer, and keep to one thread."""

    line: Connection

    def __call__(self, worker: int) -> None:
        live_with_the_trainer(self.line)
        torch.set_num_threads(1)
