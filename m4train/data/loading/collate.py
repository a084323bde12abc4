"""From planned packs to a PackedBatch: read, decode, render, label, lay end to end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from PIL import Image

from m4train.batch import DocumentRecord, PackedBatch
from m4train.config import DataConfig
from m4train.data.documents.assemble import Assembler, Document
from m4train.data.documents.augment import augment, draw_key
from m4train.data.documents.image_layout import FRAMES, Frames
from m4train.data.documents.labels import trained_tokens
from m4train.data.documents.rendering import Rendered, Renderer, as_planned, encode_view, expand, needed_sizes
from m4train.data.documents.splitting import run_of
from m4train.data.documents.variants import View, variant_drawn
from m4train.data.index.shard_index import Pieces, ShardIndex
from m4train.data.loading.quarantine import QuarantineEntry
from m4train.data.plan.packing import Unit
from m4train.data.plan.plan import PlannedPack
from m4train.data.source import Source
from m4train.errors import BadSample, M4Error, StaleIndexError
from m4train.processing.pieces import EncodedImage, ImagePiece
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
        self._renderers = [Renderer(processor, source.config) for source in sources]
        self._assembler = Assembler(processor, [source.name for source in sources], layout)

    def batch(
        self, packs: Sequence[PlannedPack], step: int, begin: Callable[[Unit], None] = lambda unit: None
    ) -> tuple[PackedBatch, list[QuarantineEntry]]:
        """The micro-batch of `packs` and the samples that had to be left out of it; `begin` is told each unit it begins with.

        Without packs, or when nothing of them can be used, one token that predicts nothing stands in, so that every rank
        runs the same modules. Raises StaleIndexError and DataError, which end the run.
        """
        documents: list[Document] = []
        bad: list[QuarantineEntry] = []
        data_hash = plan_hash = 0
        for pack in packs:
            self._expect(pack)
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

    def _expect(self, pack: PlannedPack) -> None:
        for number, source in enumerate(self.sources):
            source.expect([unit.sample for unit in pack.units if unit.source == number])

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
            rendered, images = self._render(source, unit, shard, number)
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

    def variant(self, unit: Unit) -> int:
        """Which variant of its sample a planned segment is cut from."""
        source = self.sources[unit.source]
        shard, _ = source.index.locate(unit.sample)
        return variant_drawn(shard.variants, self.seed, unit.epoch, source.name, unit.sample)

    def planned(self, unit: Unit) -> Pieces:
        """The pieces of a planned segment, from the index."""
        shard, number = self.sources[unit.source].index.locate(unit.sample)
        pieces = shard.pieces(number, self.variant(unit))
        last = len(pieces.tokens) if unit.last < 0 else unit.last
        return run_of(pieces, unit.first, last)

    def _render(self, source: Source, unit: Unit, shard: ShardIndex, number: int) -> tuple[Rendered, int]:
        """The rendered run of pieces, and its number of images."""
        key, variant = shard.key(number), self.variant(unit)
        sizes = [(member.width, member.height) for member in shard.members(number) if member.is_image]
        with self._clock("read"):
            sample = source.read(unit.sample)
        with self._clock("tokenize"):
            prepared = self._renderers[unit.source].prepare(sample, key, sizes, variant)
        pieces, planned = prepared.pieces, len(shard.pieces(number, variant).tokens)
        if len(pieces) != planned:
            raise StaleIndexError(f"renders to {len(pieces)} pieces, but the index has {planned}")
        run = pieces[unit.first : planned if unit.last < 0 else unit.last]
        wanted = sorted({piece.image for piece in run if isinstance(piece, ImagePiece)})
        views = {image: prepared.views[image] for image in wanted}
        draws = draw_key(self.data.augment, self.seed, unit.epoch, source.name, key)
        encoded = self._encoded(source, unit.sample, views, [sizes[image] for image in wanted], draws)
        return expand(run, encoded, self.planned(unit)), len(wanted)

    def _encoded(
        self, source: Source, sample: int, views: dict[int, View], sizes: list[tuple[int, int]], draws: bytes
    ) -> dict[int, EncodedImage]:
        """The images of a sample that `views` names, read, decoded, augmented and cut into frames."""
        least = {}
        if source.config.images.scaled_decode and not draws:  # augmentations count in pixels of the whole image
            least = needed_sizes(views, dict(zip(views, sizes)), self.processor)
        with self._clock("decode"):
            images = source.images(sample, list(views), least) if views else {}
        with self._clock("tile"):
            return {
                number: self._frames(image, views[number], size, number, number in least, draws)
                for size, (number, image) in zip(sizes, images.items())
            }

    def _frames(
        self, image: Image.Image, view: View, size: tuple[int, int], number: int, scaled: bool, draws: bytes
    ) -> EncodedImage:
        """The frames and ids of image `number` of its sample, whose file has `size` (width, height)."""
        if scaled:
            return encode_view(image, view, self.processor, size)
        image = augment(image, self.data.augment, draws, number)
        return encode_view(as_planned(image, size, view, self.processor), view, self.processor)

    def document_hash(self, unit: Unit, pack: int, outcome: bytes) -> int:
        """One document's part of `data_hash` (with its outcome) or of `plan_hash` (without)."""
        source = self.sources[unit.source]
        shard, number = source.index.locate(unit.sample)
        key = shard.key(number)
        draws = draw_key(self.data.augment, self.seed, unit.epoch, source.name, key)
        draws += b"variant %d" % self.variant(unit) if shard.variants > 1 else b""
        draws += b"scaled decode" if source.config.images.scaled_decode else b""
        described = f"{pack}\0{source.name}\0{key}\0{unit.first}\0{unit.last}\0{unit.tokens}\0".encode()
        digest = hashlib.blake2b(described + shard.content_hash(number) + draws + b"\0" + outcome, digest_size=8)
        return int.from_bytes(digest.digest(), "little")
