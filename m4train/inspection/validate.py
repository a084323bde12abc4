"""`m4train validate`: reads, decodes and renders every sample of the sources, and says what a run would lose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from m4train.config import DataConfig, MixtureConfig
from m4train.data.documents.labels import trained_kinds
from m4train.data.documents.pieces import IMAGE_KIND, Pieces
from m4train.data.documents.rendering import Renderer, turn_weights
from m4train.data.loading.processes import lifeline, live_with_the_trainer, worker_context
from m4train.data.plan.left_out import LeftOut, left_out
from m4train.data.plan.plan import Plan
from m4train.data.source import Located, Source, unread_line
from m4train.errors import CHOICES, BadSample, DataError
from m4train.processing.pieces import TextPiece
from m4train.processing.protocol import SampleProcessor

_CHUNK = 32  # samples a worker is handed at a time
_EXAMPLES = 20  # bad samples named per source
_PACKS, _STEPS = 16, 16  # what the expected fill is taken from


@dataclass
class SourceValidation:
    """One source. `problems` counts samples by what is wrong with them, or by why its options leave them out (see
    CHOICES); the first bad ones are in `examples`. `too_long`: what does not fit a pack whole, as a run counts it.

    Histograms count samples by their tokens and frames (tiles), and images by their tokens, in classes named by the power of
    two they go up to.
    `token_fill` and `frame_fill` are the shares of the two budgets that packs of this source alone use.
    """

    name: str
    samples: int = 0
    problems: Counter[str] = field(default_factory=Counter)
    too_long: LeftOut | None = None
    tokens: Counter[int] = field(default_factory=Counter)
    frames: Counter[int] = field(default_factory=Counter)
    image_tokens: Counter[int] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)
    token_fill: float = 0.0
    frame_fill: float = 0.0
    not_read: str = ""  # the fields of its records that are not read

    @property
    def bad(self) -> int:
        """Samples that a run would lose, without those left out by choice."""
        return sum(count for reason, count in self.problems.items() if reason not in CHOICES)

    @property
    def bad_fraction(self) -> float:
        return self.bad / self.samples if self.samples else 0.0

    def add(self, other: SourceValidation) -> None:
        """Counts the samples of another part of the source."""
        self.samples += other.samples
        for name in ("problems", "tokens", "frames", "image_tokens"):
            getattr(self, name).update(getattr(other, name))
        self.examples = (self.examples + other.examples)[:_EXAMPLES]

    def report(self) -> dict[str, Any]:
        """As JSON; histograms are lists of [class, samples], smallest class first."""
        too_long = self.too_long or LeftOut(self.name, self.samples, 0, 0)
        return {
            "samples": self.samples,
            "bad": self.bad,
            "bad_fraction": self.bad_fraction,
            "unreadable_images": sum(self.problems[reason] for reason in _UNREADABLE),
            "count_mismatches": sum(self.problems[reason] for reason in _MISMATCHED),
            "without_label": self.problems["no_label"],
            "over_long": too_long.long,
            "left_out": too_long.lost,
            "left_out_fraction": too_long.fraction,
            "problems": dict(self.problems),
            "tokens": sorted(map(list, self.tokens.items())),
            "frames": sorted(map(list, self.frames.items())),
            "image_tokens": sorted(map(list, self.image_tokens.items())),
            "expected_fill": {"tokens": self.token_fill, "frames": self.frame_fill},
            "not_read": self.not_read,
            "examples": self.examples,
        }


_UNREADABLE = ("unreadable_image", "image_too_large", "missing_image", "remote_image")
_MISMATCHED = ("image_count",)


def validate_source(
    source: Source,
    data: DataConfig,
    processor: SampleProcessor,
    workers: int,
    progress: Callable[[int], None] = lambda _: None,
) -> SourceValidation:
    """Reads the whole source in `workers` processes (1: in this one); `progress` is told how many samples are done.

    Raises DataError if a process dies.
    """
    result = SourceValidation(source.name)
    for part in _parts(_Checker(source, processor), workers):
        result.add(part)
        progress(result.samples)
    result.token_fill, result.frame_fill = expected_fill(source, data)
    result.too_long = left_out(source, data)
    result.not_read = unread_line(source)
    return result


def expected_fill(source: Source, data: DataConfig) -> tuple[float, float]:
    """Shares of the token and of the frame budget that the first packs of this source alone use."""
    alone = replace(data, epochs=1, mixture=MixtureConfig())
    once = replace(source, config=replace(source.config, epochs=1))
    plan = Plan([once], alone, seed=0, global_batch_size=_PACKS)
    packs = [pack for step in islice(plan.steps(), _STEPS) for pack in step.packs]
    if not packs:
        return 0.0, 0.0
    tokens, frames = sum(pack.tokens for pack in packs), sum(pack.frames for pack in packs)
    return tokens / (len(packs) * data.sequence_length), frames / (len(packs) * data.images_per_pack)


class _Checker:
    """Checks stretches of a source; pickled once to each process."""

    def __init__(self, source: Source, processor: SampleProcessor) -> None:
        self.source = source
        self._renderer = Renderer(processor, source.config)

    def __call__(self, begin: int) -> SourceValidation:
        """The samples from `begin` on, as many as one worker takes at a time."""
        source = self.source
        result = SourceValidation(source.name)
        for sample in range(begin, min(begin + _CHUNK, len(source))):
            result.samples += 1
            located = source.locate(sample)
            try:
                planned = self._check(located)
            except BadSample as error:
                result.problems[error.reason] += 1
                if error.reason not in CHOICES:
                    where = {"key": located.key, "shard": located.shard.shard}
                    result.examples.append(where | {"reason": error.reason, "detail": error.detail})
                continue
            tokens, frames = int(located.shard.lengths[located.number]), int(located.shard.frames[located.number])
            result.tokens[class_end(tokens)] += 1
            result.frames[class_end(frames)] += 1
            result.image_tokens.update(class_end(n) for n in planned.tokens[planned.kinds == IMAGE_KIND].tolist())
        return result

    def _check(self, located: Located) -> Pieces:
        """The pieces of a sample. Raises BadSample as building it for training would."""
        stored = located.stored()
        prepared = self._renderer.prepare(stored.sample, located.key, stored.sizes)
        stored.decode(sorted(prepared.views), {})
        turns = [piece.turn if isinstance(piece, TextPiece) else -1 for piece in prepared.pieces]
        repeats = prepared.planned.tokens
        of_turn = np.repeat(turns, repeats)
        weights = turn_weights(of_turn, prepared.weights)
        trained_kinds(np.repeat(prepared.planned.kinds, repeats), of_turn, located.source.config.loss, weights)
        return prepared.planned


_CHECKER: _Checker | None = None  # in a process of the pool: what it was started for


def _start(checker: _Checker, line: Any) -> None:
    global _CHECKER
    live_with_the_trainer(line)
    _CHECKER = checker


def _check_stretch(begin: int) -> SourceValidation:
    assert _CHECKER is not None
    return _CHECKER(begin)


def _parts(checker: _Checker, workers: int) -> Iterator[SourceValidation]:
    begins = range(0, len(checker.source), _CHUNK)
    if workers < 2:
        yield from map(checker, begins)
        return
    arguments = (checker, lifeline()[0])
    with ProcessPoolExecutor(workers, worker_context(), initializer=_start, initargs=arguments) as pool:
        try:
            yield from pool.map(_check_stretch, begins)
        except BrokenProcessPool as error:
            raise DataError(
                f"A process that validated source {checker.source.name!r} died: run `m4train validate --workers 1` to see "
                "at which sample."
            ) from error


def class_end(value: int) -> int:
    """The power of two that `value` does not exceed, 0 for 0."""
    return 1 << (value - 1).bit_length() if value else 0


def validation_tables(sources: list[SourceValidation]) -> list[Any]:
    """The findings as tables for a terminal."""
    from rich.table import Table

    counts = Table("", title="samples")
    for source in sources:
        counts.add_column(source.name, justify="right", overflow="fold")
    reports = [source.report() for source in sources]
    rows = {
        "samples": "samples",
        "bad": "bad",
        "unreadable images": "unreadable_images",
        "count mismatches": "count_mismatches",
        "no label": "without_label",
        "over-long": "over_long",
    }
    for title, key in rows.items():
        counts.add_row(title, *(f"{report[key]:,}" for report in reports))
    left = (f"{report['left_out']:,} ({report['left_out_fraction']:.1%})" for report in reports)
    counts.add_row("left out as too long", *left)
    counts.add_row("all problems", *(_named(source.problems) for source in sources))
    counts.add_row("fields not read", *(source.not_read or "none" for source in sources))
    counts.add_row("token fill", *(f"{source.token_fill:.2%}" for source in sources))
    counts.add_row("frame fill", *(f"{source.frame_fill:.2%}" for source in sources))
    tables = [counts]
    histograms = {"tokens": "samples by tokens", "frames": "samples by frames", "image_tokens": "images by tokens"}
    for unit, title in histograms.items():
        table = Table("up to", title=title)
        for source in sources:
            table.add_column(source.name, justify="right")
        totals = [max(1, getattr(source, unit).total()) for source in sources]
        for end in sorted({end for source in sources for end in getattr(source, unit)}):
            found = [getattr(source, unit)[end] for source in sources]
            table.add_row(f"{end:,}", *(f"{n:,} {'█' * round(8 * n / total)}" for n, total in zip(found, totals)))
        tables.append(table)
    examples = [(source.name, example) for source in sources for example in source.examples]
    if examples:
        table = Table("source", "sample", "shard", "reason", title="the first bad samples")
        for name, example in examples:
            shard = example["shard"].rsplit("/", 1)[-1]
            table.add_row(name, example["key"], shard, f"{example['reason']}: {example['detail']}")
        tables.append(table)
    return tables


def _named(problems: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in problems.most_common()) or "none"
