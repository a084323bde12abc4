"""Shards that cannot be indexed (pipes, plain URLs), read through webdataset into the same packs.

What is lost with the index is said at the start of a run, see PROMISES.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from m4train.batch import DocumentRecord, PackedBatch
from m4train.config import DataConfig, SourceConfig
from m4train.data.documents.assemble import Assembler, Document
from m4train.data.documents.augment import draw_key
from m4train.data.documents.build import DocumentBuilder
from m4train.data.documents.image_layout import FRAMES, Frames
from m4train.data.documents.pieces import BORDER_KIND
from m4train.data.documents.rendering import Renderer
from m4train.data.documents.variants import variant_drawn
from m4train.data.loading.loader import StartWorker, StepBatch
from m4train.data.loading.processes import lifeline, worker_context
from m4train.data.loading.quarantine import QuarantineEntry
from m4train.data.loading.shard_stream import ShardStream, Streamed
from m4train.data.plan.mixture import Shares
from m4train.data.plan.packing import Packer, Unit
from m4train.data.sources.registry import shard_format
from m4train.data.sources.tar import TarFormat
from m4train.errors import BadSample, ConfigError, DataError, M4Error
from m4train.processing.protocol import SampleProcessor

_LOG = logging.getLogger(__name__)
PROMISES = (
    "Streaming without an index: there is no plan to look at or to replay, the order depends on the number of ranks and "
    "workers, a resumed run goes on only near where it stopped (some samples come twice, some not at all), epochs are not "
    "counted, documents longer than a pack are dropped, a shard cut between two samples goes unnoticed, and ranks are "
    "not balanced."
)


class StreamLoader:
    """Yields StepBatches as `Loader` does, from `sources` whose paths webdataset opens (`pipe:`, URLs, files; braces).

    Every reader (worker of a rank) takes its own part of the shards, again and again in another order. Raises ConfigError
    if a source has fewer shards than there are readers, or the batch does not divide evenly.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        processor: SampleProcessor,
        data: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        state: dict[str, Any] | None = None,
        stop_step: int | None = None,
        layout: Frames = FRAMES,
    ) -> None:
        self.micro_batches, odd = divmod(global_batch_size, world_size * micro_batch_size)
        if odd:
            raise ConfigError(
                f"Streaming needs trainer.global_batch_size={global_batch_size} to be a multiple of ranks x "
                f"trainer.micro_batch_size = {world_size} x {micro_batch_size}."
            )
        self.data = data
        self._start = state["step"] if state is not None else 0
        self._stop = stop_step
        readers = world_size * max(1, data.num_workers)
        if state is not None and "positions" not in state:
            raise DataError("The checkpoint is of a run with a plan: set stream=false as it was, or start a new run.")
        self._positions: dict[str, float] = dict(state["positions"]) if state is not None else {}
        self._stream = _Packs(
            sources, processor, data, seed, micro_batch_size, rank, readers, layout, dict(self._positions)
        )
        if rank == 0:
            _LOG.warning(PROMISES)

    def __iter__(self) -> Iterator[StepBatch]:
        workers = self.data.num_workers
        ahead = -(-self.data.prefetch_steps * self.micro_batches // max(1, workers))
        loader = DataLoader(
            self._stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=ahead if workers else None,
            collate_fn=_unchanged,
            worker_init_fn=StartWorker(lifeline()[0]) if workers else None,
            multiprocessing_context=worker_context() if workers else None,
        )
        batches = iter(loader)
        step = self._start
        while self._stop is None or step < self._stop:
            step += 1
            begun = time.perf_counter()
            built = [_raised(next(batches)) for _ in range(self.micro_batches)]
            bad = [replace(entry, step=step) for one in built for entry in one.bad]
            for one in built:
                self._positions |= one.positions
            state = {"step": step, "streaming": True, "positions": dict(self._positions)}
            yield StepBatch(step, [one.batch for one in built], state, bad, time.perf_counter() - begun)


@dataclass(frozen=True)
class _Built:
    """One micro-batch, what was left out on the way, and how far its reader was in each source."""

    batch: PackedBatch
    bad: list[QuarantineEntry]
    positions: dict[str, float]


class _Packs(IterableDataset):
    """The endless micro-batches of one reader. An error comes as a value, so that its sentence reaches the trainer alone."""

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        processor: SampleProcessor,
        data: DataConfig,
        seed: int,
        micro_batch_size: int,
        rank: int,
        readers: int,
        layout: Frames,
        positions: dict[str, float],
    ) -> None:
        import webdataset.shardlists

        self._urls = {name: webdataset.shardlists.expand_urls(config.path) for name, config in sources.items()}
        for name, urls in self._urls.items():
            if len(urls) < readers:
                raise ConfigError(
                    f"data source {name!r} has {len(urls)} shards for {readers} readers (ranks x data.num_workers): "
                    "use fewer workers, or write more shards."
                )
        self._sources, self._data = dict(sources), data
        self._builders = {
            name: DocumentBuilder(Renderer(processor, config, name), data.augment, number)
            for number, (name, config) in enumerate(sources.items())
        }
        self._formats = {name: _tar_format(name, config) for name, config in sources.items()}
        self._seed, self._micro, self._rank, self._readers = seed, micro_batch_size, rank, readers
        self._positions = positions
        self._assembler = Assembler(processor, list(sources), layout)

    def __iter__(self) -> Iterator[_Built | M4Error]:
        try:
            yield from self._micro_batches()
        except M4Error as error:
            yield error

    def _micro_batches(self) -> Iterator[_Built]:
        worker = get_worker_info()
        reader = self._rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        streams = {name: self._stream(name, reader) for name in self._sources}
        packer = Packer(self._data.sequence_length, self._data.images_per_pack, self._data.packing_pool)
        held: dict[int, Document] = {}
        packs: list[list[Unit]] = []
        for number, document in enumerate(self._mixed(streams)):
            held[number] = document
            frames = sum(len(frame) for frame in document.rendered.frames)
            packs += packer.add(Unit(document.source, number, 0, 0, -1, len(document.rendered.ids), frames))
            if len(packs) == self._micro:
                chosen = [held.pop(unit.sample) for pack in packs for unit in pack]
                hashed = sum(_hash(document) for document in chosen) % (1 << 64)
                batch = self._assembler.batch(chosen, hashed, hashed, self._micro * self._data.sequence_length)
                bad = [entry for stream in streams.values() for entry in stream.bad]
                yield _Built(batch, bad, {name: stream.position for name, stream in streams.items()})
                packs = []
                for stream in streams.values():
                    stream.bad.clear()

    def _stream(self, name: str, reader: int) -> ShardStream:
        """The shards of a source that this reader takes: every so many-th, as webdataset splits them."""
        urls, seed = self._urls[name][reader :: self._readers], f"{self._seed} {reader}"
        return ShardStream(name, urls, self._formats[name], seed, self._data.shuffle, self._positions.get(name, 0.0))

    def _mixed(self, streams: Mapping[str, ShardStream]) -> Iterator[Document]:
        """Documents of all sources by their weights, counted in samples."""
        documents = {name: self._documents(stream, name) for name, stream in streams.items()}
        shares = Shares({name: config.weight for name, config in self._sources.items()})
        sizes = dict.fromkeys(streams, 1)
        while True:
            name = shares.next(sizes)
            shares.add(name, 1)
            yield next(documents[name])

    def _documents(self, stream: ShardStream, name: str) -> Iterator[Document]:
        for streamed in stream:
            try:
                document = self._document(streamed, name)
            except BadSample as error:
                stream.leave_out(streamed.key, streamed.url, error.reason, error.detail)
                continue
            stream.used()
            yield document

    def _document(self, streamed: Streamed, name: str) -> Document:
        key, cycle, stored, builder = streamed.key, streamed.cycle, streamed.stored, self._builders[name]
        seed = f"{self._seed} {name}"
        variant = variant_drawn(builder.renderer.variants, 0, cycle, seed, zlib.crc32(key.encode()))
        prepared = builder.prepare(stored, key, variant)
        planned = prepared.planned
        if (planned.kinds == BORDER_KIND).any():
            raise BadSample("several_documents", "documents.end_marker divides it, which needs an index")
        tokens, frames = int(planned.tokens.sum()), int(planned.frames.sum())
        if tokens > self._data.sequence_length or frames > self._data.images_per_pack:
            raise BadSample("too_long", f"{tokens} tokens and {frames} frames do not fit a pack")
        record = DocumentRecord(-1, name, key, streamed.url, 0, 0, 0)
        return builder.finish(stored, prepared, record, draw_key(self._data.augment, 0, cycle, seed, key), planned)


def _tar_format(name: str, config: SourceConfig) -> TarFormat:
    tar_format = shard_format(config)
    if not isinstance(tar_format, TarFormat):
        raise ConfigError(
            f"data.sources.{name}.stream is true, but its format is {config.format}: only tar files can be streamed."
        )
    return tar_format


def _hash(document: Document) -> int:
    described = f"{document.record.source}\0{document.record.key}\0{document.record.tokens}".encode()
    return int.from_bytes(hashlib.blake2b(described, digest_size=8).digest(), "little")


def _raised(built: _Built | M4Error) -> _Built:
    if isinstance(built, M4Error):
        raise built
    return built


def _unchanged(value: Any) -> Any:
    return value
