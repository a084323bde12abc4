import json
from pathlib import Path

import pytest
import webdataset

from m4train.data.shards import ShardWriter, expand_shards
from m4train.errors import DataError
from tests.helpers.data import documents, write_shards


def test_same_samples_give_the_same_bytes_and_names(tmp_path: Path) -> None:
    first = write_shards(tmp_path / "a", documents(7), max_samples=3)
    second = write_shards(tmp_path / "b", documents(7), max_samples=3)
    assert [path.name for path in first] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [path.name for path in first]


def test_plain_webdataset_reads_the_same_content(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, documents(5))
    read = list(webdataset.WebDataset(str(paths[0]), shardshuffle=False))
    written = list(documents(5))
    assert [sample["__key__"] for sample in read] == [key for key, _, _ in written]
    for sample, (_, content, images) in zip(read, written):
        assert without_checksums(json.loads(sample["json"])) == content
        assert {name: sample[name] for name in images} == images


def without_checksums(content: dict) -> dict:
    del content["checksum"]
    for item in content["items"]:
        item.pop("crc32", None)
    return content


def test_size_cap_closes_shards(tmp_path: Path) -> None:
    paths = write_shards(tmp_path, documents(10), max_bytes=8000)
    assert len(paths) > 2
    assert all(path.stat().st_size <= 8000 + 10240 for path in paths)


@pytest.mark.parametrize(
    ("key", "sample", "images", "said"),
    [
        ("a.b", {"items": [{"text": "x"}]}, {}, "without dots"),
        ("", {"items": [{"text": "x"}]}, {}, "non-empty"),
        ("a", {"items": []}, {}, "not be readable"),
        ("a", {"items": [{"image": "0.png"}]}, {}, "names images"),
        ("a", {"items": [{"text": "x"}]}, {"0.png": b""}, "names images"),
        ("a", {"items": [{"image": "json"}]}, {"json": b""}, "NUMBER.FORMAT"),
    ],
)
def test_what_could_not_be_read_back_is_refused(
    tmp_path: Path, key: str, sample: dict, images: dict, said: str
) -> None:
    with ShardWriter(tmp_path) as writer, pytest.raises(DataError, match=said):
        writer.write(key, sample, images)


def test_repeated_key_is_refused_and_an_exception_leaves_no_half_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="already written"):
        write_shards(tmp_path, [("a", {"items": [{"text": "x"}]}, {})] * 2)
    assert list(tmp_path.iterdir()) == []


def test_patterns(tmp_path: Path) -> None:
    paths = [str(path) for path in write_shards(tmp_path, documents(3), max_samples=1)]
    assert expand_shards(str(tmp_path / "*.tar")) == paths
    Path(paths[0] + ".index").write_text("")
    assert expand_shards(str(tmp_path / "*")) == paths
    assert expand_shards(str(tmp_path / "shard-{000000..000002}.tar")) == paths
    with pytest.raises(DataError, match="000003"):
        expand_shards(str(tmp_path / "shard-{000000..000003}.tar"))
    with pytest.raises(DataError, match="twice"):
        expand_shards(str(tmp_path / "{shard-*,shard-000001}.tar").replace("shard-000001}.tar", "shard-000001}.tar"))
