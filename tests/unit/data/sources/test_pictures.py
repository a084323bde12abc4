"""Pictures that records name: where they lie, which names are refused, and what became of the files since they were indexed."""

import base64
import json
import os
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.source import Source, build_sources, index_sources
from m4train.data.storage import files as storage
from m4train.errors import BadSample, ConfigError
from tests.helpers.data import FakeProcessor, data_config, png
from tests.helpers.stores import http_store

RED, BLUE = Image.new("RGB", (20, 10), "red"), Image.new("RGB", (12, 16), "blue")


def record(image: str) -> dict:
    return {
        "image": image,
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A."}],
    }


def written(folder: Path, *images: str) -> Path:
    """Records of these images, next to the pictures red.png and sub/blue.png, and one that is always good."""
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    (folder / "red.png").write_bytes(png(RED))
    (folder / "sub" / "blue.png").write_bytes(png(BLUE))
    path = folder / "a.jsonl"
    path.write_text("".join(json.dumps(record(image)) + "\n" for image in ("red.png", *images)))
    return path


def opened(path: Path, **settings) -> Source:
    [built] = build_sources(
        {"s": SourceConfig(path=str(path), format="json", **settings)}, data_config(), FakeProcessor()
    )
    return built


def bad(built: Source) -> dict[str, tuple[str, str]]:
    return {shard.key(number): why for shard in built.index.shards for number, why in shard.bad.items()}


ODD = [
    ("http://example.org/a.png", "remote_image"),
    ("HTTPS://example.org/a.png", "remote_image"),
    ("ftp://example.org/a.png", "remote_image"),
    ("nowhere://a.png", "remote_image"),
    ("x+y://a/b.png", "remote_image"),
    ("github://a", "remote_image"),
    ("a b://c.png", "remote_image"),
    ("://", "remote_image"),
    ("file:///nowhere/a.png", "missing_image"),
    ("memory://nothing.png", "missing_image"),
    ("data:,", "unreadable_image"),
    ("data:image/svg+xml,<svg/>", "unreadable_image"),
    ("DATA:image/png;base64,AAAA", "unreadable_image"),
    ("C:\\pictures\\a.png", "missing_image"),
    ("a\0b.png", "missing_image"),
    ("a" * 5000 + ".png", "missing_image"),
    ("sub", "missing_image"),
    ("red.png/x.png", "missing_image"),
    ("\udc80.png", "missing_image"),
]


def test_an_odd_name_is_one_bad_sample_with_its_way_out(tmp_path: Path) -> None:
    built = opened(written(tmp_path, *(name for name, _ in ODD)))
    found = bad(built)
    assert {name: found[str(number)][0] for number, (name, _) in enumerate(ODD, 1)} == dict(ODD)
    assert "fetch the images before training" in found["1"][1]
    assert np.array_equal(built.images(0)[0], np.asarray(RED))


def test_every_way_to_name_a_picture_gives_its_pixels(tmp_path: Path) -> None:
    memory = pytest.importorskip("fsspec").filesystem("memory")
    memory.pipe("/pictures/blue.png", png(BLUE))
    spaced = tmp_path / "a b%.png"
    spaced.write_bytes(png(BLUE))
    coded = base64.b64encode(png(BLUE)).decode()
    names = [
        "sub/blue.png",
        "./sub/../sub/blue.png",
        str(tmp_path / "sub" / "blue.png"),
        f"file://{tmp_path}/sub/blue.png",
        f"FILE://localhost{tmp_path}/sub/blue.png",
        f"file:{tmp_path}/sub/blue.png",
        f"file://{tmp_path}/a%20b%25.png",
        "a b%.png",
        "memory://pictures/blue.png",
        f"data:image/png;base64,{coded}",
        f"DATA:image/png;base64,{coded}",
        coded,
    ]
    built = opened(written(tmp_path, *names))
    assert not bad(built)
    for number in range(1, len(names) + 1):
        assert np.array_equal(built.images(number)[0], np.asarray(BLUE)), names[number - 1]
        assert built.stored_images(number) == [png(BLUE)]


def test_relative_paths_begin_at_the_image_folder(tmp_path: Path) -> None:
    path = written(tmp_path / "records", "sub/blue.png")
    with pytest.raises(ConfigError, match="no usable sample of 2"):
        opened(path, image_folder=str(tmp_path / "elsewhere"))
    written(tmp_path / "elsewhere")
    again = opened(path, image_folder=str(tmp_path / "elsewhere"))
    (tmp_path / "records" / "red.png").unlink()
    assert np.array_equal(again.images(0)[0], np.asarray(RED))
    absolute = opened(written(tmp_path / "other", str(tmp_path / "elsewhere" / "red.png")), image_folder=str(tmp_path))
    assert list(bad(absolute)) == ["0"]
    with http_store(tmp_path / "elsewhere") as store:
        served = opened(path, image_folder=store.url)
        assert np.array_equal(served.images(1)[0], np.asarray(BLUE))
    with pytest.raises(ConfigError, match="image_folder is 'x', but format canonical"):
        build_sources({"s": SourceConfig(path=str(path), image_folder="x")}, data_config(), FakeProcessor())


@pytest.fixture
def no_pauses(monkeypatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: pytest.fail("waited for a picture"))


CHANGES = {
    "deleted": lambda path: path.unlink(),
    "replaced": lambda path: path.write_bytes(png(Image.new("RGB", (30, 30), "green"))),
    "of the same size": lambda path: path.write_bytes(png(Image.new("RGB", (12, 16), "lime")).ljust(len(png(BLUE)))),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"more"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_picture_that_changes_is_a_bad_sample_at_once_and_indexed_anew_on_the_next_use(
    tmp_path: Path, change: str, no_pauses
) -> None:
    path, picture = written(tmp_path, "sub/blue.png"), tmp_path / "sub" / "blue.png"
    built = opened(path)
    digest = built.index.digest()
    CHANGES[change](picture)
    os.utime(picture.parent, None)
    with pytest.raises(BadSample) as error:
        built.images(1)
    assert error.value.reason == ("missing_image" if change in ("deleted", "a folder") else "damaged")
    assert "blue.png" in error.value.detail
    if picture.is_file():
        later = time.time_ns() + 10**9
        os.utime(picture, ns=(later, later))
    again = opened(path)
    assert again.index.digest() != digest
    if change in ("deleted", "a folder", "cut"):
        assert bad(again)["1"][0] in ("missing_image", "unreadable_image")
    if change in ("replaced", "of the same size"):
        assert np.array_equal(again.images(1)[0], np.asarray(Image.open(picture).convert("RGB")))
    assert np.array_equal(again.images(0)[0], np.asarray(RED))


def test_a_picture_that_comes_later_is_found_and_a_copy_of_a_dataset_has_the_same_digest(tmp_path: Path) -> None:
    path = written(tmp_path / "a", "late.png")
    assert bad(opened(path))["1"][0] == "missing_image"
    (tmp_path / "a" / "late.png").write_bytes(png(BLUE))
    late = opened(path)
    assert not bad(late)
    copied = written(tmp_path / "b", "late.png")
    (tmp_path / "b" / "late.png").write_bytes(png(BLUE))
    assert opened(copied).index.digest() == late.index.digest()


def test_the_index_command_repairs_what_is_too_large_to_be_looked_at_on_every_use(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("m4train.data.index.outside.MOST_CHECKED", 1)
    path = written(tmp_path, "sub/blue.png")
    opened(path)
    (tmp_path / "sub" / "blue.png").unlink()
    assert not bad(opened(path))
    index_sources({"s": SourceConfig(path=str(path), format="json")}, data_config(), FakeProcessor())
    assert bad(opened(path))["1"][0] == "missing_image"


def test_an_edited_record_is_a_bad_sample_until_its_file_is_indexed_anew(tmp_path: Path) -> None:
    path = written(tmp_path, "sub/blue.png")
    built = opened(path)
    path.write_text(path.read_text().replace("A.", "B."))
    with pytest.raises(BadSample, match="other bytes") as error:
        built.read(1)
    assert error.value.reason == "damaged"
    os.utime(path, ns=(1, 1))
    assert opened(path).read(1).messages[1]["content"] == [{"text": "B."}]


@pytest.mark.parametrize(
    "name", ["sub\\caf\u00e9 1.png", "sub/cafe\u0301 1.png", "sub\\cafe\u0301 1.png", "./sub\\caf\u00e9 1.png"]
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_as_windows_and_macos_write_them(tmp_path: Path, name: str, form: str) -> None:
    path = written(tmp_path, name)
    (tmp_path / "sub" / unicodedata.normalize(form, "caf\u00e9 1.png")).write_bytes(png(BLUE))
    built = opened(path)
    assert not bad(built)
    assert np.array_equal(built.images(1)[0], np.asarray(BLUE))
    assert "image_folder" in bad(opened(written(tmp_path, "a\\b.png")))["1"][1]
