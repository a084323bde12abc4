import json
import pickle
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from m4train.config import SourceConfig
from m4train.data.documents.rendering import Renderer
from m4train.data.index import build as index_build
from m4train.data.index import scan, shard_index
from m4train.data.index.build import build_index, open_index
from m4train.data.index.shard_index import index_path
from m4train.data.index.source_index import SourceIndex
from m4train.data.source import build_sources, source_stats
from m4train.data.sources import tarfiles
from m4train.data.sources.tar import CanonicalTar
from m4train.errors import DataError, StaleIndexError
from tests.helpers.data import FakeProcessor, data_config, document, documents, write_shards

PROCESSOR = FakeProcessor()
RENDERER = Renderer(PROCESSOR, SourceConfig())


def opened(path: Path, limit: int = 1000) -> SourceIndex:
    return SourceIndex(open_index([str(path)], CanonicalTar(), RENDERER, None, limit))


def reasons(index: SourceIndex) -> dict[str, str]:
    return {shard.key(number): why[0] for shard in index.shards for number, why in shard.bad.items()}


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    return path


def test_lengths_sizes_and_keys_are_those_of_the_samples(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(20))
    index = opened(path)
    assert len(index) == 20
    for number, (key, content, images) in enumerate(documents(20)):
        shard, local = index.locate(number)
        assert shard.key(local) == key
        sizes = [(i["width"], i["height"]) for i in content["items"] if "image" in i]
        assert [(m.width, m.height) for m in shard.members(local)[1:]] == sizes
        text = sum(len(i["text"].encode()) for i in content["items"] if "text" in i)
        assert shard.lengths[local] == 2 + text + sum(PROCESSOR.tokens_for(*size) for size in sizes)
        assert shard.frames[local] == sum(PROCESSOR.frames_for(*size) for size in sizes)
        assert shard.pieces(local).tokens.sum() == shard.lengths[local]
        assert images
    again = pickle.loads(pickle.dumps(index))
    assert again.digest() == index.digest()
    assert len(pickle.dumps(index)) < 1000


def test_truncated_shard_keeps_its_complete_samples_and_names_the_cut(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(10))
    whole = opened(path)
    member = whole.locate(6)[0].members(6)[-1]
    path.write_bytes(path.read_bytes()[: member.offset + member.size // 2])
    index = opened(path)
    good = [index.shards[0].key(n) for n in range(len(index)) if n not in index.shards[0].bad]
    assert good == [f"doc{n:05d}" for n in range(6)]
    assert "damaged_shard" in reasons(index).values()


def test_zeros_over_the_last_sample_are_not_the_end_of_a_shorter_shard(tmp_path: Path) -> None:
    for count in range(2, 24):  # every place the end can have in a record of 20 blocks
        texts = [(f"d{number}", {"items": [{"text": "x"}]}, {}) for number in range(count)]
        [path] = write_shards(tmp_path / str(count), texts)
        assert not opened(path).bad_count
        data = path.read_bytes()
        start = data.rindex(b"d%d.json" % (count - 1))
        path.write_bytes(data[:start] + bytes(len(data) - start))
        index = opened(path)
        assert len(index) - index.bad_count == count - 1
        assert list(reasons(index).values()) == ["damaged_shard"]


def test_shards_of_other_writers_end_in_a_whole_record(tmp_path: Path) -> None:
    members = [(f"d{number}.json", b'{"items":[{"text":"x"}]}') for number in range(12)]
    path = tar_of(tmp_path / "a.tar", members)
    assert not opened(path).bad_count
    data = path.read_bytes()
    path.write_bytes(data + bytes(10240))
    assert list(reasons(opened(path)).values()) == ["damaged_shard"]


def test_damage_in_the_middle_costs_only_the_samples_it_touches(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(10))
    data = bytearray(path.read_bytes())
    member = opened(path).locate(4)[0].members(4)[0]
    data[member.offset - 500 : member.offset - 490] = b"??????????"  # in the header of one member
    path.write_bytes(data)
    index = opened(path)
    bad = reasons(index)
    good = {shard.key(n) for shard in index.shards for n in range(len(shard)) if n not in shard.bad}
    assert good == {f"doc{n:05d}" for n in range(10) if n != 4}
    assert "damaged_shard" in bad.values()


def test_bad_samples_are_named_with_their_reason(tmp_path: Path) -> None:
    _, content, images = document(0)
    text = json.dumps(content).encode()
    names = [(f"{name}", data) for name, data in images.items()]
    members = [("ok.json", text), *((f"ok.{name}", data) for name, data in names)]
    members += [("gone.json", text)]
    members += [("odd.json", b"{"), ("twice.json", b'{"items":[{"text":"a"}]}'), ("other.txt", b"x")]
    members += [("twice.json", b'{"items":[{"text":"b"}]}'), ("my.doc.json", b'{"items":[{"text":"b"}]}')]
    members += [("pic.json", b'{"items":[{"image":"0.png"}]}'), ("pic.0.png", b"no picture"), ("nokey", b"")]
    index = opened(tar_of(tmp_path / "a.tar", members))
    bad = reasons(index)
    assert bad.pop("gone") == "missing_image"
    assert bad.pop("odd") == "bad_json"
    assert bad.pop("twice") == "duplicate_key"
    assert bad.pop("other") == "no_json"
    assert bad.pop("my") == "dot_in_key"
    assert bad.pop("pic") == "unreadable_image"
    assert list(bad.values()) == ["bad_name"]
    assert sum(len(shard) for shard in index.shards) - index.bad_count == 2


def test_pax_and_gnu_long_names(tmp_path: Path) -> None:
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        path, key = tmp_path / f"{form}.tar", "folder/" + "k" * 90 if form == tarfile.USTAR_FORMAT else "k" * 300
        with tarfile.open(path, "w", format=form) as tar:
            info = tarfile.TarInfo(key + ".json")
            info.size = len(b'{"items":[{"text":"a"}]}')
            tar.addfile(info, BytesIO(b'{"items":[{"text":"a"}]}'))
        index = opened(path)
        assert [index.shards[0].key(0)] == [key]
        assert not index.bad_count


def test_a_changed_shard_or_processor_makes_the_index_stale(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(10))
    opened(path)
    with pytest.raises(StaleIndexError, match="auto_index_limit=5"):
        open_index([str(path)], CanonicalTar(), Renderer(FakeProcessor("other"), SourceConfig()), None, 5)
    write_shards(tmp_path, documents(11))
    with pytest.raises(StaleIndexError, match="has changed"):
        opened(path, limit=5)
    assert len(opened(path)) == 11


def test_fresh_indexes_are_left_alone_and_token_counts_do_not_rescan(tmp_path: Path, monkeypatch) -> None:
    [path] = write_shards(tmp_path, documents(5))
    build_index([str(path)], CanonicalTar(), RENDERER)
    before = index_path(str(path), None).stat().st_mtime_ns
    monkeypatch.setattr(index_build, "scan_shard", lambda *_: pytest.fail("scanned again"))
    build_index([str(path)], CanonicalTar(), RENDERER)
    build_index([str(path)], CanonicalTar(), Renderer(FakeProcessor("other"), SourceConfig()))
    assert index_path(str(path), None).stat().st_mtime_ns == before


def test_damaged_index_file_is_rebuilt(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(5))
    opened(path)
    sidecar = index_path(str(path), None)
    sidecar.write_bytes(sidecar.read_bytes()[:-10])
    assert len(opened(path)) == 5


def test_index_dir_that_cannot_be_written_says_what_to_do(tmp_path: Path) -> None:
    [path] = write_shards(tmp_path, documents(1))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="index_dir"):
        open_index([str(path)], CanonicalTar(), RENDERER, str(tmp_path / "file"), 100)


def test_stats(tmp_path: Path) -> None:
    write_shards(tmp_path, documents(5))
    config = {"pages": SourceConfig(path=str(tmp_path / "*.tar"))}
    [source] = build_sources(config, data_config(index_dir=str(tmp_path / "index")), PROCESSOR)
    stats = source_stats(source)
    assert stats["samples"] == 5
    assert stats["images"] == sum(len(images) for _, _, images in documents(5))
    assert stats["bad"] == {}
    assert not (tmp_path / "shard-000000.tar.index").exists()


@pytest.mark.slow
def test_many_shards_are_indexed_by_several_processes_at_once(tmp_path: Path, monkeypatch) -> None:
    paths = [str(path) for path in write_shards(tmp_path, documents(12), max_samples=3)]
    monkeypatch.setattr(index_build, "_INLINE_BYTES", 0)
    done: list[tuple[int, int]] = []
    build_index(paths, CanonicalTar(), RENDERER, workers=2, progress=lambda *counts: done.append(counts))
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    index = SourceIndex(open_index(paths, CanonicalTar(), RENDERER, None, 0))
    assert [index.locate(n)[0].key(index.locate(n)[1]) for n in range(12)] == [f"doc{n:05d}" for n in range(12)]


def test_an_index_made_by_older_rules_is_made_again(tmp_path: Path, monkeypatch) -> None:
    """As before files that desktops leave were passed over, and pictures that lie on their side were measured rightly."""
    [path] = write_shards(tmp_path, documents(3))
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("._junk.json")
        info.size = 4
        tar.addfile(info, BytesIO(b"\0\5\26\7"))
    with monkeypatch.context() as before:
        for module in (scan, shard_index, index_build):
            before.setattr(module, "VERSION", shard_index.VERSION - 1)
        before.setattr(tarfiles, "is_junk", lambda _: False)
        assert len(opened(path)) == 4
    assert len(opened(path)) == 3
    assert reasons(opened(path)) == {}
