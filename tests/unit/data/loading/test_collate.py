import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from m4train.config import AugmentConfig, DataConfig, SourceConfig
from m4train.data.documents.augment import moved
from m4train.data.loading.collate import Collator
from m4train.data.plan.plan import Plan, PlannedPack
from m4train.data.source import Source, build_sources
from m4train.data.storage import files as storage
from m4train.errors import DataError, StaleIndexError
from tests.helpers.data import FakeProcessor, digit_pictures, documents, make_sources, undecodable, write_shards

PROCESSOR = FakeProcessor()


def first_packs(sources: list[Source], data: DataConfig, count: int = 8) -> tuple[PlannedPack, ...]:
    return next(Plan(sources, data, 0, count).steps()).packs


def test_a_batch_is_its_documents_end_to_end(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    packs = first_packs(sources, data)
    batch, bad = Collator(sources, PROCESSOR, data, 0).batch(packs, 1)
    assert not bad
    units = [unit for pack in packs for unit in pack.units]
    assert batch.segments.lengths == tuple(unit.tokens for unit in units)
    assert batch.capacity == 8 * 256
    assert batch.images is not None
    assert batch.images.count == batch.images.pixels.shape[0] == sum(unit.frames for unit in units)
    assert batch.images.pixels.dtype == torch.uint8
    assert batch.image_positions is not None
    assert (batch.input_ids[batch.image_positions] == PROCESSOR.image_token_id).all()
    assert len(batch.image_positions) == 2 * batch.images.count
    starts = batch.segments.cu_seqlens[:-1].long()
    assert (batch.position_ids[starts] == 0).all()
    assert torch.equal(batch.targets, batch.input_ids[batch.loss_positions + 1])
    assert not np.isin(batch.loss_positions + 1, starts).any(), "a loss crosses a document border"
    assert batch.loss_tokens == sum(document.loss_tokens for document in batch.documents)
    names = [batch.source_names[n] for n in batch.target_sources.tolist()]
    assert names == [d.source for d in batch.documents for _ in range(d.loss_tokens)]


def test_images_stay_with_their_text(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    pictures, digits = digit_pictures()
    chats = [source for source in sources if source.name == "digits"]
    packs = first_packs(chats, data)
    batch, _ = Collator(chats, PROCESSOR, data, 0).batch(packs, 1)
    table = PROCESSOR.pixel_table()
    assert batch.images is not None
    assert batch.images.pixel_table is not None
    assert np.array_equal(batch.images.pixel_table.numpy(), table)
    for number, record in enumerate(batch.documents):
        original = int(record.key.removeprefix("chat"))
        grey = np.asarray(pictures[original])
        assert np.array_equal(batch.images.pixels[number].numpy(), np.stack([grey] * 3))
        begin, end = batch.segments.cu_seqlens[number : number + 2].tolist()
        trained = [t for p, t in zip(batch.loss_positions, batch.targets) if begin <= p < end]
        assert PROCESSOR.decode(trained) == f"It is {digits[original]}."


def test_no_image_and_no_document_still_give_one_spare_frame(tmp_path: Path) -> None:
    write_shards(tmp_path, [("a", {"items": [{"text": "no picture here"}]}, {})])
    data = DataConfig(sequence_length=64)
    sources = build_sources({"text": SourceConfig(path=str(tmp_path / "*.tar"))}, data, PROCESSOR)
    collator = Collator(sources, PROCESSOR, data, 0)
    batch, _ = collator.batch(first_packs(sources, replace(data, epochs=1)), 1)
    empty, _ = collator.batch([], 1)
    for one in (batch, empty):
        assert one.images is not None
        assert one.images.count == 0
        assert one.images.pixels.shape == (1, 3, 16, 16)
        assert one.image_positions is not None
        assert len(one.image_positions) == 0
    assert empty.tokens == 1
    assert empty.loss_tokens == empty.capacity == len(empty.documents) == empty.data_hash == 0


def test_a_bad_sample_is_left_out_named_and_changes_only_the_data_hash(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)
    packs = first_packs(sources, data)
    collator = Collator(sources, PROCESSOR, data, 0)
    clean, _ = collator.batch(packs, 1)
    unit = next(u for pack in packs for u in pack.units if u.frames)
    shard, number = sources[unit.source].index.locate(unit.sample)
    member = shard.members(number)[1]
    content = bytearray(Path(shard.shard).read_bytes())
    content[member.offset + member.size // 2] ^= 0xFF
    Path(shard.shard).write_bytes(content)
    damaged, bad = Collator(build_again(sources), PROCESSOR, data, 0).batch(packs, 1)
    assert [(entry.key, entry.reason) for entry in bad] == [(shard.key(number), "damaged")]
    assert damaged.plan_hash == clean.plan_hash
    assert damaged.data_hash != clean.data_hash
    assert len(damaged.documents) == len(clean.documents) - 1


def build_again(sources: list[Source]) -> list[Source]:
    """The same sources over the same index, with no open files."""
    return [Source(s.name, s.config, s.index, s.shard_format, storage.FileReader()) for s in sources]


def test_an_image_that_only_decoding_finds_broken_is_left_out(tmp_path: Path) -> None:
    key, content, images = next(documents(1))
    images["0.png"] = undecodable(images["0.png"])
    write_shards(tmp_path, [(key, content, images), *list(documents(6))[1:]])
    data = DataConfig(sequence_length=512, epochs=1)
    sources = build_sources({"pages": SourceConfig(path=str(tmp_path / "*.tar"))}, data, PROCESSOR)
    batch, bad = Collator(sources, PROCESSOR, data, 0).batch(first_packs(sources, data), 1)
    assert [(entry.key, entry.reason) for entry in bad] == [(key, "unreadable_image")]
    assert len(batch.documents) == 5


def test_transient_read_errors_are_tried_again_and_lasting_ones_end_the_run(tmp_path: Path, monkeypatch) -> None:
    sources, data = make_sources(tmp_path)
    packs = first_packs(sources, data)
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.001)
    failures, read = [], storage.os.pread

    def flaky(*arguments):
        if len(failures) % 3 < 2:
            failures.append(1)
            raise OSError("lapse")
        failures.append(0)
        return read(*arguments)

    monkeypatch.setattr(storage.os, "pread", flaky)
    batch, bad = Collator(build_again(sources), PROCESSOR, data, 0).batch(packs, 1)
    assert not bad
    assert len(batch.documents) == sum(len(pack.units) for pack in packs)
    monkeypatch.setattr(storage.os, "pread", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(DataError, match="failed 8 times"):
        Collator(build_again(sources), PROCESSOR, data, 0).batch(packs, 1)


def test_a_length_that_differs_from_the_plan_is_a_stale_index(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path)

    class Other(FakeProcessor):
        def encode_document(self, items):
            return super().encode_document([*items, {"text": "more"}])

    with pytest.raises(StaleIndexError, match="of source 'pages'"):
        Collator(sources, Other(), data, 0).batch(first_packs(sources, data), 1)


def test_augmentation_depends_on_the_epoch_and_sample_alone_and_enters_the_hash(tmp_path: Path) -> None:
    sources, data = make_sources(tmp_path, augment=AugmentConfig(shift_pixels=3))
    packs = first_packs(sources, data)
    plain, _ = Collator(sources, PROCESSOR, replace(data, augment=AugmentConfig()), 0).batch(packs, 1)
    first, _ = Collator(sources, PROCESSOR, data, 0).batch(packs, 1)
    again, _ = Collator(sources, PROCESSOR, data, 0).batch(packs, 9)
    later = [dataclasses.replace(p, units=tuple(u._replace(epoch=1) for u in p.units)) for p in packs]
    other, _ = Collator(sources, PROCESSOR, data, 0).batch(later, 1)
    assert torch.equal(first.images.pixels, again.images.pixels)
    assert first.data_hash == again.data_hash
    assert not torch.equal(first.images.pixels, other.images.pixels)
    assert len({plain.data_hash, first.data_hash, other.data_hash}) == 3


def test_shift_repeats_edges() -> None:
    picture, _ = digit_pictures()
    pixels = np.asarray(picture[0])
    result = np.asarray(moved(picture[0], 0.0, 2, -1))
    assert np.array_equal(result[:-1, 2:], pixels[1:, :-2])
    assert np.array_equal(result[:-1, 0], pixels[1:, 0])
    assert np.array_equal(result[-1, 2:], pixels[-1, :-2])
