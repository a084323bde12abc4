"""The files that people have: tables, folders of pictures, records of any size, compressed files, and what auto takes them for."""

import csv
import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from m4train.config import SourceConfig
from m4train.data.documents.sample import Sample
from m4train.data.shards import expand_shards
from m4train.data.source import Source, build_sources, index_sources, open_sources
from m4train.data.sources.csv_records import CsvRecords
from m4train.data.sources.json_records import JsonRecords
from m4train.data.storage import packed
from m4train.data.storage.files import FileReader
from m4train.errors import BadSample, ConfigError, DataError
from m4train.processing.images import PICTURE_EXTENSIONS, decode_image, read_image_info
from tests.helpers.data import FakeProcessor, data_config, digit_pictures, documents, png, write_shards

TURNS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "A."}]


def pictures(folder: Path, count: int = 6) -> list[np.ndarray]:
    """Handwritten digits as 0.png, 1.png ..., and their pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    found = digit_pictures()[0][:count]
    for number, image in enumerate(found):
        image.save(folder / f"{number}.png")
    return [np.asarray(image.convert("RGB")) for image in found]


def opened(path: Path | str, form: str = "auto", **settings) -> Source:
    config = SourceConfig(path=str(path), format=form, **settings)
    [built] = build_sources({"s": config}, data_config(), FakeProcessor())
    return built


def bad(built: Source) -> dict[str, str]:
    return {shard.key(number): why[0] for shard in built.index.shards for number, why in shard.bad.items()}


def said(sample: Sample) -> list[str | None]:
    return [item.get("text") for item in sample.all_items()]


def check(built: Source, texts: list[str], pixels: list[np.ndarray]) -> None:
    assert len(built) == len(texts)
    assert not bad(built)
    for number, (text, picture) in enumerate(zip(texts, pixels)):
        assert said(built.read(number)) == [None, text]
        assert (np.asarray(built.images(number)[0]) == picture).all()


# Tables

CAPTIONS = ["plain", 'a "quoted" word', "two\nlines", "comma, semicolon; tab\t", "ünïcode 数", '"']


@pytest.mark.parametrize("column", ["image", "file_name", "filename", "image_path", "Image Path", "path", "img"])
@pytest.mark.parametrize(("suffix", "delimiter"), [("csv", ","), ("csv", ";"), ("tsv", "\t"), ("CSV", "|")])
@pytest.mark.parametrize(("mark", "ending"), [("", "\n"), ("\ufeff", "\r\n")])
def test_tables_of_pictures_and_captions(
    tmp_path: Path, column: str, suffix: str, delimiter: str, mark: str, ending: str
) -> None:
    pixels = pictures(tmp_path)
    text = io.StringIO()
    rows = csv.writer(text, delimiter=delimiter, lineterminator=ending)
    rows.writerows([[column, "caption"], *([f"{n}.png", caption] for n, caption in enumerate(CAPTIONS))])
    path = tmp_path / f"a.{suffix}"
    path.write_bytes((mark + text.getvalue()).encode())
    check(opened(path), CAPTIONS, pixels)


def test_rows_that_cannot_be_read_are_bad_alone(tmp_path: Path) -> None:
    pixels = pictures(tmp_path)
    rows = [
        "image,caption",
        "0.png,Good",
        "1.png",
        "2.png,a,b",
        '3.png,5" screen',
        ",Only text",
        "9.png,Gone",
        "",
        "4.png,",
    ]
    path = tmp_path / "a.csv"
    path.write_bytes("\n".join(rows).encode() + b'\n5.png,\xff\xfe\n5.png,"open to\nthe end\n')
    built = opened(path)
    assert bad(built) == {
        "1": "bad_csv", "2": "bad_csv", "5": "missing_image", "6": "bad_json", "7": "bad_text", "8": "bad_csv", "9": "bad_csv",
    }  # fmt: skip
    assert said(built.read(3)) == [None, '5" screen']
    assert said(built.read(4)) == ["Only text"]
    assert (np.asarray(built.images(3)[0]) == pixels[3]).all()


def test_a_quotation_mark_that_is_none_costs_its_row_alone(tmp_path: Path) -> None:
    rows = ["text\tscore", '"5 inches\t1', "a\t2", '"b\t3', "c\t4", "d\t5", '"two', 'lines"\t6', '"e\t7']
    path = tmp_path / "a.tsv"
    path.write_text("\n".join(rows))
    built = opened(path)
    assert [bad(built).get(str(n)) for n in range(len(built))] == [
        "bad_csv", None, "bad_csv", None, None, None, "bad_csv",
    ]  # fmt: skip
    assert [said(built.read(n)) for n in (1, 3, 4, 5)] == [["a"], ["c"], ["d"], ["two\nlines"]]


def test_tables_of_questions_of_several_pictures_and_of_scores(tmp_path: Path) -> None:
    pictures(tmp_path)
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["images", "query", "label", "score"])
        rows.writerow(['["0.png", "1.png"]', "Which?", "Both.", "4"])
        rows.writerow(["2.png", "Which?", "One.", "2.5"])
    built = opened(path, fields={"question": "query", "answer": "label"}, where="score >= 3")
    assert len(built.images(0)) == 2
    assert [message["role"] for message in built.read(0).messages] == ["user", "assistant"]
    assert bad(built) == {"1": "skipped"}


def test_a_name_for_the_pictures_can_be_given(tmp_path: Path) -> None:
    pixels = pictures(tmp_path / "photos", 1)
    path = tmp_path / "a.csv"
    path.write_text("holiday,caption\n0.png,Sea\n")
    check(opened(path, fields={"image": "holiday"}, image_folder=str(tmp_path / "photos")), ["Sea"], pixels)


# Folders


@pytest.mark.parametrize("kind", ["csv", "jsonl", "split csv", "split jsonl"])
@pytest.mark.parametrize("form", ["auto", "named"])
def test_imagefolder_with_metadata(tmp_path: Path, kind: str, form: str) -> None:
    folder = tmp_path / "train" if kind.startswith("split") else tmp_path
    pixels = pictures(folder)
    suffix = kind.split()[-1]
    lines = [{"file_name": f"{n}.png", "text": f"Digit {n}"} for n in range(6)]
    if suffix == "csv":
        text = "file_name,text\n" + "".join(f"{line['file_name']},{line['text']}\n" for line in lines)
    else:
        text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / f"metadata.{suffix}").write_text(text)
    (tmp_path / "README.md").write_text("about")
    check(
        opened(tmp_path, "auto" if form == "auto" else {"csv": "csv", "jsonl": "json"}[suffix]),
        [line["text"] for line in lines],
        pixels,
    )


def test_a_folder_of_pictures_with_texts_of_the_same_names(tmp_path: Path, caplog) -> None:
    pixels = pictures(tmp_path / "a", 3)
    for number, name in enumerate(["0.txt", "1.TXT", "2.caption"]):
        (tmp_path / "a" / name).write_text(f"Digit {number}\n")
    (tmp_path / "._0.txt").write_text("junk")
    (tmp_path / "Thumbs.db").write_text("junk")
    built = opened(tmp_path)
    check(built, ["Digit 0", "Digit 1", "Digit 2"], pixels)
    assert "takes it for picture_folder" in caplog.text
    Image.fromarray(pixels[0]).save(tmp_path / "a" / "9.JPG")
    (tmp_path / "a" / "8.txt").write_text("no picture")
    (tmp_path / "a" / "1.TXT").write_text(" ")
    again = opened(tmp_path)
    assert bad(again) == {"a/9": "no_text", "a/8": "missing_image", "a/1": "no_text"}
    (tmp_path / "a" / "0.png").unlink()
    with pytest.raises(BadSample, match="gone"):
        again.images(0)
    (tmp_path / "a" / "2.caption").write_text("changed")
    with pytest.raises(BadSample, match="other bytes"):
        again.read([again.key(n) for n in range(len(again))].index("a/2"))


def test_a_folder_stands_for_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/0.jsonl", "data/1.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": "x"}))
    opened(tmp_path)
    assert [Path(path).name for path in expand_shards(str(tmp_path))] == ["0.jsonl", "1.jsonl"]
    (tmp_path / "b.csv").write_text("text\nx\n")
    with pytest.raises(DataError, match=r"several kinds \(\.csv, \.jsonl\)"):
        expand_shards(str(tmp_path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="No shard matches"):
        expand_shards(str(tmp_path / "empty"))


# Pictures of every type


def types() -> list[tuple[str, str]]:
    """Extension and format of every type that Pillow writes a small picture of, and reads back."""
    Image.init()
    found = []
    for suffix, form in sorted(Image.registered_extensions().items()):
        file = io.BytesIO()
        try:
            Image.new("RGB", (32, 32), (200, 10, 10)).save(file, form)
            read_image_info(file.getvalue())
            decode_image(file.getvalue())
        except Exception:
            continue
        found.append((suffix, form))
    return found


def test_every_picture_type_that_pillow_reads_is_read_in_every_layout(tmp_path: Path) -> None:
    known = types()
    assert {".avif", ".jfif", ".jp2", ".webp", ".tiff", ".ico", ".tga"} <= {suffix for suffix, _ in known}
    assert {suffix for suffix, _ in known} - PICTURE_EXTENSIONS <= {".pdf"}
    folder, records = tmp_path / "folder", []
    folder.mkdir()
    with tarfile.open(tmp_path / "pairs.tar", "w") as pairs, tarfile.open(tmp_path / "own.tar", "w") as own:
        for number, (suffix, form) in enumerate(known):
            suffix = suffix.upper() if number % 2 else suffix
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (200, 10, 10)).save(file, form)
            (folder / f"{number}{suffix}").write_bytes(file.getvalue())
            (folder / f"{number}.Txt").write_text(form)
            records.append({"image": f"folder/{number}{suffix}", "text": form})
            document = json.dumps({"items": [{"image": f"0{suffix}"}, {"text": form}]}).encode()
            for archive, members in (
                (pairs, {f"{number}{suffix}": file.getvalue(), f"{number}.TXT": form.encode()}),
                (own, {f"{number}.0{suffix}": file.getvalue(), f"{number}.JSON": document}),
            ):
                for name, data in members.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
    (tmp_path / "a.JSONL").write_text("".join(json.dumps(record) + "\n" for record in records))
    for path in ("folder", "pairs.tar", "own.tar", "a.JSONL"):
        built = opened(tmp_path / path)
        assert not bad(built), path
        assert len(built) == len(known)
        for number in range(len(known)):
            [image] = built.images(number).values()
            assert image.mode == "RGB"
            assert image.getpixel((16, 16))[0] > 150


# Records of any size


@pytest.mark.parametrize("chunk", [1, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("array", [True, False])
def test_arrays_are_read_piece_by_piece_with_the_right_places(
    tmp_path: Path, monkeypatch, chunk: int, array: bool
) -> None:
    monkeypatch.setattr("m4train.data.sources.json_records._CHUNK", chunk)
    records = [{"text": f'ü{n} 数 \\" ]}}'} for n in range(20)] + [12, "x", None, [1, [2]], 34]
    text = json.dumps(records, ensure_ascii=False, indent=1)
    if not array:
        text = "\n".join(json.dumps(record, ensure_ascii=False, indent=1) for record in records)
    path = tmp_path / "a.json"
    path.write_text("\ufeff \n" + text + "\n ", encoding="utf-8")
    found = list(JsonRecords().records(FileReader(), str(path)))
    data = path.read_bytes()
    assert [json.loads(raw) for _, raw in found] == records
    assert all(data[offset : offset + len(raw)] == raw for offset, raw in found)
    path.write_text(text[: len(text) // 2], encoding="utf-8")
    *good, (_, last) = JsonRecords().records(FileReader(), str(path))
    assert [json.loads(raw) for _, raw in good] == records[: len(good)]
    assert isinstance(last, BadSample)


def test_an_array_is_not_held_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "x" * 1000}] * 30_000))
    tracemalloc.start()
    count = sum(1 for _ in JsonRecords().records(FileReader(), str(path)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 30_000
    assert path.stat().st_size > 30_000_000
    assert most < 12_000_000


# Compressed files


def compressed(path: Path, data: bytes) -> Path:
    if path.suffix == ".zst":
        pyarrow = pytest.importorskip("pyarrow")
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(data)
    else:
        path.write_bytes(gzip.compress(data))
    return path


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_records_tables_and_tars(tmp_path: Path, suffix: str) -> None:
    pixels = pictures(tmp_path, 3)
    lines = "".join(json.dumps({"image": f"{n}.png", "text": f"Digit {n}"}) + "\n" for n in range(3))
    texts = [f"Digit {n}" for n in range(3)]
    check(opened(compressed(tmp_path / f"a.jsonl{suffix}", lines.encode())), texts, pixels)
    table = "file_name,text\n" + "".join(f"{n}.png,Digit {n}\n" for n in range(3))
    check(opened(compressed(tmp_path / f"b.csv{suffix}", table.encode())), texts, pixels)
    [shard] = write_shards(tmp_path / "shards", documents(5))
    plain, packed_tar = opened(shard), opened(compressed(tmp_path / f"c.tar{suffix}", shard.read_bytes()))
    assert len(packed_tar) == 5
    assert packed_tar.index.digest() == plain.index.digest()
    for number in range(5):
        assert packed_tar.read(number) == plain.read(number)
        assert packed_tar.stored_images(number) == plain.stored_images(number)


def test_large_and_damaged_compressed_files_are_refused_with_the_way_out(tmp_path: Path, monkeypatch) -> None:
    path = compressed(tmp_path / "a.jsonl.gz", json.dumps({"text": "x"}).encode())
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz cannot be unpacked"):
        opened(path)
    compressed(path, json.dumps({"text": "y" * 5000}).encode())
    monkeypatch.setattr(packed, "_MOST_UNPACKED", 1000)
    with pytest.raises(DataError, match="unpack them first, with gunzip"):
        opened(path)
    monkeypatch.setattr(packed, "MOST_PACKED", 10)
    with pytest.raises(DataError, match=r"1 shards, such as .*unpack them first, with gunzip"):
        opened(path)


# What auto takes a source for


def member(name: str, content: object) -> tuple[str, bytes]:
    return name, content if isinstance(content, bytes) else json.dumps(content).encode()


TARS = {
    "canonical": [member("a.json", {"items": [{"text": "x"}]})],
    "pairs": [member("a.jpg", png(Image.new("RGB", (9, 9)))), member("a.txt", b"x")],
    "m4_documents": [member("a.0.text.txt", b"x"), member("a.1.image.jpeg", png(Image.new("RGB", (9, 9))))],
    "m4_conversations": [member("a.0.text.txt", [{"user": "x", "assistant": "y"}])],
    "energon": [member("a.json", {"images": [None], "texts": ["x"]})],
    "mmc4": [member("a.json", {"text_list": ["x"], "image_info": []})],
    "llava_onevision": [
        member("a.json", {"texts": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]})
    ],
}


@pytest.mark.parametrize("form", TARS)
def test_auto_tells_tars_by_their_first_sample(tmp_path: Path, caplog, form: str) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in TARS[form]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    built = opened(tmp_path / "a.tar")
    assert built.config.format == form
    assert f"data.sources.s: format auto takes it for {form}: the first sample in a.tar holds" in caplog.text
    assert not bad(built)


def test_auto_says_what_it_cannot_tell(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_bytes(b"x")
    with pytest.raises(
        ConfigError, match=r"data\.sources\.s\.format is auto, but nothing is known of files like .*a\.xyz"
    ):
        opened(tmp_path / "a.xyz")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.mp3"), io.BytesIO())
    with pytest.raises(ConfigError, match="holds mp3, which is of no format that is known: name the format"):
        opened(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_records_of_many_lines_are_not_held_as_a_whole(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    line = json.dumps({"text": "x" * 1000}) if kind == "jsonl" else "x" * 1000
    path.write_text(("text\n" if kind == "csv" else "") + f"{line}\n" * 30_000)
    form = JsonRecords() if kind == "jsonl" else CsvRecords()
    tracemalloc.start()
    count = sum(1 for _ in form.records(FileReader(), str(path)))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 30_000
    assert most < 12_000_000


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_small_file_that_unpacks_to_very_much_is_refused_before_it_is_held(
    tmp_path: Path, monkeypatch, suffix: str
) -> None:
    path = compressed(tmp_path / f"a.jsonl{suffix}", b" " * 200_000_000)
    monkeypatch.setattr(packed, "_MOST_UNPACKED", 10_000_000)
    tracemalloc.start()
    with pytest.raises(DataError, match=f"unpack them first, with {'zstd -d' if suffix == '.zst' else 'gunzip'}"):
        FileReader().read(str(path), 0, 10)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 40_000_000


# Files that are nearly what is read


@pytest.mark.parametrize("first", ["sep=;\r\n", '"sep=;"\r\n', "\ufeffsep=;\r\n", "\r\n\r\n"])
def test_what_spreadsheets_write_before_the_header(tmp_path: Path, first: str) -> None:
    pixels = pictures(tmp_path, 2)
    (tmp_path / "a.csv").write_bytes(f"{first}image;caption\r\n0.png;A, B\r\n1.png;C\r\n".encode())
    check(opened(tmp_path / "a.csv"), ["A, B", "C"], pixels)


@pytest.mark.parametrize(
    "rows", ["0.png,A cat\n1.png,A dog\n", "0.png#0\tA cat\n", "a cat\thttps://x.org/a.jpg\nb\thttps://x.org/b.jpg\n"]
)
def test_a_table_without_a_header_loses_no_row_in_silence(tmp_path: Path, rows: str) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "a.tsv").write_text(rows.replace(",", "\t"))
    with pytest.raises(ConfigError, match="write a first row that names the columns, as image,caption"):
        opened(tmp_path / "a.tsv", fields={"caption": "A cat"})


def test_a_table_that_ends_in_txt(tmp_path: Path) -> None:
    pixels = pictures(tmp_path, 1)
    (tmp_path / "captions.txt").write_text("image,caption\n0.png,A cat\n")
    with pytest.raises(ConfigError, match=r"captions\.txt: set format=csv if they are tables"):
        opened(tmp_path / "captions.txt")
    check(opened(tmp_path / "captions.txt", "csv"), ["A cat"], pixels)
    (tmp_path / "0.txt").write_text("A cat")
    built = opened(tmp_path)
    [[reason, detail]] = built.index.shards[0].bad.values()
    assert (reason, "with format=csv, if it is a table" in detail) == ("missing_image", True)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("data-00000-of-00001.arrow", "to_parquet"),
        ("a.zip", "unzip"),
        ("a.jsonl.bz2", "bunzip2"),
        ("a.pdf", "render their pages"),
    ],
)
@pytest.mark.parametrize("whole", [True, False])
def test_files_that_are_not_read_and_what_to_do_with_them(tmp_path: Path, name: str, advice: str, whole: bool) -> None:
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "state.json" if whole else tmp_path / "README.md").write_text("{}")
    with pytest.raises((ConfigError, DataError), match=advice):
        opened(tmp_path if whole else tmp_path / name)


def test_folders_that_are_links_are_looked_into_once(tmp_path: Path) -> None:
    pixels = pictures(tmp_path / "elsewhere", 2)
    for number in range(2):
        (tmp_path / "elsewhere" / f"{number}.txt").write_text(f"Digit {number}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photos").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "again").symlink_to(tmp_path / "mine")
    check(opened(tmp_path / "mine"), ["Digit 0", "Digit 1"], pixels)
    (tmp_path / "elsewhere" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "A"}\n')
    (tmp_path / "elsewhere" / "0.txt").unlink()
    (tmp_path / "elsewhere" / "1.txt").unlink()
    assert bad(opened(tmp_path / "mine")) == {"1.png": "no_text"}


@pytest.mark.parametrize(
    "text", ["0 0.5 0.5 0.1 0.1", "3 0.1 0.2 0.30 .4\n12 0.5 0.5 0.1 1e-3\n".replace("1e-3", "0.001")]
)
def test_the_boxes_of_a_detector_are_no_caption(tmp_path: Path, text: str) -> None:
    pictures(tmp_path, 2)
    (tmp_path / "0.txt").write_text(text)
    (tmp_path / "1.txt").write_text("3 cups of 0.5 l")
    assert bad(opened(tmp_path)) == {"0": "no_text"}


@pytest.mark.parametrize("suffix", ["txt", "caption", "text.txt"])
def test_pairs_whose_text_is_called_otherwise(tmp_path: Path, suffix: str) -> None:
    [pixels] = pictures(tmp_path, 1)
    content = {"0.png": (tmp_path / "0.png").read_bytes(), f"0.{suffix}": b"A cup."}
    check(opened(tar(tmp_path / "a.tar", content)), ["A cup."], [pixels])


def test_turns_next_to_their_picture_in_a_tar(tmp_path: Path) -> None:
    [pixels] = pictures(tmp_path, 1)
    content = {"0.png": (tmp_path / "0.png").read_bytes(), "0.json": json.dumps({"messages": TURNS}).encode()}
    built = opened(tar(tmp_path / "a.tar", content))
    assert said(built.read(0)) == [None, "What?", "A."]
    assert (np.asarray(built.images(0)[0]) == pixels).all()


def tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def test_what_auto_is_taken_for_is_said_once_by_a_command_that_indexes(tmp_path, caplog):
    write_shards(tmp_path / "shards", documents(3))
    sources, data = {"s": SourceConfig(path=f"{tmp_path}/shards/*.tar", format="auto")}, data_config()
    index_sources(sources, data, FakeProcessor())
    [source] = open_sources(sources, data, FakeProcessor(), indexed=True)
    assert source.config.format == "canonical"
    assert caplog.text.count("format auto takes it for canonical") == 1
