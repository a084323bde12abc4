"""From planned packs to a PackedBatch: read, decode, render, label, lay end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from m4train.batch import DocumentRecord, PackedBatch
from m4train.config import DataConfig
from m4train.data.assemble import Assembler, Document
from m4train.data.augment import augment, draw_key
from m4train.data.index import Pieces
from m4train.data.labels import trained_tokens
from m4train.data.layout import FRAMES, Frames
from m4train.data.packing import Unit
from m4train.data.plan import PlannedPack
from m4train.data.quarantine import QuarantineEntry
from m4train.data.rendering import Rendered, expand, render
from m4train.data.source import Source
from m4train.errors import BadSample, M4Error, StaleIndexError
from m4train.processing.pieces import ImagePiece

_MODULUS = 1 << 64


class Collator:
    """Turns planned packs into batches; holds what worker processes need and is pickled to them."""

    def __init__(
        self, sources: Sequence[Source], processor: Any, data: DataConfig, seed: int, layout: Frames = FRAMES
    ) -> None:
        self.sources = list(sources)
        self.processor = processor
        self.data = data
        self.seed = seed
        self._assembler = Assembler(processor, [source.name for source in sources], layout)

    def batch(self, packs: Sequence[PlannedPack], step: int) -> tuple[PackedBatch, list[QuarantineEntry]]:
        """The micro-batch of `packs` and the samples that had to be left out of it.

        Without packs, or when nothing of them can be used, one token that predicts nothing stands in, so that every rank
        runs the same modules. Raises StaleIndexError and DataError, which end the run.
        """
        documents: list[Document] = []
        bad: list[QuarantineEntry] = []
        data_hash = plan_hash = 0
        for pack in packs:
            for unit in pack.units:
                outcome = b"used"
                try:
                    documents.append(self.document(unit, pack.number))
                except BadSample as error:
                    outcome = b"dropped"
                    bad.append(self._entry(unit, pack.number, step, error))
                plan_hash = (plan_hash + self.document_hash(unit, pack.number, b"")) % _MODULUS
                data_hash = (data_hash + self.document_hash(unit, pack.number, outcome)) % _MODULUS
        return self._assembler.batch(documents, data_hash, plan_hash, len(packs) * self.data.sequence_length), bad

    def _entry(self, unit: Unit, pack: int, step: int, error: BadSample) -> QuarantineEntry:
        source = self.sources[unit.source]
        shard, number = source.index.locate(unit.sample)
        return QuarantineEntry(step, pack, source.name, shard.key(number), shard.shard, error.reason, error.detail)

    def document(self, unit: Unit, pack: int) -> Document:
        """One planned segment of pack number `pack`, read, decoded and labelled. Raises BadSample, and as `batch` does."""
        source = self.sources[unit.source]
        shard, number = source.index.locate(unit.sample)
        key = shard.key(number)
        try:
            rendered, images = self._render(source, unit, shard.pieces(number), key)
            trained = trained_tokens(rendered, source.config.loss)
        except StaleIndexError as error:
            raise StaleIndexError(f"Sample {key!r} of source {source.name!r} in {shard.shard}: {error}.") from error
        except M4Error:
            raise
        except Exception as error:
            error.add_note(f"while building sample {key!r} of source {source.name!r} in {shard.shard}")
            raise
        record = DocumentRecord(pack, source.name, key, shard.shard, len(rendered.ids), images, int(trained.sum()))
        return Document(record, unit.source, rendered, trained)

    def _render(self, source: Source, unit: Unit, planned: Pieces, key: str) -> tuple[Rendered, int]:
        """The rendered run of pieces, and its number of images."""
        pieces = render(source.read(unit.sample), self.processor)
        if len(pieces) != len(planned.tokens):
            raise StaleIndexError(f"renders to {len(pieces)} pieces where the index has {len(planned.tokens)}")
        last = len(pieces) if unit.last < 0 else unit.last
        run = pieces[unit.first : last]
        numbers = [piece.image for piece in run if isinstance(piece, ImagePiece)]
        images = source.images(unit.sample, range(numbers[0], numbers[-1] + 1)) if numbers else {}
        draws = draw_key(self.data.augment, self.seed, unit.epoch, source.name, key)
        images = {n: augment(image, self.data.augment, draws, n) for n, image in images.items()}
        part = Pieces(*(column[unit.first : last] for column in (planned.tokens, planned.kinds, planned.frames)))
        return expand(run, images, part, self.processor), len(images)

    def document_hash(self, unit: Unit, pack: int, outcome: bytes) -> int:
        """One document's part of `data_hash` (with its outcome) or of `plan_hash` (without)."""
        source = self.sources[unit.source]
        shard, number = source.index.locate(unit.sample)
        key = shard.key(number)
        draws = draw_key(self.data.augment, self.seed, unit.epoch, source.name, key)
        described = f"{pack}\0{source.name}\0{key}\0{unit.first}\0{unit.last}\0{unit.tokens}\0".encode()
        digest = hashlib.blake2b(described + shard.content_hash(number) + draws + b"\0" + outcome, digest_size=8)
        return int.from_bytes(digest.digest(), "little")
