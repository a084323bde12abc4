import io
import json
import tarfile
from pathlib import Path

import pytest

from m4train import cli
from m4train.config import SourceConfig
from m4train.data.convert import convert
from m4train.data.source import Source, build_sources
from m4train.errors import ConfigError, DataError
from tests.helpers.data import (
    FakeProcessor,
    conversations,
    data_config,
    document,
    documents,
    page_picture,
    png,
    write_shards,
)


@pytest.fixture
def pages(tmp_path: Path) -> Source:
    """20 documents in shards of the same name in two folders, one of them unreadable."""
    key, content, images = document(50)
    lost = (key, content, images | {"0.png": b"no picture"})
    write_shards(tmp_path / "a", [*documents(9), lost])
    write_shards(tmp_path / "b", documents(10))
    return opened(str(tmp_path / "{a,b}" / "*.tar"))


def opened(path: str) -> Source:
    [source] = build_sources({"pages": SourceConfig(path=path)}, data_config(), FakeProcessor())
    return source


def contents(source: Source) -> dict[str, tuple]:
    return {source.key(n): (source.read(n).items, source.stored_images(n)) for n in range(len(source))}


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_texts_that_are_shaped_like_pictures_stay_text_without_a_setting(tmp_path: Path) -> None:
    texts = ["An <image> of ![a](b.png), and <img src=c.png>.", "plain"]
    samples = [
        (f"k{n}", {"items": [{"image": "0.png"}, {"text": text}]}, {"0.png": png(page_picture("0"))})
        for n, text in enumerate(texts)
    ]
    write_shards(tmp_path / "a", samples)
    config = SourceConfig(path=str(tmp_path / "a"), placeholder="literal")
    [source] = build_sources({"pages": config}, data_config(), FakeProcessor())
    assert convert(source, tmp_path / "out") == {"written": 2}
    after = opened(str(tmp_path / "out" / "*.tar"))
    assert not after.index.bad_count
    assert [after.read(n).items[1]["text"] for n in range(2)] == texts
    [path] = (tmp_path / "out").glob("*.tar")
    with tarfile.open(path) as tar:
        marks = [
            json.load(tar.extractfile(name)).get("placeholder") for name in tar.getnames() if name.endswith(".json")
        ]
    assert marks == ["literal", None]


def test_another_mark_than_literal_makes_a_sample_a_bad_one(tmp_path: Path) -> None:
    write_shards(tmp_path, [("k", {"items": [{"text": "a"}], "placeholder": "<x>"}, {})])
    with pytest.raises(ConfigError, match="'placeholder' is '<x>', but in a canonical sample can only be 'literal'"):
        opened(str(tmp_path))


def test_samples_and_their_image_bytes_are_the_same(pages: Source, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    counts = convert(pages, tmp_path / "out", max_samples=6, progress=lambda *counts: seen.append(counts))
    assert counts == {"written": 19, "unreadable_image": 1}
    assert seen == [(6, 20), (12, 20), (18, 20), (20, 20)]
    after = contents(opened(str(tmp_path / "out" / "*.tar")))
    assert len(after) == 19
    for number, (_, content, images) in enumerate(documents(10)):
        items, found = after[f"00001-shard-000000-doc{number:05d}"]
        assert found == list(images.values())
        assert [item.get("text") for item in items] == [item.get("text") for item in content["items"]]
    [entry] = map(json.loads, (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines())
    assert (entry["key"], entry["reason"]) == ("doc00050", "unreadable_image")


def test_an_interrupted_conversion_goes_on_where_it_stopped(pages: Source, tmp_path: Path, monkeypatch) -> None:
    convert(pages, tmp_path / "whole", max_samples=6)

    def stop(done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(pages, tmp_path / "out", max_samples=6, progress=stop)
    assert len(stored(tmp_path / "out")) == 2
    (tmp_path / "out" / ".pages-00002-000000.tar.1.tmp").write_text("half")
    reads = pages.files.reads
    counts = convert(pages, tmp_path / "out", max_samples=6)
    assert counts == {"written": 19, "unreadable_image": 1}
    assert pages.files.reads - reads < 8 * 2 + 1  # the samples of the first two chunks are not read again
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")
    assert not list((tmp_path / "out").glob(".*.tmp"))
    with pytest.raises(DataError, match="holds a conversion of another 'pages'"):
        convert(pages, tmp_path / "out", max_samples=7)


def test_keys_that_become_alike_are_told_apart_by_the_number_of_the_sample(tmp_path: Path) -> None:
    texts = {f"{key}.txt": f"Card {key}." for key in ("a/b", "a_b", "a_b-1", "c")}
    members = {name.replace("txt", "png"): png(page_picture(name)) for name in texts} | texts
    with tarfile.open(tmp_path / "p.tar", "w") as tar:
        for name in sorted(members):
            data = members[name] if isinstance(members[name], bytes) else members[name].encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pairs = SourceConfig(path=str(tmp_path / "p.tar"), format="pairs")
    [before] = build_sources({"pages": pairs}, data_config(), FakeProcessor())
    assert convert(before, tmp_path / "out") == {"written": 4}
    after = opened(str(tmp_path / "out" / "*.tar"))
    assert len({after.key(number) for number in range(4)}) == 4
    said = {after.read(number).items[1]["text"]: after.key(number) for number in range(4)}
    assert said["Card c."] == "p-c"
    assert sorted(said) == sorted(texts.values())


def test_references_scores_and_origin_are_kept(tmp_path: Path) -> None:
    _, content, images = next(conversations(1))
    extra = {"references": ["0", "zero"], "scores": {"clip": 0.5}}
    write_shards(tmp_path / "a", [("chat", content | extra, images)])
    convert(opened(str(tmp_path / "a" / "*.tar")), tmp_path / "out")
    sample = opened(str(tmp_path / "out" / "*.tar")).read(0)
    assert sample.references == ("0", "zero")
    assert sample.scores == {"clip": 0.5}
    assert sample.source == content["source"]


@pytest.mark.slow
def test_several_processes_write_the_same_shards(pages: Source, tmp_path: Path) -> None:
    convert(pages, tmp_path / "one", max_samples=6)
    convert(pages, tmp_path / "two", max_samples=6, workers=2)
    assert stored(tmp_path / "one") == stored(tmp_path / "two")


def test_the_command_needs_a_folder(capsys) -> None:
    assert cli.main(["data", "convert", "experiment=digits_pretrain"]) == 2
    assert "Missing option '--out'" in capsys.readouterr().err
