"""`m4train bench`: how fast the data side is, stage by stage on one core, and as a whole with its worker processes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from m4train.config import DataConfig
from m4train.data.documents.image_layout import Frames
from m4train.data.loading.collate import Collator
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.errors import ConfigError
from m4train.processing.protocol import SampleProcessor

STAGES = ("pack", "read", "decode", "tokenize", "tile", "collate")


@dataclass(frozen=True)
class StageReport:
    """One stage on one core: its seconds for the measured packs, and what it could do alone in a second."""

    name: str
    seconds: float
    samples_per_second: float
    images_per_second: float
    tokens_per_second: float


@dataclass(frozen=True)
class BenchReport:
    """`whole` is the loader with `workers` processes (0: in the trainer's own process), consumed as fast as it can be; its rates
    are per core. `fill` and `frame_fill` are the used shares of the two budgets of a pack. `step_seconds` is how long a
    trainer that takes no time itself waits for a step; one whose steps take longer never waits."""

    packs: int
    samples: int
    images: int
    frames: int
    tokens: int
    megabytes: float
    bad: int
    stages: list[StageReport]
    whole: StageReport
    workers: int
    fill: float
    frame_fill: float
    step_seconds: float


class _Clock:
    """Seconds by stage. While a stage runs within another one, only the inner one's clock goes."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._charge()
        self._running.append(stage)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._running:
            self.seconds[self._running[-1]] += now - self._since
        self._since = now


class _TimedFiles:
    """The files of a source, with every read on the clock and its bytes counted."""

    def __init__(self, files: Any, clock: _Clock) -> None:
        self._files, self._clock, self.bytes = files, clock, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._files, name)

    def read(self, *arguments: Any) -> Any:
        with self._clock("read"):
            data = self._files.read(*arguments)
        self.bytes += len(data)
        return data


def bench(
    plan: Plan,
    processor: SampleProcessor,
    data: DataConfig,
    seed: int,
    micro_batch_size: int,
    layout: Frames,
    packs: int,
) -> BenchReport:
    """Measures the first `packs` packs of a plan. Raises ConfigError for a plan without any."""
    clock = _Clock()
    with clock("pack"):
        chosen = list(islice((pack for step in plan.steps() for pack in step.packs), packs))
    if not chosen:
        raise ConfigError("data.sources hold nothing that can be packed: look at `m4train data stats`.")
    files = [_TimedFiles(source.files, clock) for source in plan.sources]
    timed: list[Any] = [replace(source, files=each) for source, each in zip(plan.sources, files)]  # type: ignore[arg-type]
    collator = Collator(timed, processor, data, seed, layout, clock)
    counts: Counter[str] = Counter()
    for pack in chosen:
        with clock("collate"):
            batch, bad = collator.batch([pack], 0)
        counts.update(samples=len(batch.documents), tokens=batch.tokens, bad=len(bad))
        counts["frames"] += batch.images.count if batch.images is not None else 0
        counts["images"] += sum(record.images for record in batch.documents)
    whole = _whole(plan, processor, data, seed, micro_batch_size, layout, len(chosen))
    return BenchReport(
        packs=len(chosen),
        samples=counts["samples"],
        images=counts["images"],
        frames=counts["frames"],
        tokens=counts["tokens"],
        megabytes=sum(each.bytes for each in files) / 1e6,
        bad=counts["bad"],
        stages=[_stage(name, clock.seconds[name], counts) for name in STAGES],
        whole=whole[0],
        workers=data.num_workers,
        fill=sum(pack.tokens for pack in chosen) / (len(chosen) * data.sequence_length),
        frame_fill=sum(pack.frames for pack in chosen) / (len(chosen) * data.images_per_pack),
        step_seconds=whole[1],
    )


def _stage(name: str, seconds: float, counts: Counter[str], cores: int = 1) -> StageReport:
    spent = max(seconds, 1e-9) * cores
    return StageReport(name, seconds, *(counts[what] / spent for what in ("samples", "images", "tokens")))


def _whole(
    plan: Plan,
    processor: SampleProcessor,
    data: DataConfig,
    seed: int,
    micro_batch_size: int,
    layout: Frames,
    packs: int,
) -> tuple[StageReport, float]:
    """The loader as training runs it, after its first step, in which processes start; and seconds a step."""
    counts: Counter[str] = Counter()
    steps = max(2, -(-packs // plan.global_batch_size))
    loader = iter(
        Loader(plan, processor, data, seed=seed, micro_batch_size=micro_batch_size, stop_step=steps + 1, layout=layout)
    )
    next(loader)
    begun, done = time.perf_counter(), 0
    for step in loader:
        done += 1
        for source in step.counts().values():
            counts.update(samples=source["documents"], images=source["images"], tokens=source["tokens"])
    seconds = time.perf_counter() - begun
    return _stage("whole", seconds, counts, max(1, data.num_workers)), seconds / max(1, done)


def bench_tables(report: BenchReport) -> list[Any]:
    """The measurements as a table for a terminal."""
    from rich.table import Table

    title = (
        f"{report.samples:,} samples, {report.images:,} images, {report.tokens:,} tokens, {report.megabytes:,.1f} MB"
    )
    table = Table("per core", title=title)
    for name in ("seconds", "samples/s", "images/s", "tokens/s"):
        table.add_column(name, justify="right")
    whole = replace(report.whole, name=f"whole, {report.workers} workers")
    for stage in [*report.stages, whole]:
        rates = (stage.samples_per_second, stage.images_per_second, stage.tokens_per_second)
        table.add_row(stage.name, f"{stage.seconds:.2f}", *(f"{rate:,.0f}" for rate in rates))
    notes = f"fill {report.fill:.2%} of the tokens, {report.frame_fill:.2%} of the frames; {report.bad} bad samples; "
    notes += f"a trainer waits for a step if its own work takes less than {report.step_seconds:.3f} s"
    return [table, notes]
