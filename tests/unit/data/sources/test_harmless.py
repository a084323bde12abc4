"""What people have that is odd and means no harm is read, in every format; what cannot be read says what to do."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from m4train.config import SourceConfig
from m4train.data.source import Source, build_sources, open_sources
from m4train.errors import ConfigError, DataError
from tests.helpers.data import FakeProcessor, data_config, digit_pictures

FORMS = ["json", "parquet", "csv"]
Q, R = "Which?", "Red."


def written(folder: Path, form: str, records: list[dict[str, Any]]) -> Path:
    path = folder / f"a.{'jsonl' if form == 'json' else form}"
    if form == "json":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        with open(path, "w", newline="") as file:
            rows = csv.DictWriter(file, list(records[0]))
            rows.writeheader()
            rows.writerows(
                {n: json.dumps(v) if isinstance(v, (list, dict)) else v for n, v in record.items()}
                for record in records
            )
    return path


def picture(folder: Path, name: str = "a.png") -> np.ndarray:
    image = digit_pictures()[0][0]
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, "png")
    return np.asarray(image.convert("RGB"))


def opened(path: Path | str, **settings: Any) -> Source:
    config = SourceConfig(path=str(path), **({"format": "auto"} | settings))
    return open_sources({"s": config}, data_config(), FakeProcessor())[0]


def trained(built: Source, pixels: np.ndarray | None, number: int = 0) -> list[str | None]:
    """The items of a sample, None for its picture, which is the right one."""
    assert built.index.shards[0].bad == {}
    images = built.images(number)
    assert len(images) == (pixels is not None)
    if pixels is not None:
        assert (np.asarray(images[0]) == pixels).all()
    return [item.get("text") for item in built.read(number).all_items()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"image": "a.png", "caption": "See <image> here."}, ["See ", None, " here."]),
        ({"image": "a.png", "text": "<image>\nA cup."}, [None, "A cup."]),
        ({"image": "a.png", "captions": ["<image>A cup."]}, [None, "A cup."]),
        ({"images": ["a.png"], "texts": [{"user": f"<image>{Q}", "assistant": R}]}, [None, Q, R]),
        ({"images": ["a.png"], "question": f"{Q}<image>", "answer": R}, [Q, None, R]),
    ],
)
def test_the_place_of_the_only_picture_is_understood(tmp_path: Path, form: str, record: dict, expected: list) -> None:
    pixels = picture(tmp_path)
    assert trained(opened(written(tmp_path, form, [record])), pixels) == expected


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "name",
    ["file_name", "filename", "image_path", "image_file", "image_name", "img_path", "img", "photo", "picture", "path", "file",
     "filepath", "image_url"],
)  # fmt: skip
def test_one_table_of_names_for_the_picture(tmp_path: Path, form: str, name: str) -> None:
    pixels = picture(tmp_path)
    built = opened(written(tmp_path, form, [{name: "a.png", "question": Q, "answer": R}]))
    assert trained(built, pixels) == [None, Q, R]
    assert built.index.unread == {}


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_path_that_is_no_picture_is_none(tmp_path: Path, form: str) -> None:
    built = opened(written(tmp_path, form, [{"path": "src/main.py", "text": "import os"}]))
    assert trained(built, None) == ["import os"]
    assert built.index.unread == {"path": 1}
    picture(tmp_path, "a.png"), picture(tmp_path, "b.png")
    mixed = opened(written(tmp_path, form, [{"photo": "a.png", "img_path": "b.png", "caption": "X"}]))
    assert mixed.index.shards[0].bad[0][0] == "unread_media"


@pytest.mark.parametrize("form", FORMS)
def test_a_title_is_the_caption_of_a_picture_without_another(tmp_path: Path, form: str) -> None:
    pixels = picture(tmp_path)
    assert trained(opened(written(tmp_path, form, [{"image": "a.png", "title": "A cup"}])), pixels) == [None, "A cup"]
    built = opened(written(tmp_path, form, [{"image": "a.png", "title": "T", "caption": "A cup"}]))
    assert trained(built, pixels) == [None, "A cup"]
    assert built.index.unread == {"title": 1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["[1] a.png", "a[1].png", "{x}.png", "a, b.png", "[a.png", "a{1,2}.png", "[1]"])
def test_paths_with_brackets_and_commas(tmp_path: Path, form: str, name: str) -> None:
    folder = tmp_path / "my {a,b} [v1]"
    pixels = picture(folder, name)
    built = opened(written(folder, form, [{"image": name, "caption": "A cup."}]))
    assert trained(built, pixels) == [None, "A cup."]


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_name_is_no_picture(tmp_path: Path, form: str) -> None:
    rows = [{"images": [""], "question": Q, "answer": R}, {"images": ["", " "], "question": Q, "answer": R}]
    built = opened(written(tmp_path, form, rows))
    assert [trained(built, None, n) for n in range(2)] == [[Q, R]] * 2


@pytest.mark.parametrize(
    "cells",
    [
        ('["a.png"]', '["X", "Y"]', '[{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "Red."}]'),
        ("['a.png']", "['X', 'Y']", "[{'from': 'human', 'value': 'Which?'}, {'from': 'gpt', 'value': 'Red.'}]"),
        (" [ 'a.png' ] ", " ['X', 'Y'] ", " [{'from': 'human', 'value': 'Which?'}, {'from': 'gpt', 'value': 'Red.'}]"),
    ],
)
def test_cells_that_hold_lists(tmp_path: Path, cells: tuple[str, str, str]) -> None:
    pixels = picture(tmp_path)
    images, choices, turns = cells
    asked = opened(written(tmp_path, "csv", [{"images": images, "question": Q, "choices": choices, "answer": "Y"}]))
    assert trained(asked, pixels) == [None, f"{Q}\nA. X\nB. Y", "B. Y"]
    talked = opened(written(tmp_path, "csv", [{"images": images, "conversations": turns}]))
    assert trained(talked, pixels) == [None, Q, R]


@pytest.mark.parametrize(
    "turn", ["{'from': 'gpt', 'value': 'a', 'value': 'b'}", '{"from": "gpt", "value": "a", "value": "b"}']
)
def test_a_list_in_a_cell_with_a_key_twice_is_bad(tmp_path: Path, turn: str) -> None:
    path = written(tmp_path, "csv", [{"conversations": f"[{turn}]", "id": 1}])
    reason, detail = opened(path).index.shards[0].bad[0]
    assert reason == "bad_json"
    assert "occurs twice" in detail


@pytest.mark.parametrize(
    "text",
    [
        "Image,Question,Answer\na.png,Which?,Red.\n",
        " IMAGE , QUESTION , ANSWER \n a.png , Which? , Red. \n",
        'File Name, question, answer\n"a.png", "Which?", "Red."\n',
        "Image URL;Question;Answer\na.png;Which?;Red.\n",
    ],
)
def test_headers_in_any_case_and_spaces_around_cells(tmp_path: Path, text: str) -> None:
    pixels = picture(tmp_path)
    (tmp_path / "a.csv").write_text(text)
    assert trained(opened(tmp_path / "a.csv"), pixels) == [None, Q, R]


def test_options_name_columns_as_the_header_does(tmp_path: Path) -> None:
    pixels = picture(tmp_path)
    (tmp_path / "a.csv").write_text("image,Text,answer\na.png,Which?,Red.\n")
    assert trained(opened(tmp_path / "a.csv", fields={"question": "Text"}), pixels) == [None, Q, R]
    assert trained(opened(tmp_path / "a.csv", fields={"question": "Text"}, where="Text == 'Which?'"), pixels)[1:] == [
        Q,
        R,
    ]


@pytest.mark.parametrize("form", ["csv", "jsonl"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig"])
def test_a_file_in_wide_characters_is_bad_alone_and_says_what_to_do(tmp_path: Path, form: str, encoding: str) -> None:
    line = {"csv": f"question,answer\n{Q},{R}\n", "jsonl": json.dumps({"question": Q, "answer": R}) + "\n"}[form]
    (tmp_path / f"a.{form}").write_text(line)
    (tmp_path / f"b.{form}").write_bytes(line.encode(encoding))
    built = opened(tmp_path / f"*.{form}")
    bad = [shard.bad for shard in built.index.shards]
    if encoding == "utf-8-sig":
        assert bad == [{}, {}]
        return
    assert bad[0] == {}
    [(reason, detail)] = bad[1].values()
    assert reason == "bad_text"
    assert "save it as UTF-8" in detail
    with pytest.raises(ConfigError, match=r"save it as UTF-8"):
        build_sources(
            {"s": SourceConfig(path=str(tmp_path / f"b.{form}"), format="auto")}, data_config(), FakeProcessor()
        )


@pytest.mark.parametrize("header", ["question,answer,Größe".encode("latin-1"), b"question,answer,\0"])
def test_a_header_that_cannot_be_read_is_one_bad_sample(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(header + b"\nWhich?,Red.,1\n")
    (tmp_path / "b.csv").write_text("question,answer\nWhich?,Red.\n")
    first, second = opened(tmp_path / "*.csv").index.shards
    assert second.bad == {}
    assert first.bad[0][0] in ("bad_text", "bad_csv")
    assert "the header: " in first.bad[0][1]


@pytest.mark.parametrize("form", FORMS)
def test_what_is_left_out_by_choice_is_not_said_to_be_unusable(tmp_path: Path, form: str, caplog) -> None:
    rows = [{"question": Q, "answer": R, "topic": topic} for topic in "aab"]
    opened(written(tmp_path, form, rows), where="topic == 'a'")
    assert "of 3 samples are left out by choice: 1 by the options of the source" in caplog.text
    assert "cannot be used" not in caplog.text


MESSAGES = {
    "not a picture": ({"image": "t.png", "caption": "X"}, ["t.png", "is not an image of a kind that is known"]),
    "half a picture": ({"image": "half.png", "caption": "X"}, ["half.png"]),
    "no picture there": ({"image": "none.png", "caption": "X"}, ["none.png"]),
    "a sound": ({"text": "X", "audio": "a.wav"}, ["'a.wav'", "only pictures are trained on", "ignore_fields=[audio]"]),
    "a video": ({"text": "X", "videos": ["a.mp4"]}, ["a.mp4", "only pictures are trained on", "ignore_fields=[videos]"]),
    "a field without a name that is known": ({"topic": "x", "q": "y"}, ["q, topic", "fields={question: ..., answer: ...}"]),
    "a page of the web": ({"image_url": "https://x.org/a.png", "caption": "X"}, ["https://x.org/a.png", "fetch"]),
    "another medium": ({"image": "a.png", "caption": "X", "photo_b": "b.png"}, ["fields={image: photo_b}"]),
    "a grounding": ({"image": "a.png", "caption": "<ref-object> at <bbox>"}, ["<ref-object>", "write the names and the coordinates into the texts", "placeholder=literal"]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", MESSAGES)
def test_a_message_says_what_where_and_what_to_do(tmp_path: Path, form: str, kind: str) -> None:
    picture(tmp_path)
    (tmp_path / "t.png").write_text("no picture")
    (tmp_path / "half.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    record, expected = MESSAGES[kind]
    path = written(tmp_path, form, [record, {name: record[name] for name in record}])
    try:
        [detail, again] = [detail for _, detail in opened(path).index.shards[0].bad.values()]
        assert detail == again
    except DataError as error:
        assert form == "parquet"  # which says it of the whole file
        detail = str(error)
        expected = expected[1:]
    assert all(part in detail for part in expected), detail
    assert not {"BytesIO", "\n", "..", "{image: image}", "{image: audio}"} & {
        part
        for part in ("BytesIO", "\n", "..", "{image: image}", "{image: audio}")
        if part in detail.replace("...", "")
    }


def test_a_file_that_is_no_parquet_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing that is PAR1")
    with pytest.raises(DataError) as error:
        opened(tmp_path / "a.parquet")
    assert "a.parquet is not a readable parquet file (" in str(error.value)
    assert ".." not in str(error.value)
