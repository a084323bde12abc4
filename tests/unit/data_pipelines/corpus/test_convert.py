"""Public forms to canonical shards and back: the same texts, the same image bytes, the same turns."""

import gzip
import io
import json

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_pipelines.corpus.samples import ReadSamples
from data_pipelines.frame.config import load_pipeline
from data_pipelines.frame.runner import run_pipeline
from m4train.config import DataConfig, SourceConfig
from m4train.data.shards import ShardWriter
from m4train.data.source import open_sources
from m4train.errors import ConfigError
from tests.helpers.data import FakeProcessor
from tests.helpers.pipelines import picture

QA = [{"user": "What is it?", "assistant": "A square.", "source": "vqa"}, {"user": "Sure?", "assistant": "Yes."}]


def _parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _cauldron(folder):
    _parquet(
        folder / "a.parquet", [{"images": [{"bytes": picture(n), "path": "a.png"}], "texts": QA} for n in range(5)]
    )
    return "*.parquet", "parquet"


def _finevision(folder):
    rated = {"relevance_ratings": [5, 4], "relevance_min": 4, "source": "fine"}
    _parquet(
        folder / "a.parquet",
        [{"images": [{"bytes": picture(n), "path": None}], "texts": QA, **rated} for n in range(5)],
    )
    return "*.parquet", "parquet"


def _docmatix(folder):
    _parquet(folder / "a.parquet", [{"images": [{"bytes": picture(n), "path": "0"}, {"bytes": picture(n + 9), "path": "1"}], "texts": QA} for n in range(5)])  # fmt: skip
    return "*.parquet", "parquet"


def _obelics(folder):
    about = {"url": "http://a.org", "warc_filename": "w.gz", "warc_record_offset": 5, "warc_record_length": 9}
    texts = json.dumps([{"src": "s"}, None])
    _parquet(folder / "a.parquet", [{"images": [picture(n), None], "texts": [None, f"Text {n}."], "metadata": texts, "general_metadata": json.dumps(about)} for n in range(5)])  # fmt: skip
    return "*.parquet", "parquet"


def _llava(folder):
    (folder / "images").mkdir()
    records = []
    for n in range(5):
        (folder / "images" / f"{n}.png").write_bytes(picture(n))
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A square."}]
        records.append({"id": str(n), "image": f"images/{n}.png", "conversations": turns})
    (folder / "a.json").write_text(json.dumps(records))
    return "a.json", "json"


def _messages(folder):
    records = []
    for n in range(5):
        (folder / f"{n}.png").write_bytes(picture(n))
        content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
        answer = {"role": "assistant", "content": [{"type": "text", "text": "A square."}]}
        records.append({"messages": [{"role": "user", "content": content}, answer], "images": [f"{n}.png"]})
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    return "a.jsonl", "json"


FORMS = {"cauldron": _cauldron, "finevision": _finevision, "docmatix": _docmatix, "obelics": _obelics, "llava": _llava, "messages": _messages}  # fmt: skip


def _content(path, form):
    """What training reads of a dataset: texts, turns and image bytes of each sample."""
    (source,) = open_sources({"a": SourceConfig(path=str(path), format=form)}, DataConfig(), FakeProcessor())
    assert not source.index.bad_count, source.index.shards[0].bad
    found = []
    for number in range(len(source)):
        sample = source.read(number)
        shown = lambda items: [item.get("text", "<image>") for item in items]
        turns = [(message["role"], shown(message["content"])) for message in sample.messages or ()]
        found.append((turns or shown(sample.items), source.stored_images(number), sample.source.get("url")))
    return found


def _run(name, *overrides):
    assert run_pipeline(load_pipeline(name, list(overrides))) == 0


@pytest.mark.parametrize("form", FORMS)
def test_public_forms_become_shards_and_parquet_and_json_and_shards_again(tmp_path, form):
    (tmp_path / "in").mkdir()
    name, reading = FORMS[form](tmp_path / "in")
    wanted = _content(tmp_path / "in" / name, reading)
    _run("convert", f"path={tmp_path / 'in' / name}", f"format={reading}", f"folder={tmp_path / 'shards'}")
    shards = tmp_path / "shards" / "write" / "shards"
    assert _content(shards, "canonical") == wanted
    assert json.loads((shards.parent / "dataset.json").read_text())["counts"]["train"]["samples"] == 5

    table = "obelics" if form == "obelics" else "messages"
    for kind, suffix, reading in ((table, "parquet", "parquet"), ("json", "jsonl", "json")):
        out = tmp_path / kind
        _run("export", f"path={shards}", "format=canonical", f"folder={out}", f"export.form={kind}")
        exported = out / "export" / "exported" / f"00000.{suffix}"
        assert [each[:2] for each in _content(exported, reading)] == [each[:2] for each in wanted]
        again = tmp_path / f"{kind}-again"
        _run("convert", f"path={exported}", f"format={reading}", f"folder={again}")
        assert [e[:2] for e in _content(again / "write" / "shards", "canonical")] == [e[:2] for e in wanted]


def test_only_documents_of_the_form_are_exported_and_the_others_are_counted(tmp_path):
    with ShardWriter(tmp_path / "in") as writer:
        writer.write("a", {"items": [{"text": "A document."}]})
        writer.write(
            "b",
            {
                "messages": [
                    {"role": "user", "content": [{"text": "q"}]},
                    {"role": "assistant", "content": [{"text": "a"}]},
                ]
            },
        )
    for form, left in (("obelics", 1), ("messages", 1), ("json", 2)):
        _run(
            "export", f"path={tmp_path / 'in'}", f"folder={tmp_path / form}", f"export.form={form}", "format=canonical"
        )
        statistics = json.loads((tmp_path / form / "export" / "statistics.json").read_text())
        assert statistics[1]["after"].get("documents", 0) == left
        assert statistics[1]["counts"] == ({"other form": 1} if left == 1 else {})


# Datasets that name images by URL ---------------------------------------------------------------------------------------


def _nodes(path, form):
    step = ReadSamples(str(path), form)
    documents = list(step.run(None))
    return (
        [[node.get("text") or node["url"] for node in document.metadata["nodes"]] for document in documents],
        documents,
        step,
    )


def test_obelics_as_published(tmp_path):
    page = {"url": "http://a.org", "warc_filename": "w.gz", "warc_record_offset": 5, "warc_record_length": 9}
    about = [
        {"alt_text": "An apple", "rendered_width": 300, "document_url": "http://a.org", "original_width": 600},
        None,
    ]
    row = {
        "images": ["http://i/1.jpg", None],
        "texts": [None, "Text."],
        "metadata": json.dumps(about),
        "general_metadata": json.dumps(page),
    }
    bad = [row | {"images": ["http://i/1.jpg"]}, row | {"texts": ["both", "Text."]}, row | {"metadata": "{"}]
    _parquet(tmp_path / "a.parquet", [row, *bad])
    nodes, (document,), step = _nodes(tmp_path / "a.parquet", "obelics_urls")
    assert nodes == [["http://i/1.jpg", "Text."]]
    assert document.metadata["nodes"][0] == {
        "type": "image",
        "url": "http://i/1.jpg",
        "alt": "An apple",
        "rendered_width": 300,
    }
    assert document.metadata["source"]["warc"] == {"file": "w.gz", "offset": 5, "length": 9}
    assert step.ledger.counts == {"unreadable bad_json": 3}


def test_mmc4_as_published(tmp_path):
    infos = [
        {"raw_url": "http://i/2.jpg", "matched_text_index": 2},
        {"raw_url": "http://i/0.jpg", "matched_text_index": 0},
    ]
    record = {"text_list": ["One.", "Two.", "Three."], "url": "http://a.org", "image_info": infos}
    wrong = record | {"image_info": [{"raw_url": "http://i", "matched_text_index": 9}]}
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n".join([json.dumps(record), json.dumps(wrong), "{", json.dumps([])]))
    nodes, _, step = _nodes(tmp_path / "a.jsonl.gz", "mmc4_urls")
    assert nodes == [["http://i/0.jpg", "One. Two.", "http://i/2.jpg", "Three."]]
    assert step.ledger.counts == {"unreadable bad_json": 3}


@pytest.mark.parametrize(("url", "text"), [("URL", "TEXT"), ("url", "caption")])
def test_pairs_as_published(tmp_path, url, text):
    _parquet(
        tmp_path / "a.parquet",
        [{url: "http://i/1.jpg", text: "An apple", "WIDTH": 3}, {url: "http://i/2.jpg", text: None}],
    )
    nodes, _, step = _nodes(tmp_path / "a.parquet", "pairs_urls")
    assert nodes == [["http://i/1.jpg", "An apple"]]
    assert step.ledger.counts == {"unreadable no_text": 1}


def test_ranks_share_the_files(tmp_path):
    for n in range(5):
        _parquet(tmp_path / f"{n}.parquet", [{"url": f"http://i/{n}.jpg", "caption": "c"}])
    step = lambda: ReadSamples(str(tmp_path / "*.parquet"), "pairs_urls")
    urls = [document.metadata["url"] for rank in range(3) for document in step().run(None, rank, 3)]
    assert sorted(urls) == [f"http://i/{n}.jpg" for n in range(5)]
    assert len(step().inputs()) == 5
    with pytest.raises(ConfigError, match="means nothing for format pairs_urls"):
        ReadSamples(str(tmp_path / "*.parquet"), "pairs_urls", {"fields": {}})


def test_pictures_are_kept_as_they_are_stored(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 7), "teal").save(buffer, "JPEG", quality=11)
    _parquet(tmp_path / "a.parquet", [{"images": [{"bytes": buffer.getvalue(), "path": None}], "texts": QA}])
    _run("convert", f"path={tmp_path}/a.parquet", f"folder={tmp_path / 'out'}")
    assert _content(tmp_path / "out" / "write" / "shards", "canonical")[0][1] == [buffer.getvalue()]
