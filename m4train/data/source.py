"""A source of the mixture: shards, their index, and the samples read back one by one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from m4train.config import DataConfig, SourceConfig
from m4train.data.documents.build import StoredSample, decode_wanted
from m4train.data.documents.pieces import Pieces
from m4train.data.documents.rendering import Renderer
from m4train.data.documents.sample import Sample
from m4train.data.documents.splitting import Division, divide
from m4train.data.documents.variants import variant_drawn
from m4train.data.index.build import build_index, open_index
from m4train.data.index.part import PartIndex, draws
from m4train.data.index.shard_index import ShardIndex
from m4train.data.index.source_index import SourceIndex
from m4train.data.shards import expand_shards
from m4train.data.sources.base import Member, ShardFormat
from m4train.data.sources.fields import SPLIT, absent
from m4train.data.sources.registry import format_of, shard_format
from m4train.data.storage.block_cache import BlockCache
from m4train.data.storage.files import FileReader, Range, is_remote
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.protocol import SampleProcessor
from m4train.terminal import stage

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Located:
    """A sample and where it is stored: found once and passed on."""

    source: Source
    sample: int  # its number in the source
    shard: ShardIndex
    number: int  # and in the shard
    key: str
    variant: int = 0

    @property
    def members(self) -> tuple[Member, ...]:
        return self.shard.members(self.number)

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of every stored image, upright."""
        return [(member.width, member.height) for member in self.members if member.is_image]

    @property
    def pieces(self) -> Pieces:
        """What this variant of the sample takes, from the index."""
        return self.shard.pieces(self.number, self.variant)

    def division(self, data: DataConfig) -> Division:
        """How it is packed if it does not fit a pack whole, or is divided by a marker."""
        return divide(self.pieces, self.shard.places(self.number, self.variant), data)

    def stored(self) -> StoredSample:
        """Its text, read now, and its images, decoded when asked for. Raises BadSample."""
        decode = lambda wanted, least: self.source.images(self.sample, wanted, least)
        return StoredSample(self.source.read(self.sample), self.sizes, decode)


@dataclass
class Source:
    """One dataset: `index` says what it holds, `read` and `images` fetch it. Pickled by path."""

    name: str
    config: SourceConfig
    index: SourceIndex
    shard_format: ShardFormat
    files: FileReader

    def __len__(self) -> int:
        return len(self.index)

    def locate(self, sample: int, variant: int = 0) -> Located:
        """Where a sample is stored."""
        shard, number = self.index.locate(sample)
        return Located(self, sample, shard, number, shard.key(number), variant)

    def draw(self, sample: int, seed: int, epoch: int) -> Located:
        """The variant of a sample that a run of this seed sees in this epoch."""
        where = self.locate(sample)
        return replace(where, variant=self.variant(sample, seed, epoch))

    def variant(self, sample: int, seed: int, epoch: int) -> int:
        """Which variant of a sample a run of this seed sees in this epoch."""
        return variant_drawn(self.index.variants, seed, epoch, self.name, sample)

    def key(self, sample: int) -> str:
        return self.locate(sample).key

    @property
    def ordered_by_shard(self) -> bool:
        """Whether samples are shuffled within a window of shards, so that an object store is read in few places at once."""
        return is_remote(self.config.path) and self.index.block_ends() is None

    def block_ends(self) -> np.ndarray | None:
        """(blocks,) the sample number at which each stretch ends within which, and among a window of which, the order is
        random; None if it is random throughout.
        """
        if self.ordered_by_shard:
            return self.index.ends
        return self.index.block_ends()

    def expect(self, samples: Sequence[int]) -> None:
        """Says which samples are read next, so that an object store is asked for all of them at once."""
        if self.is_remote:
            self.files.expect([part for sample in samples for part in self._ranges(sample)])

    def prefetch(self, samples: Sequence[int]) -> None:
        """Says which samples are expected later, so that an object store is asked for them while others are worked on."""
        if self.is_remote:
            self.files.prefetch([part for sample in samples for part in self._ranges(sample)])

    @property
    def is_remote(self) -> bool:
        """Whether the shards lie in an object store."""
        return is_remote(self.config.path)

    def _ranges(self, sample: int) -> list[Range]:
        """Where the text and all images of a sample are stored, as far as its format knows."""
        shard, number = self.index.locate(sample)
        members = shard.members(number)
        images = range(sum(member.is_image for member in members))
        self.files.know(shard.shard, shard.meta["stamp"])
        return self.shard_format.ranges(shard.shard, members, images) if members else []

    def read(self, sample: int) -> Sample:
        """The text of a sample. Raises BadSample, with the reason found when indexing if there is one."""
        shard, number = self.index.locate(sample)
        if number in shard.bad:
            raise BadSample(*shard.bad[number])
        if is_remote(shard.shard):
            parts = self._ranges(sample)
            if parts and not self.files.holds(parts[0]):
                self.files.expect(parts)  # the images are read next
        return self.shard_format.sample(self.files, shard.shard, shard.members(number))

    def images(
        self,
        sample: int,
        wanted: Sequence[int] | None = None,
        least: Mapping[int, tuple[int, int]] | None = None,
    ) -> dict[int, Image.Image]:
        """The decoded images numbered `wanted` (all, if not given). Raises BadSample.

        Those with a `least` size (width, height) are decoded no larger than a JPEG decoder must to reach it.
        """
        shard, number = self.index.locate(sample)
        members = shard.members(number)
        sizes = [(member.width, member.height) for member in members if member.is_image]
        wanted = range(len(sizes)) if wanted is None else wanted
        place = (self.files, shard.shard, members, wanted)
        whole, stored = lambda: self.shard_format.images(*place), lambda: self.shard_format.stored_images(*place)
        return decode_wanted(wanted, sizes, least or {}, whole, stored)

    def stored_images(self, sample: int) -> list[bytes]:
        """All images of a sample as image files, in reading order. Raises BadSample."""
        shard, number = self.index.locate(sample)
        members = shard.members(number)
        wanted = range(sum(member.is_image for member in members))
        return self.shard_format.stored_images(self.files, shard.shard, members, wanted)


def open_sources(
    sources: Mapping[str, SourceConfig], data: DataConfig, processor: SampleProcessor, indexed: bool = False
) -> list[Source]:
    """Opens every source, in the order given, indexing small ones on first use; after `index_sources` they are `indexed`.

    Raises ConfigError for a missing path or weight, DataError for a pattern without shards, StaleIndexError for large
    sources without a fresh index.
    """
    _refuse_streams(sources)
    built = []
    cache = BlockCache(data.cache_dir, int(data.cache_size * 2**30)) if data.cache_dir else None
    for name, config in sources.items():
        stage(f"reading the index of {name}", "shards")
        if not config.path:
            raise ConfigError(f"data source {name!r} has no path: set data.sources.{name}.path to its shards.")
        _warn_if_trained(name, config, data)
        given = config
        config, form, shards = _found(name, config, said=indexed)
        opened = open_index(shards, form, Renderer(processor, config, name), data.index_dir, data.auto_index_limit)
        form.keep(data.shuffle_window, data.packing_pool)
        used = _part(name, given, data, SourceIndex(opened))
        source = Source(name, config, used, form, FileReader(cache))
        _check_named(source)
        if any(field.startswith(SPLIT) for field in source.index.unread):
            _LOG.warning(
                "data source %r uses records of several splits as one: choose with where=\"split == 'train'\"", name
            )
        if source.index.unread:
            _LOG.warning("data source %r: fields not read: %s", name, unread_line(source))
        built.append(source)
    return built


def build_sources(sources: Mapping[str, SourceConfig], data: DataConfig, processor: SampleProcessor) -> list[Source]:
    """As `open_sources`, for what needs something to read. Raises ConfigError for a source without a usable sample."""
    built = open_sources(sources, data, processor)
    for source in built:
        if len(source) == source.index.bad_count:
            first = next(
                (f"the first: {why}" for shard in source.index.shards for _, why in shard.bad.values()), "none at all"
            )
            raise ConfigError(
                f"data source {source.name!r} ({source.config.path}) holds no usable sample of {len(source)} as format "
                f"{source.config.format} ({first}): give its format, or format=auto if you do not know it, and look at `m4train data stats`."
            )
    return built


def _warn_if_trained(name: str, config: SourceConfig, data: DataConfig) -> None:
    """Says it if files of a held-out source are also trained on."""
    if config.held_out or config.stream or not any(config is each for each in data.validation.values()):
        return
    for other, trained in data.sources.items():
        shared = _files(config) & _files(trained) if trained.path and not trained.stream else set()
        if shared:
            _LOG.warning(
                "data source %r measures what is trained on: %d of its files are also those of data.sources.%s, such as %s; hold out "
                "a share of the samples with data.holdout=0.02, or name other files",
                name, len(shared), other, min(shared),
            )  # fmt: skip


def _files(source: SourceConfig) -> set[str]:
    """The files of a source, none if they are not on this machine: a model may be evaluated where its training data is not."""
    try:
        return set(map(os.path.realpath, expand_shards(source.path, source.format)))
    except DataError:
        return set()


def _part(name: str, config: SourceConfig, data: DataConfig, whole: SourceIndex) -> SourceIndex:
    """What of a source is used: what data.holdout holds out, all but that for one that is trained on, or everything."""
    trains = data.sources.get(name) is config
    if not data.holdout or not (config.held_out or trains) or (trains and _measured_apart(name, data)):
        return whole
    drawn = draws(whole)
    out, usable = drawn < data.holdout, drawn[whole.lengths > 0]
    if len(usable) and out[whole.lengths > 0].all() == out[whole.lengths > 0].any():
        raise ConfigError(_not_divided(name.rpartition("/")[2], usable, data.holdout))
    return PartIndex(whole, np.flatnonzero(out if config.held_out else ~out))


def _measured_apart(name: str, data: DataConfig) -> bool:
    """Whether a source is measured by other data of its name, and by nothing that is held out of it."""
    measures = data.validation.get(name)
    taken = (each.path for each in data.validation.values() if each.held_out)
    return measures is not None and not measures.held_out and data.sources[name].path not in taken


def _not_divided(name: str, usable: np.ndarray, share: float) -> str:
    """What to say if a share holds out all or none of the usable samples, whose draws (U,) are given."""
    least = np.unique(usable)[:2]  # a share between these two holds out as few as can be
    rounded = (np.ceil(least[0] * 10**digits) / 10**digits for digits in range(1, 18))
    other = next(
        (
            f"data.holdout={each:g} holds out {(usable < each).sum()}; or "
            for each in rounded
            if least[0] < each <= least[-1]
        ),
        "",
    )
    return (
        f"data.holdout={share:g} holds out {'all' if share > least[-1] else 'none'} of the {len(usable)} usable samples of data source "
        f"{name!r}: {other}set data.validation.{name}={{path: FILE, format: auto}} to measure on other data, or data.holdout=0 and trainer.eval_every=0 to "
        "measure nothing."
    )


def unread_line(source: Source) -> str:
    """The fields of the records of a source that are not read, and in how many samples each is; empty if there are none."""
    return ", ".join(f"{name} ({count:,} of {len(source):,})" for name, count in source.index.unread.items())


def _check_named(source: Source) -> None:
    """Raises ConfigError for a field that the options name and no sample has."""
    usable = len(source) - source.index.bad_count
    for ours, theirs in source.config.fields.items():
        if usable and source.index.unread.get(absent(theirs), 0) >= usable:
            raise ConfigError(
                f"data.sources.{source.name}.fields.{ours} is {theirs!r}, but no record of {source.config.path} has such a field: "
                "correct the name, or remove it."
            )


def index_sources(
    sources: Mapping[str, SourceConfig], data: DataConfig, processor: SampleProcessor, progress: Any = None
) -> None:
    """`m4train data index`: builds what is missing or stale, whatever its size."""
    _refuse_streams(sources)
    for name, config in sources.items():
        config, form, shards = _found(name, config)
        build_index(shards, form, Renderer(processor, config, name), data.index_dir, progress=progress)


def shards_of(name: str, config: SourceConfig) -> list[str]:
    """The shards of a source. Raises ConfigError or DataError if there are none."""
    return _found(name, config)[2]


def _found(name: str, config: SourceConfig, said: bool = False) -> tuple[SourceConfig, ShardFormat, list[str]]:
    """A source with the name of its format, which is printed unless it was `said` before, the format, and its shards."""
    key = f"data.sources.{name}"
    if config.format != "auto":
        return config, shard_format(config, key), expand_shards(config.path, config.format)
    shards = expand_shards(config.path)
    config = format_of(config, shards, key, said)
    return config, shard_format(config, key), shards


def _refuse_streams(sources: Mapping[str, SourceConfig]) -> None:
    for name, config in sources.items():
        if config.stream:
            raise ConfigError(
                f"data source {name!r} is streamed, so that it has no index, no plan and nothing to replay, which this needs: "
                f"set data.sources.{name}.stream=false for shards that can be indexed, or leave this to the training run."
            )


def source_stats(source: Source) -> dict[str, Any]:
    """`m4train data stats`: what a source holds, from its index alone."""
    reasons: dict[str, int] = {}
    samples = tokens = frames = images = longest = 0
    for shard in source.index.shards:
        samples += len(shard)
        tokens += int(shard.lengths.sum(dtype="int64"))
        frames += int(shard.frames.sum(dtype="int64"))
        images += shard.images_total
        longest = max(longest, int(shard.lengths.max(initial=0)))
        for reason, _ in shard.bad.values():
            reasons[reason] = reasons.get(reason, 0) + 1
    counts: dict[str, Any] = {
        "shards": len(source.index.shards),
        "samples": samples,
        "tokens": tokens,
        "images": images,
        "frames": frames,
    }
    return counts | {"longest": longest, "bad": reasons, "not_read": source.index.unread}


def conversations(
    source: Source, unreadable: list[str], numbers: Iterable[int] | None = None
) -> Iterator[tuple[int, str, Sample, list[Image.Image]]]:
    """Number, key, sample and images of the conversations of a source, in stored order; of `numbers` alone if given.

    Documents are left out; a bad sample too, its key and what is wrong with it being added to `unreadable`.
    """
    for number in range(len(source)) if numbers is None else numbers:
        try:
            sample = source.read(number)
            if sample.messages is not None:
                yield number, source.key(number), sample, list(source.images(number).values())
        except BadSample as error:
            unreadable.append(f"{source.key(number)} ({error.detail})")
