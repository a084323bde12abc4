"""What a source loses because samples are longer than a pack, counted in its index before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m4train.config import DataConfig
from m4train.data.source import Source
from m4train.errors import ConfigError

_MOST_LOOKED_AT = 20_000  # long samples of a source; of more, so many are taken from all over it


@dataclass(frozen=True)
class LeftOut:
    """Of the `usable` samples of a source, `long` do not fit a pack whole, and `lost` of these are not used at all.

    `estimated`: from a part of the long ones.
    """

    source: str
    usable: int
    long: int
    lost: int
    estimated: bool = False

    @property
    def fraction(self) -> float:
        return self.lost / self.usable if self.usable else 0.0

    def line(self) -> str:
        about = "about " if self.estimated else ""
        said = f"{self.source}: {about}{self.lost:,} of {self.usable:,} samples ({self.fraction:.1%}) are left out as too long"
        kept = self.long - self.lost
        return said + (f", {about}{kept:,} are cut to fit" if kept else "")


def left_out(source: Source, data: DataConfig) -> LeftOut:
    """What the first variants of the samples lose."""
    lengths, frames = source.index.lengths, source.index.frames
    long = np.flatnonzero((lengths > data.sequence_length) | (frames > data.images_per_pack))
    looked_at = long if len(long) <= _MOST_LOOKED_AT else long[:: -(-len(long) // _MOST_LOOKED_AT)]
    lost = sum(not source.locate(int(sample)).division(data).ranges for sample in looked_at)
    estimated = len(looked_at) < len(long)
    lost = round(lost * len(long) / len(looked_at)) if estimated else lost
    return LeftOut(source.name, len(source) - source.index.bad_count, len(long), lost, estimated)


def left_out_lines(found: Sequence[LeftOut]) -> list[str]:
    """What is said at the start of a run: a line for each source that loses or cuts something."""
    return [f"left out: {each.line()}" for each in found if each.long]


def above_limit(found: Sequence[LeftOut], data: DataConfig) -> str | None:
    """Why a run with these sources stops before training: one loses more than data.max_dropped_fraction of its samples.
    None if none does."""
    above = [each for each in found if each.fraction > data.max_dropped_fraction]
    if not above:
        return None
    others = f" (so do {', '.join(each.source for each in above[1:])})" if above[1:] else ""
    return (
        f"Of data source {above[0].line()}, more than data.max_dropped_fraction={data.max_dropped_fraction}{others}: raise "
        f"data.sequence_length={data.sequence_length} or data.images_per_pack={data.images_per_pack}, set "
        "data.long_documents=split and data.long_conversations=truncate, or raise data.max_dropped_fraction."
    )


def check_left_out(found: Sequence[LeftOut], data: DataConfig) -> None:
    """Raises ConfigError if a source loses more than data.max_dropped_fraction of its samples."""
    reason = above_limit(found, data)
    if reason is not None:
        raise ConfigError(reason)
