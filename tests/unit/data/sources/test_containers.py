"""What lies in a container besides samples: nothing at all, and the files that desktops leave."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from m4train.config import SourceConfig
from m4train.data.loading.shard_stream import ShardStream
from m4train.data.plan.plan import Plan
from m4train.data.source import build_sources, source_stats
from m4train.data.sources.tar import CanonicalTar
from m4train.data.sources.tarfiles import is_junk
from m4train.errors import ConfigError
from tests.helpers.data import FakeProcessor, data_config, documents, write_shards

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def parquet(path: Path, rows: list[dict], groups: bool = True) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"messages": TURNS}])
    with parquet.ParquetWriter(path, table.schema) as writer:
        if groups:
            writer.write_table(pyarrow.Table.from_pylist(rows, table.schema))


EMPTY = {
    "tar of zeros": ("tar", "canonical", lambda path: path.write_bytes(bytes(10240))),
    "tar with no more than its end": ("tar", "canonical", lambda path: path.write_bytes(bytes(1024))),
    "tar of junk": ("tar", "canonical", lambda path: tar(path, [("._a.json", b"x"), ("Thumbs.db", b"y")])),
    "empty jsonl": ("jsonl", "json", lambda path: path.write_bytes(b"")),
    "jsonl of blank lines": ("jsonl", "json", lambda path: path.write_bytes(b"\n \r\n\n")),
    "jsonl of a byte order mark": ("jsonl", "json", lambda path: path.write_bytes(b"\xef\xbb\xbf")),
    "empty array": ("jsonl", "json", lambda path: path.write_bytes(b"[]")),
    "empty array in lines": ("jsonl", "json", lambda path: path.write_bytes(b" [\n]\n")),
    "parquet without rows": ("parquet", "parquet", lambda path: parquet(path, [])),
    "parquet without row groups": ("parquet", "parquet", lambda path: parquet(path, [], groups=False)),
}


def tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", EMPTY)
def test_empty_shards_are_passed_over_with_one_line(tmp_path: Path, caplog, kind: str, shuffle: bool) -> None:
    suffix, form, write = EMPTY[kind]
    for place in (0, 2, 3):
        write(tmp_path / f"{place}.{suffix}")
    good = tmp_path / f"1.{suffix}"
    if form == "canonical":
        write_shards(tmp_path, documents(3), prefix="1")
    elif form == "json":
        good.write_text(json.dumps([{"messages": TURNS}] * 3))
    else:
        parquet(good, [{"messages": TURNS}] * 3)
    data = data_config(shuffle=shuffle)
    [built] = build_sources({"s": SourceConfig(path=str(tmp_path / f"*.{suffix}"), format=form)}, data, FakeProcessor())
    assert len(built) == 3
    assert not built.index.bad_count
    assert [record.getMessage().split()[0] for record in caplog.records if "no sample" in record.getMessage()] == [
        str(tmp_path / f"{place}.{suffix}") for place in (0, 2, 3)
    ]
    seen = [unit.sample for step, _ in zip(Plan([built], data, 0, 1).steps(), range(9)) for unit in step.packs[0].units]
    assert set(seen) == {0, 1, 2}
    assert built.read(0)
    assert source_stats(built)["samples"] == 3


@pytest.mark.parametrize("kind", EMPTY)
def test_a_source_of_nothing_but_empty_shards_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    suffix, form, write = EMPTY[kind]
    write(tmp_path / f"0.{suffix}")
    with pytest.raises(ConfigError, match=r"'s' \(.*0\..*holds no usable sample of 0"):
        build_sources(
            {"s": SourceConfig(path=str(tmp_path / f"0.{suffix}"), format=form)}, data_config(), FakeProcessor()
        )


JUNK = [
    "._{key}.json", "sub/._{key}.json", ".DS_Store", "sub/.DS_Store", "Thumbs.db", "sub/thumbs.DB", "desktop.ini",
    "__MACOSX/{key}.json", "__MACOSX/sub/._{key}.0.png", "a/__MACOSX/b/{key}.json", ".ipynb_checkpoints/{key}.json",
]  # fmt: skip


@pytest.mark.parametrize("junk", JUNK)
def test_files_that_desktops_leave_cost_no_sample(tmp_path: Path, junk: str) -> None:
    members = []
    for key, content, images in documents(4):
        name = junk.format(key=key)
        if "{key}" in junk or not members:
            members.append((name, b"\0\5\26\7\0\2\0\0Mac OS X"))
        members += [(f"{key}.{suffix}", data) for suffix, data in images.items()]
        members.append((f"{key}.json", json.dumps(content).encode()))
        members.append((name.replace("json", "0.png"), b"junk"))
    path = tmp_path / "a.tar"
    tar(path, members)
    [built] = build_sources({"s": SourceConfig(path=str(path))}, data_config(), FakeProcessor())
    assert [built.key(number) for number in range(len(built))] == [key for key, _, _ in documents(4)]
    assert not built.index.bad_count
    stream = ShardStream("s", [str(path)], CanonicalTar(), "seed", shuffle=False)
    assert [streamed.key for streamed, _ in zip(stream, range(4))] == [key for key, _, _ in documents(4)]
    assert not stream.bad


@pytest.mark.parametrize("name", ["a.json", "sub/a.0.png", "_.json", "MACOSX/a.json", "thumbs.json", "DS_Store.txt"])
def test_other_files_are_no_junk(name: str) -> None:
    assert not is_junk(name)
