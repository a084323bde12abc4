"""What a folder stands for: nothing in it that may hold samples is passed over, or trained as something else, without a word."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.shards import expand_shards
from m4train.data.source import build_sources
from m4train.errors import ConfigError, DataError
from tests.helpers.data import FakeProcessor, data_config, png
from tests.unit.data.sources.test_forms import bad, check, opened, pictures, said
from tests.unit.data.sources.test_unread import _tar, _written

FETCHED = {
    "url": "http://a/0.jpg",
    "caption": "other",
    "key": "0",
    "status": "success",
    "error_message": None,
    "sha256": "0",
}
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A digit."}]
TEXTS = ["Digit 0", "Digit 1", "Digit 2"]


def written(folder: Path, names: dict[str, Any]) -> None:
    for name, content in names.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))


STRAYS: dict[str, Any] = {
    "dataset_info.json": {"features": {"image": "Image"}, "citation": "x"},
    "dataset_infos.json": {"default": {"text": "about the dataset"}},
    "class_names.csv": "id,name\n0,cat\n",
    "class_names.json": ["cat", "dog"],
    "labels.tsv": "id\tname\n0\tcat\n",
    "state.json": {"text": "x"},
    "00000_stats.json": {"count": 3},
    "empty.json": "",
    "broken.json": "{",
    "classes.jsonl": '{"0": "cat"}\n',
}


@pytest.mark.parametrize("stray", STRAYS)
@pytest.mark.parametrize("form", ["auto", "picture_folder"])
def test_a_stray_file_among_pictures_changes_nothing(tmp_path: Path, stray: str, form: str, caplog: Any) -> None:
    pixels = pictures(tmp_path, 3)
    written(tmp_path, {f"{n}.txt": text for n, text in enumerate(TEXTS)} | {stray: STRAYS[stray]})
    built = opened(tmp_path, form)
    assert built.config.format == "picture_folder"
    check(built, TEXTS, pixels)
    if not stray.startswith(("dataset_info", "state", "00000")):
        assert f"these are not read: {stray}" in caplog.text


READABLE: dict[str, Any] = {
    "chat.json": [{"image": "0.png", "conversations": TURNS}],
    "captions.csv": "image,text\n0.png,A digit.\n",
    "metadata.jsonl": '{"file_name": "0.png", "text": "A digit."}\n',
}


@pytest.mark.parametrize("name", READABLE)
def test_pictures_with_texts_next_to_records_are_refused_with_both_readings(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, 2)
    written(tmp_path, {"0.txt": "Digit 0", "1.txt": "Digit 1", name: READABLE[name]})
    with pytest.raises(DataError, match=rf"folder of pictures \(2 texts .* or as the records in {name}: set format="):
        opened(tmp_path)
    assert len(opened(tmp_path, "picture_folder")) == 2
    assert said(opened(tmp_path / name).read(0))[0] in (None, "A digit.")
    for path in ("0.txt", "1.txt"):
        (tmp_path / path).unlink()
    assert len(opened(tmp_path).images(0)) == 1


RECORDS: dict[str, tuple[dict[str, Any], list[str | None]]] = {
    "caption": ({"caption": "A digit."}, [None, "A digit."]),
    "text that names it": ({"text": "A digit.", "image": "0.png"}, [None, "A digit."]),
    "question": ({"file_name": "x/0.png", "question": "What?", "answer": "A digit."}, [None, "What?", "A digit."]),
    "turns": ({"conversations": TURNS, "images": ["0.png"]}, [None, "What?", "A digit."]),
    "img2dataset": (FETCHED, [None, "other"]),
}


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize("form", ["auto", "picture_folder"])
def test_records_of_the_names_of_pictures(tmp_path: Path, name: str, form: str) -> None:
    [pixels] = pictures(tmp_path, 1)
    record, texts = RECORDS[name]
    written(tmp_path, {"0.json": record | {"topic": "t"}})
    built = opened(tmp_path, form)
    assert not bad(built)
    assert said(built.read(0)) == texts
    assert (np.asarray(built.images(0)[0]) == pixels).all()
    assert built.index.unread == {"topic": 1}


BAD: dict[str, tuple[Any, str]] = {
    "another picture": ({"caption": "x", "image": "1.png"}, "conflicting_images"),
    "a further picture": ({"caption": "x", "depth": "depth.png"}, "unread_media"),
    "nothing said": ({"height": 3}, "no_text"),
    "not an object": (["x"], "bad_json"),
    "not to be learnt": ({"caption": "x", "weight": 0}, "not_learnt"),
    "left out": ({"caption": "x", "is_correct": False}, "not_preferred"),
    "a video": ({"caption": "x", "video": "a.mp4"}, "unread_media"),
}


@pytest.mark.parametrize("name", BAD)
def test_records_of_pictures_that_cannot_be_used(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, 2)
    record, reason = BAD[name]
    written(tmp_path, {"0.json": record, "1.json": {"caption": "Digit 1"}})
    assert bad(opened(tmp_path)) == {"0": reason}


def test_a_record_without_its_picture_is_missed(tmp_path: Path) -> None:
    pictures(tmp_path, 2)
    written(tmp_path, {f"{n}.json": {"caption": f"Digit {n}"} for n in range(3)})
    assert bad(opened(tmp_path, "picture_folder")) == {"2": "missing_image"}


def test_the_files_that_img2dataset_writes(tmp_path: Path, caplog: Any) -> None:
    pixels = pictures(tmp_path / "00000", 3)
    files = {f"00000/{n}.txt": text for n, text in enumerate(TEXTS)} | {f"00000/{n}.json": FETCHED for n in range(3)}
    written(tmp_path, files | {"00000_stats.json": {"count": 3}, "00000.parquet": "not looked at"})
    built = opened(tmp_path)
    check(built, TEXTS, pixels)
    assert built.read(0).source == {"url": "http://a/0.jpg"}
    assert not built.index.unread
    written(tmp_path, {"00000/1.json": FETCHED | {"weight": 0.5}})
    assert [opened(tmp_path).read(n).weight for n in range(3)] == [1, 0.5, 1]


@pytest.mark.parametrize("path", ["", "0.json", "*.json"])
def test_records_next_to_their_pictures_are_not_trained_without_them(tmp_path: Path, path: str) -> None:
    pictures(tmp_path, 1)
    written(tmp_path, {"0.json": {"question": "What?", "answer": "A digit."}})
    if not path:
        with pytest.raises(DataError, match="set format=picture_folder"):
            opened(tmp_path, "json")
        return
    with pytest.raises(ConfigError, match=r"0\.png .*picture_folder"):
        opened(tmp_path / path, "json")


SPLITS: dict[str, tuple[str, ...]] = {
    "folders of pictures": ("train/0.txt", "test/0.txt"),
    "validation": ("train/0.txt", "validation/0.txt"),
    "by class": ("train/cats/0.txt", "val/cats/0.txt"),
    "COCO": ("train2017/0.txt", "val2017/0.txt"),
    "metadata": ("train/metadata.csv", "test/metadata.csv"),
    "records": ("train.jsonl", "test.jsonl"),
    "records in folders": ("data/train/0.jsonl", "data/dev/0.jsonl"),
    "shards": ("data/train-00000-of-00002.jsonl", "data/test-00000-of-00001.jsonl"),
    "lines": ("Train_1.csv", "Valid_1.csv"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_several_splits_are_not_trained_as_one(tmp_path: Path, name: str, caplog: Any) -> None:
    contents = {"txt": "Digit", "csv": "file_name,text\n0.png,Digit\n", "jsonl": '{"text": "Digit"}\n'}
    paths = SPLITS[name]
    written(tmp_path, {path: contents[path.rpartition(".")[2]] for path in paths})
    for path in paths:
        pictures((tmp_path / path).parent, 1) if not path.endswith("jsonl") else None
    with pytest.raises(
        DataError, match=r"several splits of a dataset \(\w+: 1 files, \w+: 1 files\).*data\.validation"
    ):
        opened(tmp_path)
    if "/" in paths[0] and not name.startswith("shards"):
        assert len(opened((tmp_path / paths[0]).parent)) == 1
    else:
        expand_shards(str((tmp_path / paths[0]).parent / f"*.{paths[0].rpartition('.')[2]}"))
        assert "several splits" in caplog.text


@pytest.mark.parametrize(
    "names", [("cats/0.txt", "dogs/0.txt"), ("trains/0.txt", "tests_of_cups/0.txt"), ("a/train/0.txt",)]
)
def test_folders_that_are_no_splits(tmp_path: Path, names: tuple[str, ...]) -> None:
    written(tmp_path, dict.fromkeys(names, "Digit"))
    for name in names:
        pictures((tmp_path / name).parent, 1)
    assert len(opened(tmp_path)) == len(names)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_pictures_that_no_line_of_the_metadata_names(tmp_path: Path, kind: str) -> None:
    pictures(tmp_path, 3)
    pictures(tmp_path / "more", 2)
    pictures(tmp_path / "described", 2)
    lines = {"csv": "file_name,text\n0.png,a\nmore/1.png,b\n", "jsonl": '{"file_name": "0.png", "text": "a"}\n'}
    lines["jsonl"] += '{"file_name": "more/1.png", "text": "b"}\n'
    own = {"csv": "file_name,text\n0.png,c\n1.png,d\n", "jsonl": '{"file_name": "0.png", "text": "c"}\n'}
    own["jsonl"] += '{"file_name": "1.png", "text": "d"}\n'
    written(tmp_path, {f"metadata.{kind}": lines[kind], f"described/metadata.{kind}": own[kind]})
    built = opened(tmp_path)
    assert bad(built) == {"1.png": "no_text", "2.png": "no_text", "more/0.png": "no_text"}
    assert len(built) - built.index.bad_count == 4


def test_a_picture_and_a_record_in_a_tar(tmp_path: Path) -> None:
    picture = png(Image.new("RGB", (9, 9)))
    members: dict[str, Any] = {}
    for key, record in {
        "a": {"image": "a.png", "conversations": TURNS},
        "b": {"question": "What?", "answer": "A digit.", "weight": 0.5},
        "c": {"image": "other.png", "caption": "x"},
        "d": {"caption": "x", "is_correct": False},
    }.items():
        members |= {f"{key}.png": picture, f"{key}.json": record}
    built = opened(_tar(tmp_path / "a.tar", members))
    assert built.config.format == "pairs"
    assert bad(built) == {"c": "conflicting_images", "d": "not_preferred"}
    assert said(built.read(0)) == [None, "What?", "A digit."]
    assert [message.get("weight", 1) for message in built.read(1).messages] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("trained", "held_out"),
    [("a.jsonl", "a.jsonl"), ("*.jsonl", "b.jsonl"), (".", "./b.jsonl"), ("a.jsonl", "link.jsonl")],
)
def test_files_that_are_both_trained_on_and_held_out_are_said(
    tmp_path: Path, trained: str, held_out: str, caplog: Any
) -> None:
    written(tmp_path, {"a.jsonl": '{"text": "x"}\n', "b.jsonl": '{"text": "y"}\n'})
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    source = lambda path: SourceConfig(path=str(tmp_path / path), format="auto")
    data = replace(data_config(), sources={"s": source(trained)}, validation={"v": source(held_out)})
    build_sources(data.validation, data, FakeProcessor())
    assert "'v' measures what is trained on: 1 of its files are also those of data.sources.s, such as " in caplog.text
    caplog.clear()
    data = replace(data, validation={"v": source("b.jsonl")}, sources={"s": source("a.jsonl")})
    build_sources(data.validation, data, FakeProcessor())
    build_sources(data.sources, data, FakeProcessor())
    gone = replace(data, sources={"s": source("gone-*.tar")})
    build_sources(gone.validation, gone, FakeProcessor())  # a model is evaluated where its training data is not
    assert "measures what" not in caplog.text


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_records_of_several_splits_are_said(tmp_path: Path, form: str, caplog: Any) -> None:
    rows = [{"text": "x", "split": split} for split in ("train", "train", "val", "Test")]
    if form == "csv":
        (tmp_path / "a.csv").write_text("text,split\n" + "".join(f"x,{row['split']}\n" for row in rows))
        path = str(tmp_path / "a.csv")
    else:
        path = _written(tmp_path, form, rows)
    said_of = "records of several splits as one: choose with where=\"split == 'train'\""
    built = opened(path, form)
    assert built.index.unread == {"(of split train)": 2, "(of split validation)": 1, "(of split test)": 1}
    assert said_of in caplog.text
    caplog.clear()
    built = opened(path, form, where="split == 'train'")
    assert (len(built) - built.index.bad_count, built.index.unread) == (2, {})
    assert not opened(path, form, ignore_fields=["split"]).index.unread
    (tmp_path / "b.jsonl").write_text('{"text": "x", "split": "train"}\n{"text": "x", "split": "a"}\n')
    assert not opened(tmp_path / "b.jsonl").index.unread
    assert said_of not in caplog.text
