"""Shards of documents: what training reads of them, what is said about them, and that they are always the same bytes."""

import json

import pytest

from data_pipelines.corpus.write import WriteShards, split_of
from data_pipelines.frame.step import Place
from m4train.config import DataConfig, SourceConfig
from m4train.data.source import build_sources
from m4train.errors import ConfigError, DataError
from tests.helpers.corpus import json_lines, page, run_stages
from tests.helpers.data import FakeProcessor
from tests.helpers.pipelines import digests, picture

STAGES = {
    "write": {"steps": {"write": {"validation": 0.3, "max_samples": 4, "license": "CC BY 4.0"}}, "keep": False},
    "seal": {"steps": {"seal": {}}, "tasks": 1, "keep": False, "reads": None},
}
WARC = {"file": "a.warc.gz", "offset": 7, "length": 90}
PAGES = [
    [n, [f"Page {n}.", f"png:{n}", "Middle.", f"png:{n}", "More.", "End."], None, {"warc": WARC, "date": "2026-01-02"}]
    for n in range(40)
]


def test_training_reads_the_shards_and_their_index_and_the_manifest_counts_them(tmp_path, monkeypatch):
    assert run_stages(tmp_path, PAGES, STAGES) == 0
    folder = tmp_path / "out" / "write"
    dataset = json.loads((folder / "dataset.json").read_text())
    splits = {split: counts["samples"] for split, counts in dataset["counts"].items()}
    assert sum(splits.values()) == 40
    assert splits["validation"] == sum(split_of(page(n, ["x"]), 0.3) == "validation" for n in range(40))
    assert dataset["licenses"] == {"CC BY 4.0": 40}
    assert dataset["configuration"]["steps"]["write"]["max_samples"] == 4
    assert dataset["code"]
    lines = [line for path in sorted((folder / "provenance").iterdir()) for line in json_lines(path)]
    assert {line["url"] for line in lines} == {f"http://site.org/{n}" for n in range(40)}
    assert all(line["warc"] == WARC and line["license"] == "CC BY 4.0" for line in lines)

    before = {path: path.read_bytes() for path in (folder / "shards").glob("*.index")}
    sources = build_sources(
        {"web": SourceConfig(path=str(folder / "shards" / "*.tar"), format="canonical")}, DataConfig(), FakeProcessor()
    )
    assert {path: path.read_bytes() for path in (folder / "shards").glob("*.index")} == before  # used as it is
    (source,) = sources
    assert len(source) == 40
    assert not source.index.bad_count
    assert not source.index.unread
    read = {source.read(n).source["url"]: n for n in range(40)}
    sample = source.read(read["http://site.org/7"])
    kinds = ["image" if "image" in item else item["text"] for item in sample.items]
    assert kinds == ["Page 7.", "image", "Middle.", "image", "More.\n\nEnd."]
    assert set(source.stored_images(read["http://site.org/7"])) == {picture(7)}


def test_rebuilding_gives_the_same_bytes_also_after_ranks_failed(tmp_path):
    assert run_stages(tmp_path / "a", PAGES, STAGES) == 0
    assert run_stages(tmp_path / "b", PAGES, STAGES, "executor.workers=2") == 0
    first = digests(tmp_path / "a" / "out" / "write", "shards/*.tar")
    assert len(first) >= 8
    assert digests(tmp_path / "b" / "out" / "write", "shards/*.tar") == first
    for part in ("shards/train-00001-000000.tar", "ranks/completions/00001", "written/00001.json"):
        (tmp_path / "b" / "out" / "write" / part).unlink()  # as an attempt leaves it that is killed in rank 1
    (tmp_path / "b" / "out" / "write" / "shards" / "train-00001-000099.tar").write_bytes(b"stale")
    (tmp_path / "b" / "out" / "write" / "shards" / ".train-00001-000000.tar.77.tmp").write_bytes(b"cut")
    assert run_stages(tmp_path / "b", PAGES, STAGES) == 0
    assert digests(tmp_path / "b" / "out" / "write", "shards/*.tar") == first


def _written(tmp_path, document, **options):
    step = WriteShards(validation=0, **options)
    step.place = Place(tmp_path, "write")
    out = list(step.run([document]))
    return step, out


def test_images_without_bytes_or_that_are_not_images_are_counted_and_left_out(tmp_path):
    broken = page(1, ["Text", "http://img/absent.png", picture(3)[:40], picture(2)])
    step, out = _written(tmp_path, broken)
    assert len(out) == 1
    assert step.ledger.counts == {"image_missing": 1, "image_unreadable": 1}
    assert json.loads((tmp_path / "write" / "written" / "00000.json").read_text())["counts"]["train"]["images"] == 1


@pytest.mark.parametrize(("nodes", "reason"), [(["Text", "http://img/absent.png"], "image_missing"), ([], "empty")])
def test_a_document_can_be_dropped_or_refused_for_it(tmp_path, nodes, reason):
    step, out = _written(tmp_path, page(1, nodes), missing="drop_document")
    assert not out
    assert step.ledger.counts == {reason: 1}
    with pytest.raises(DataError, match=r"page-00001 .*http://site.org/1.*write.missing"):
        _written(tmp_path, page(1, nodes), missing="error")


def test_texts_about_pictures_are_read_as_text_without_a_setting(tmp_path):
    texts = ["Write <img src=a.png> or ![a](b.png).", "photo.png", "The <image> tag."]
    pages = [[n, [text], None, {}] for n, text in enumerate(texts)]
    write = {"write": {"steps": {"write": {"validation": 0.0}}, "keep": False}}
    assert run_stages(tmp_path, pages, write) == 0
    (source,) = build_sources(
        {"web": SourceConfig(path=str(tmp_path / "out" / "write" / "shards"))}, DataConfig(), FakeProcessor()
    )
    assert not source.index.bad_count
    assert {source.read(n).items[0]["text"] for n in range(len(source))} == set(texts)


def test_a_conversation_is_whole_or_dropped(tmp_path):
    chat = page(1, [picture(1), "What is it?", "A square."])
    chat.metadata["messages"] = [{"role": "user", "nodes": 2}, {"role": "assistant", "nodes": 1}]
    step, out = _written(tmp_path, chat)
    assert len(out) == 1
    cut = page(2, ["What is it?"])
    cut.metadata["messages"] = chat.metadata["messages"]
    step, out = _written(tmp_path, cut)
    assert not out
    assert step.ledger.counts == {"conversation_cut": 1}


def test_two_documents_of_one_key_are_both_written(tmp_path):
    step = WriteShards(validation=0)
    step.place = Place(tmp_path, "write")
    assert len(list(step.run([page(1, ["a"]), page(1, ["b"])]))) == 2
    assert step.ledger.counts == {"same_key": 1}


def test_a_damaged_shard_is_not_sealed(tmp_path, capsys):
    assert run_stages(tmp_path, PAGES, {"write": STAGES["write"]}) == 0
    shard = next((tmp_path / "out" / "write" / "shards").glob("*.tar"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run_stages(tmp_path, PAGES, STAGES) == 1
    assert "is not what was written" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("options", [{"validation": 1.0}, {"license": ""}])
def test_what_cannot_be_is_refused(options):
    with pytest.raises(ConfigError, match="write\\."):
        WriteShards(**options)
