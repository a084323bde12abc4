"""From planned packs to a PackedBatch: read, decode, render, label, lay end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from PIL import Image

from m4train.batch import DocumentRecord, PackedBatch
from m4train.config import DataConfig
from m4train.data.documents.assemble import Assembler, Document
from m4train.data.documents.augment import draw_key
from m4train.data.documents.build import DocumentBuilder
from m4train.data.documents.image_layout import FRAMES, Frames
from m4train.data.documents.pieces import Pieces
from m4train.data.documents.rendering import Renderer
from m4train.data.documents.splitting import piece_range
from m4train.data.loading.quarantine import QuarantineEntry
from m4train.data.plan.packing import Unit
from m4train.data.plan.plan import PlannedPack
from m4train.data.source import Located, Source
from m4train.errors import BadSample, M4Error, StaleIndexError
from m4train.processing.pieces import ImagePiece
from m4train.processing.protocol import SampleProcessor

_MODULUS = 1 << 64


class Collator:
    """Turns planned packs into batches; holds what worker processes need and is pickled to them.

    `clock(stage)` surrounds the stages read, tokenize, decode and tile, for measurements.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        processor: SampleProcessor,
        data: DataConfig,
        seed: int,
        layout: Frames = FRAMES,
        clock: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        self.sources = list(sources)
        self.processor = processor
        self.data = data
        self.seed = seed
        self._clock = clock
        renderers = [Renderer(processor, source.config) for source in sources]
        self._builders = [DocumentBuilder(renderer, data.augment, n, clock) for n, renderer in enumerate(renderers)]
        self._assembler = Assembler(processor, [source.name for source in sources], layout)

    def batch(
        self,
        packs: Sequence[PlannedPack],
        step: int,
        begin: Callable[[Unit], None] = lambda unit: None,
        soon: Sequence[PlannedPack] = (),
    ) -> tuple[PackedBatch, list[QuarantineEntry]]:
        """The micro-batch of `packs` and the samples that had to be left out of it; `begin` is told each unit it begins with,
        and the packs that come `soon` are asked of their object store meanwhile.

        Without packs, or when nothing of them can be used, one token that predicts nothing stands in, so that every rank
        runs the same modules. Raises StaleIndexError and DataError, which end the run.
        """
        documents: list[Document] = []
        bad: list[QuarantineEntry] = []
        data_hash = plan_hash = 0
        for pack in (*packs[1:], *soon):
            for source, samples in self._samples(pack):
                source.prefetch(samples)
        for pack in packs:
            for source, samples in self._samples(pack):
                source.expect(samples)
            for unit in pack.units:
                outcome = b"used"
                begin(unit)
                try:
                    documents.append(self.document(unit, pack.number))
                except BadSample as error:
                    outcome = b"dropped"
                    bad.append(self._entry(unit, pack.number, step, error))
                plan_hash = (plan_hash + self.document_hash(unit, pack.number, b"")) % _MODULUS
                data_hash = (data_hash + self.document_hash(unit, pack.number, outcome)) % _MODULUS
        return self._assembler.batch(documents, data_hash, plan_hash, len(packs) * self.data.sequence_length), bad

    def _samples(self, pack: PlannedPack) -> Iterator[tuple[Source, list[int]]]:
        for number, source in enumerate(self.sources):
            if source.is_remote:
                yield source, [unit.sample for unit in pack.units if unit.source == number]

    def locate(self, unit: Unit) -> Located:
        """Where the sample of a planned segment is stored, and which variant of it is drawn."""
        return self.sources[unit.source].draw(unit.sample, self.seed, unit.epoch)

    def _entry(self, unit: Unit, pack: int, step: int, error: BadSample) -> QuarantineEntry:
        where = self.locate(unit)
        return QuarantineEntry(step, pack, where.source.name, where.key, where.shard.shard, error.reason, error.detail)

    def document(self, unit: Unit, pack: int) -> Document:
        """One planned segment of pack number `pack`, read, decoded and labelled. Raises BadSample, and as `batch` does."""
        where = self.locate(unit)
        name = f"{where.key!r} of source {where.source.name!r} in {where.shard.shard}"
        builder = self._builders[unit.source]
        record = DocumentRecord(pack, where.source.name, where.key, where.shard.shard, 0, 0, 0)
        draws = draw_key(self.data.augment, self.seed, unit.epoch, where.source.name, where.key)
        try:
            with self._clock("read"):
                stored = where.stored()
            prepared, planned = builder.prepare(stored, where.key, where.variant), where.pieces
            if unit.last >= 0 and len(prepared.pieces) == len(planned.tokens):
                division = where.division(self.data)
                prepared, planned = replace(prepared, pieces=division.cut(prepared.pieces)), division.pieces
            return builder.finish(stored, prepared, record, draws, planned, unit.first, unit.last)
        except StaleIndexError as error:
            raise StaleIndexError(f"Sample {name}: {error}.") from error
        except M4Error:
            raise
        except Exception as error:
            error.add_note(f"while building sample {name}")
            raise

    def originals(self, unit: Unit, longest: int) -> list[Image.Image]:
        """The images of a planned segment as they are stored, in reading order, made no larger than `longest`. Raises BadSample."""
        where = self.locate(unit)
        stored = where.stored()
        pieces = self._builders[unit.source].prepare(stored, where.key, where.variant).pieces
        if unit.last >= 0:
            pieces = where.division(self.data).cut(pieces)[unit.first : unit.last]
        numbers = [piece.image for piece in pieces if isinstance(piece, ImagePiece)]
        images = stored.decode(sorted(set(numbers)), {}) if numbers else {}
        for image in images.values():
            image.thumbnail((longest, longest))
        return [images[number].convert("RGB") for number in numbers]

    def planned(self, unit: Unit) -> Pieces:
        """The pieces of a planned segment, from the index."""
        where = self.locate(unit)
        return where.pieces if unit.last < 0 else piece_range(where.division(self.data).pieces, unit.first, unit.last)

    def document_hash(self, unit: Unit, pack: int, outcome: bytes) -> int:
        """One document's part of `data_hash` (with its outcome) or of `plan_hash` (without)."""
        where = self.locate(unit)
        name, key, shard = where.source.name, where.key, where.shard
        draws = draw_key(self.data.augment, self.seed, unit.epoch, name, key)
        draws += b"variant %d" % where.variant if shard.variants > 1 else b""
        draws += b"scaled decode" if where.source.config.images.scaled_decode else b""
        described = f"{pack}\0{name}\0{key}\0{unit.first}\0{unit.last}\0{unit.tokens}\0".encode()
        digest = hashlib.blake2b(described + shard.content_hash(where.number) + draws + b"\0" + outcome, digest_size=8)
        return int.from_bytes(digest.digest(), "little")
