"""The step `warc`: which records become documents, what is counted and named, and how ranks share the work."""

import json

import pytest

from data_pipelines.web.warc import ReadWarc
from m4train.errors import ConfigError, DataError
from tests.helpers.warcs import warc_of

PAGES = [
    (
        "http://example.org/ä",
        "<p>Grüße</p>".encode("latin-1"),
        ("Content-Type", "text/html; charset=latin1"),
        ("X-Robots-Tag", "noai"),
    ),
    ("http://example.org/image", b"\x89PNG", ("Content-Type", "image/png")),
    ("http://example.org/empty", b"  "),
    ("http://example.org/typeless", b"<!DOCTYPE html><p>type", ("Content-Type", "")),
    ("http://example.org/last", b"<p>last"),
]


@pytest.fixture
def crawl(tmp_path):
    for number in range(3):
        (tmp_path / f"part-{number}.warc.gz").write_bytes(warc_of(PAGES))
    return tmp_path


def test_pages_become_documents_with_where_they_are_from(crawl):
    step = ReadWarc([str(crawl / "part-0.*")], licence="CC0")
    documents = list(step.run(None))
    assert [document.text for document in documents] == ["<p>Grüße</p>", "<!DOCTYPE html><p>type", "<p>last"]
    first = documents[0]
    assert first.metadata["url"] == "http://example.org/ä"
    assert first.metadata["headers"] == {"x-robots-tag": "noai"}
    assert first.metadata["charset"] == "cp1252"
    source = first.metadata["source"]
    assert source["warc_filename"] == "part-0.warc.gz"
    assert (source["date"], source["licence"]) == ("2026-01-02T03:04:05Z", "CC0")
    assert step.ledger.counts == {"not_html": 1, "empty": 1}
    assert step.ledger.after["documents"] == 3


def test_ranks_share_the_files_and_pointers_give_the_same_documents(crawl):
    def documents_of(world, **options):
        return [d for rank in range(world) for d in ReadWarc(**options).run(None, rank, world)]

    pattern = [str(crawl / "*.warc.gz")]
    whole = documents_of(1, paths=pattern)
    assert sorted(d.id for d in documents_of(2, paths=pattern)) == sorted(d.id for d in whole)
    assert len({d.id for d in whole}) == 9
    pointers = crawl / "pointers.jsonl"
    pointers.write_text("".join(json.dumps(d.metadata["source"]) + "\n" for d in reversed(whole)))
    for world in (1, 4):
        assert documents_of(world, pointers=str(pointers), root=str(crawl)) == whole


def test_pointers_in_parquet(crawl):
    import pyarrow
    import pyarrow.parquet

    whole = list(ReadWarc([str(crawl / "part-1.warc.gz")]).run(None))
    table = pyarrow.Table.from_pylist([d.metadata["source"] for d in whole])
    pyarrow.parquet.write_table(table, crawl / "pointers.parquet")
    assert list(ReadWarc(pointers=str(crawl / "pointers.parquet"), root=str(crawl)).run(None)) == whole


def test_damage_is_counted_and_named(crawl):
    path = crawl / "part-0.warc.gz"
    path.write_bytes(path.read_bytes()[:-40])
    step = ReadWarc([str(path)])
    assert len(list(step.run(None))) == 2
    assert step.ledger.counts["truncated"] == 1
    [named] = step.ledger.examples["truncated"]
    assert named["url"] == "http://example.org/last"
    assert f"{path} at byte " in named["id"]


def test_a_store_of_objects_is_read_as_files_are(crawl):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/crawl/part-0.warc.gz", (crawl / "part-0.warc.gz").read_bytes())
    local = [d.text for d in ReadWarc([str(crawl / "part-0.warc.gz")]).run(None)]
    step = ReadWarc(["memory://crawl/*.warc.gz"])
    assert step.inputs() == [("memory:///crawl/part-0.warc.gz", (crawl / "part-0.warc.gz").stat().st_size)]
    assert [d.text for d in step.run(None)] == local


def test_what_cannot_be_is_refused(crawl):
    with pytest.raises(ConfigError, match="either paths or pointers"):
        ReadWarc()
    with pytest.raises(ConfigError, match="matches no file"):
        ReadWarc([str(crawl / "none-*")]).inputs()
    (crawl / "bad.jsonl").write_text('{"warc_filename": "part-0.warc.gz", "warc_record_offset": 3}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl, row 1: KeyError"):
        list(ReadWarc(pointers=str(crawl / "bad.jsonl")).run(None))
