"""Shards in object stores: what is asked for, how often, and what happens when the store fails."""

import json
import os
import pickle
import threading
from pathlib import Path

import pytest

from m4train.config import SourceConfig
from m4train.data.loading.collate import Collator
from m4train.data.loading.loader import Loader
from m4train.data.plan.plan import Plan
from m4train.data.source import Source, build_sources
from m4train.data.storage.block_cache import BlockCache
from m4train.data.storage.files import FileReader
from m4train.errors import ConfigError, DataError, StaleIndexError
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards
from tests.helpers.stores import HttpStore, http_store

pytest.importorskip("aiohttp", reason="the extra m4train[remote] is not installed")
PROCESSOR = FakeProcessor()


def opened(path: str, tmp_path: Path, **changes) -> Source:
    data = data_config(index_dir=str(tmp_path / "index"), **changes)
    [source] = build_sources({"pages": SourceConfig(path=path)}, data, PROCESSOR)
    return source


def contents(source: Source) -> dict[str, tuple]:
    read = ((source.key(n), source.read(n).items, source.stored_images(n)) for n in range(len(source)))
    return {key: (json.dumps(items), images) for key, items, images in read}


def test_samples_are_those_of_local_shards(store: HttpStore, tmp_path: Path) -> None:
    local = opened(str(tmp_path / "shards" / "*.tar"), tmp_path)
    for pattern in ("shard-{000000..000002}.tar", "*.tar"):
        remote = opened(f"{store.url}/{pattern}", tmp_path)
        assert len(remote) == 30
        assert contents(remote) == contents(local)


def test_an_index_is_built_by_reading_every_byte_about_once_and_then_kept(
    store: HttpStore, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("m4train.data.index.build._READ_AHEAD", 8192)
    size = (tmp_path / "shards" / "shard-000001.tar").stat().st_size
    opened(f"{store.url}/shard-000001.tar", tmp_path)
    assert size <= store.bytes_sent("shard-000001.tar") < 1.3 * size
    assert len(store.ranges) < 10
    assert not list((tmp_path / "index").glob(".*"))
    store.ranges.clear()
    opened(f"{store.url}/shard-000001.tar", tmp_path)
    assert not store.ranges


def test_a_changed_shard_is_noticed(store: HttpStore, tmp_path: Path) -> None:
    assert len(opened(f"{store.url}/shard-000000.tar", tmp_path)) == 10
    path = write_shards(tmp_path / "shards", documents(4), max_samples=10)[0]
    os.utime(path, (2e9, 2e9))
    assert len(opened(f"{store.url}/shard-000000.tar", tmp_path)) == 4


def test_a_pack_takes_few_requests(store: HttpStore, tmp_path: Path) -> None:
    source = opened(f"{store.url}/*.tar", tmp_path, shuffle=False)
    data = data_config(sequence_length=2048, images_per_pack=200)
    step = next(Plan([source], data, 0, 1).steps())
    store.ranges.clear()
    batch, bad = Collator([source], PROCESSOR, data, 0).batch(step.packs, 1)
    assert not bad
    assert len(batch.documents) > 8
    assert len(store.ranges) <= 3  # one for each shard the pack lies in
    assert source.files.reads >= len(store.ranges)


def test_a_single_sample_is_one_request_with_its_images(store: HttpStore, tmp_path: Path) -> None:
    source = opened(f"{store.url}/*.tar", tmp_path)
    store.ranges.clear()
    source.read(7)
    assert source.images(7)
    assert len(store.ranges) == 1


def test_lapses_are_waited_out_and_lasting_failure_ends_the_run(store: HttpStore, tmp_path: Path) -> None:
    source = opened(f"{store.url}/shard-000000.tar", tmp_path)
    store.failures = 2
    assert source.read(0).items
    store.broken = True
    with pytest.raises(DataError, match="failed 8 times"):
        source.read(3)


def test_a_shard_that_is_gone_is_named(store: HttpStore, tmp_path: Path) -> None:
    source = opened(f"{store.url}/shard-000000.tar", tmp_path)
    (tmp_path / "shards" / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000000\.tar was there"):
        source.read(3)


@pytest.mark.slow
def test_workers_of_a_run_read_the_same_as_from_local_shards(store: HttpStore, tmp_path: Path) -> None:
    cached = {"cache_dir": str(tmp_path / "cache"), "shuffle": False}
    hashes = []
    for path, settings in ((str(tmp_path / "shards" / "*.tar"), {}), (f"{store.url}/*.tar", cached)):
        source = opened(path, tmp_path, **{"shuffle": False} | settings)
        data = data_config(shuffle=False, num_workers=2)
        steps = Loader(Plan([source], data, 0, 2), PROCESSOR, data, seed=0, micro_batch_size=1, stop_step=5)
        hashes.append([batch.data_hash for step in steps for batch in step.micro_batches])
    assert hashes[0] == hashes[1]
    assert any(not file.name.startswith(".") for file in (tmp_path / "cache").iterdir())


def test_lapses_while_indexing_are_waited_out(store: HttpStore, tmp_path: Path) -> None:
    store.failures = 2
    source = opened(f"{store.url}/shard-000000.tar", tmp_path)
    assert len(source) == 10
    assert not source.index.bad_count


def test_a_server_without_ranges_is_named(store: HttpStore, tmp_path: Path) -> None:
    source = opened(f"{store.url}/shard-000000.tar", tmp_path)
    store.deaf = True
    with pytest.raises(DataError, match="answers a range request with"):
        source.read(3)


def test_what_cannot_work_is_refused(store: HttpStore, tmp_path: Path, monkeypatch) -> None:
    config = {"pages": SourceConfig(path=f"{store.url}/shard-000000.tar")}
    with pytest.raises(ConfigError, match=r"data\.index_dir is null"):
        build_sources(config, data_config(), PROCESSOR)
    with pytest.raises(DataError, match=r"no shard .*shard-000009"):
        opened(f"{store.url}/shard-{{000009..000010}}.tar", tmp_path)
    with pytest.raises(DataError, match="No shard matches"):
        opened(f"{store.url}/none-*.tar", tmp_path)
    monkeypatch.setattr("m4train.data.index.build._REMOTE_BYTES", 1000)
    with pytest.raises(StaleIndexError, match="m4train data index"):
        opened(f"{store.url}/shard-000000.tar", tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere://a\.tar cannot be opened"):
        opened("nowhere://a.tar", tmp_path)


def test_json_with_images_beside_it_and_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    _, _, images = next(documents(1))
    picture = images["0.png"]
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A page."}]
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "0.png").write_bytes(picture)
    lines = [{"messages": turns, "images": ["0.png"]}, {"messages": turns, "images": ["1.png"]}]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"images": [{"bytes": picture}], "messages": turns}] * 3
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    data = data_config(index_dir=str(tmp_path / "index"))
    with http_store(folder) as store:
        config = {
            "lines": SourceConfig(path=f"{store.url}/a.jsonl", format="json"),
            "rows": SourceConfig(path=f"{store.url}/a.parquet", format="parquet"),
        }
        lines_source, rows_source = build_sources(config, data, PROCESSOR)
        assert lines_source.stored_images(0) == [picture]
        assert [why[0] for why in lines_source.index.shards[0].bad.values()] == ["missing_image"]
        assert rows_source.stored_images(2) == [picture]


@pytest.mark.slow
def test_s3(tmp_path: Path, monkeypatch) -> None:
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip("s3fs", reason="the extra m4train[remote] is not installed")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        bucket = fsspec.filesystem("s3")
        bucket.mkdir("shards")
        for path in write_shards(tmp_path, documents(6), max_samples=3):
            bucket.put(str(path), f"shards/web/{path.name}")
        local = opened(str(tmp_path / "*.tar"), tmp_path)
        for pattern in ("shard-{000000..000001}.tar", "*.tar"):
            assert contents(opened(f"s3://shards/web/{pattern}", tmp_path)) == contents(local)
    finally:
        server.stop()


def test_blocks_are_fetched_once_and_shared_by_processes(store: HttpStore, tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path / "cache"), 1 << 20)
    url = f"{store.url}/shard-000000.tar"
    stored = (tmp_path / "shards" / "shard-000000.tar").read_bytes()
    assert FileReader(cache).read(url, 700, 9000) == stored[700:9700]
    fetched = len(store.ranges)
    other = pickle.loads(pickle.dumps(FileReader(cache)))
    assert other.read(url, 5000, 4000) == stored[5000:9000]
    assert len(store.ranges) == fetched
    for block in (tmp_path / "cache").iterdir():
        if not block.name.startswith("."):
            block.write_bytes(block.read_bytes()[:-1] + b"?")
    assert FileReader(cache).read(url, 5000, 4000) == stored[5000:9000]
    assert len(store.ranges) > fetched
    os.utime(tmp_path / "shards" / "shard-000000.tar", (2e9, 2e9))
    (tmp_path / "shards" / "shard-000000.tar").write_bytes(bytes(len(stored)))
    os.utime(tmp_path / "shards" / "shard-000000.tar", (2.1e9, 2.1e9))
    assert FileReader(cache).read(url, 5000, 4000) == bytes(4000)


def test_the_cache_stays_below_its_size_and_keeps_what_was_used_last(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 10_000)
    assert cache.block == 1250
    names = [cache.name("a.tar", [], number) for number in range(30)]
    for number, name in enumerate(names):
        cache.put(name, bytes([number]) * 1000)
        assert cache.get(names[0]) == bytes(1000)  # always used last but one
        assert sum(file.stat().st_size for file in tmp_path.iterdir() if file.name[0] != ".") <= 10_000
        os.utime(tmp_path / name, ns=(number * 10**9, number * 10**9))
        os.utime(tmp_path / names[0], ns=(10**12, 10**12))
    assert cache.get(names[29]) is not None
    assert cache.get(names[3]) is None


def test_the_cache_removes_nothing_that_it_has_not_written(tmp_path: Path) -> None:
    """A folder of a user's own may be named as data.cache_dir."""
    others = [".profile", "thesis.tex", "0" * 32, ".thesis.tex.17.tmp"]
    for name in others:
        (tmp_path / name).write_bytes(bytes(5000))
        os.utime(tmp_path / name, (0, 0))
    (tmp_path / ".ssh").mkdir()
    os.utime(tmp_path / ".ssh", (0, 0))
    cache = BlockCache(str(tmp_path), 10_000)
    left = tmp_path / f".{cache.name('a.tar', [], 99)}.17.tmp"
    left.touch()
    os.utime(left, (0, 0))
    for number in range(30):
        cache.put(cache.name("a.tar", [], number), bytes(1000))
    assert all((tmp_path / name).exists() for name in [*others, ".ssh"])
    assert not left.exists()
    assert len(list(tmp_path.glob("*-*"))) < 10


def test_many_writers_keep_the_cache_below_its_size(tmp_path: Path) -> None:
    cache = BlockCache(str(tmp_path), 50_000)
    seen: list[int] = []

    def write(writer: int) -> None:
        for number in range(40):
            cache.put(cache.name(str(writer), [], number), bytes(4000))
            found = (entry.stat().st_size for entry in os.scandir(tmp_path) if not entry.name.startswith("."))
            try:
                seen.append(sum(found))
            except FileNotFoundError:  # removed by another while it was counted
                continue

    writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    assert 20_000 < max(seen) <= 50_000


def test_a_cache_that_cannot_be_written_says_what_to_do(store: HttpStore, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    reader = FileReader(BlockCache(str(tmp_path / "file"), 1 << 20))
    with pytest.raises(DataError, match=r"data\.cache_dir"):
        reader.read(f"{store.url}/shard-000000.tar", 0, 100)
