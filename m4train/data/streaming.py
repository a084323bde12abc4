"""Shards that cannot be indexed (pipes, plain URLs), read through webdataset into the same packs.

What is lost with the index is said at the start of a run, see PROMISES.
"""

from __future__ import annotations

import hashlib
import logging
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from m4train.batch import DocumentRecord, PackedBatch
from m4train.config import DataConfig, SourceConfig
from m4train.data.assemble import Assembler, Document
from m4train.data.augment import augment, draw_key
from m4train.data.index import BORDER_KIND
from m4train.data.labels import trained_tokens
from m4train.data.layout import FRAMES, Frames
from m4train.data.loader import StartWorker, StepBatch
from m4train.data.mixture import Shares
from m4train.data.packing import Packer, Unit
from m4train.data.processes import lifeline, worker_context
from m4train.data.quarantine import QuarantineEntry
from m4train.data.rendering import Renderer, as_planned, encode_view, expand
from m4train.data.sample import parse_sample
from m4train.data.variants import variant_drawn
from m4train.errors import BadSample, ConfigError
from m4train.processing.images import decode_image

_LOG = logging.getLogger(__name__)
_SHUFFLE_BUFFER = 1000
PROMISES = (
    "Streaming without an index: the order depends on the number of ranks and workers, a resumed run begins its shards "
    "again in a new order, epochs are not counted, documents longer than a pack are dropped, and ranks are not balanced."
)


class StreamLoader:
    """Yields StepBatches as `Loader` does, from `sources` whose paths webdataset opens (`pipe:`, URLs, files; braces).

    Every reader (worker of a rank) takes its own part of the shards, again and again in another order. Raises ConfigError
    where a source has fewer shards than there are readers, or the batch does not divide evenly.
    """

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        processor: Any,
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
        self._stream = _Packs(
            sources, processor, data, f"{seed} {self._start}", micro_batch_size, rank, readers, layout
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
            built = [next(batches) for _ in range(self.micro_batches)]
            bad = [replace(entry, step=step) for _, entries in built for entry in entries]
            waited = time.perf_counter() - begun
            yield StepBatch(step, [batch for batch, _ in built], {"step": step, "streaming": True}, bad, waited)


class _Packs(IterableDataset):
    """The endless micro-batches of one reader."""

    def __init__(
        self,
        sources: Mapping[str, SourceConfig],
        processor: Any,
        data: DataConfig,
        seed: str,
        micro_batch_size: int,
        rank: int,
        readers: int,
        layout: Frames,
    ) -> None:
        import webdataset.shardlists

        self._urls = {name: webdataset.shardlists.expand_urls(config.path) for name, config in sources.items()}
        for name, urls in self._urls.items():
            if len(urls) < readers:
                raise ConfigError(
                    f"data source {name!r} has {len(urls)} shards for {readers} readers (ranks x data.num_workers): "
                    "use fewer workers, or write more shards."
                )
        self._sources, self._processor, self._data = dict(sources), processor, data
        self._renderers = {name: Renderer(processor, config) for name, config in sources.items()}
        self._seed, self._micro, self._rank, self._readers = seed, micro_batch_size, rank, readers
        self._assembler = Assembler(processor, list(sources), layout)

    def __iter__(self) -> Iterator[tuple[PackedBatch, list[QuarantineEntry]]]:
        worker = get_worker_info()
        reader = self._rank * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        packer = Packer(self._data.sequence_length, self._data.images_per_pack, self._data.packing_pool)
        held: dict[int, Document] = {}
        bad: list[QuarantineEntry] = []
        packs: list[list[Unit]] = []
        for number, document in enumerate(self._mixed(reader, bad)):
            held[number] = document
            frames = sum(len(frame) for frame in document.rendered.frames)
            packs += packer.add(Unit(document.source, number, 0, 0, -1, len(document.rendered.ids), frames))
            if len(packs) == self._micro:
                chosen = [held.pop(unit.sample) for pack in packs for unit in pack]
                hashed = sum(_hash(document) for document in chosen) % (1 << 64)
                capacity = self._micro * self._data.sequence_length
                yield self._assembler.batch(chosen, hashed, hashed, capacity), bad[:]
                packs, bad[:] = [], []

    def _mixed(self, reader: int, bad: list[QuarantineEntry]) -> Iterator[Document]:
        """Documents of all sources by their weights, counted in samples."""
        streams = {name: self._documents(name, reader, bad) for name in self._sources}
        shares = Shares({name: config.weight for name, config in self._sources.items()})
        sizes = dict.fromkeys(streams, 1)
        while True:
            name = shares.next(sizes)
            shares.add(name, 1)
            yield next(streams[name])

    def _documents(self, name: str, reader: int, bad: list[QuarantineEntry]) -> Iterator[Document]:
        import webdataset

        urls, cycle = self._urls[name][reader :: self._readers], 0
        number = list(self._sources).index(name)
        while True:
            seed = int.from_bytes(
                hashlib.blake2b(f"{self._seed} {name} {reader} {cycle}".encode(), digest_size=4).digest()
            )
            shuffle = len(urls) if self._data.shuffle else False
            stream = webdataset.WebDataset(
                urls, shardshuffle=shuffle, seed=seed, nodesplitter=None, workersplitter=None, empty_check=False
            )
            if self._data.shuffle:
                stream = stream.shuffle(_SHUFFLE_BUFFER, seed=seed)
            for stored in stream:
                try:
                    yield self._document(stored, name, number, cycle)
                except BadSample as error:
                    where = (name, stored["__key__"], stored["__url__"])
                    bad.append(QuarantineEntry(0, -1, *where, error.reason, error.detail))
            cycle += 1

    def _document(self, stored: dict[str, Any], name: str, number: int, cycle: int) -> Document:
        key = stored["__key__"]
        if "json" not in stored:
            raise BadSample("no_json", f"members {sorted(k for k in stored if k[0] != '_')} but no {key}.json")
        sample = parse_sample(stored["json"], key)
        for item in sample.image_items():
            if item["image"] not in stored:
                raise BadSample("missing_image", f"the JSON names {item['image']!r}, which the sample does not hold")
            if item.get("crc32") not in (None, zlib.crc32(stored[item["image"]])):
                raise BadSample("damaged", f"image {item['image']!r} does not fit the checksum in the JSON")
        images = {place: decode_image(stored[image]) for place, image in enumerate(sample.images)}
        renderer, sizes = self._renderers[name], [image.size for image in images.values()]
        variant = variant_drawn(renderer.variants, 0, cycle, f"{self._seed} {name}", zlib.crc32(key.encode()))
        prepared = renderer.prepare(sample, key, sizes, variant)
        pieces, planned = prepared.pieces, prepared.planned
        if (planned.kinds == BORDER_KIND).any():
            raise BadSample("several_documents", "documents.end_marker divides it, which needs an index")
        tokens, frames = int(planned.tokens.sum()), int(planned.frames.sum())
        if tokens > self._data.sequence_length or frames > self._data.images_per_pack:
            raise BadSample("too_long", f"{tokens} tokens and {frames} frames do not fit a pack")
        draws = draw_key(self._data.augment, 0, cycle, f"{self._seed} {name}", key)
        encoded = {}
        for place, view in prepared.views.items():
            image = augment(images[place], self._data.augment, draws, place)
            image = as_planned(image, sizes[place], view, self._processor)
            encoded[place] = encode_view(image, view, self._processor)
        rendered = expand(pieces, encoded, planned)
        trained = trained_tokens(rendered, self._sources[name].loss)
        record = DocumentRecord(-1, name, key, stored["__url__"], tokens, len(encoded), int(trained.sum()))
        return Document(record, number, rendered, trained)


def _hash(document: Document) -> int:
    described = f"{document.record.source}\0{document.record.key}\0{document.record.tokens}".encode()
    return int.from_bytes(hashlib.blake2b(described, digest_size=8).digest(), "little")


def _unchanged(value: Any) -> Any:
    return value
