"""Records in CSV and TSV files: a header of names, and a row per sample, one of whose columns names its picture."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from typing import Any

from m4train.data.sources.fields import PICTURE_COLUMNS, Reading, is_choice, is_column
from m4train.data.sources.media import looks_like_media
from m4train.data.sources.record_files import RecordFile
from m4train.data.storage.files import FileReader
from m4train.errors import BadSample

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DELIMITERS = ",\t;|"
# What programs write for a value that is missing; no answer and no picture.
_NOTHING = frozenset(
    ["NaN", "nan", "NAN", "-NaN", "-nan", "None", "NA", "N/A", "n/a", "NULL", "null", "<NA>", "#N/A", "#NA", "NaT"]
)
_LONGEST_HEADER = 1 << 20
_LONGEST_ROW = 1 << 24  # bytes that a quotation mark may hold open


class CsvRecords(RecordFile):
    """A header, then a row per sample. A quoted field may hold delimiters and line breaks; the delimiter is the one that the
    header has most of (in .tsv files the tab)."""

    name = "csv"

    def __init__(self, reading: Reading = Reading()) -> None:  # noqa: B008 (frozen)
        super().__init__(reading)
        self._headers: dict[str, tuple[str, list[str]]] = {}

    def records(self, files: FileReader, path: str) -> Iterator[tuple[int, bytes | BadSample]]:
        try:
            delimiter, names = self._header(files, path)
        except BadSample as error:
            yield 0, BadSample(error.reason, f"the header: {error.detail}")
            return
        with files.open(path) as file:
            offset, header = 0, True
            while line := file.readline():
                row = line
                while _goes_on(row, delimiter.encode()) and len(row) < _LONGEST_ROW and (more := file.readline()):
                    row += more
                if row != line and not _fits(row, delimiter, len(names)):
                    row = line  # its quotation mark is none: what follows are rows of their own
                    file.seek(offset + len(line))
                if not header and row.strip():
                    yield offset, row.rstrip(b"\r\n")
                header = header and not _is_header(row)
                offset += len(row)

    def parse(self, files: FileReader, path: str, raw: bytes) -> dict[str, Any]:
        delimiter, names = self._header(files, path)
        if _goes_on(raw, delimiter.encode()):
            raise BadSample("bad_csv", "a field begins with a quotation mark that is not closed")
        values = _fields(raw, delimiter)
        if len(values) != len(names):
            raise BadSample(
                "bad_csv",
                f"a row of {len(values)} fields, but the header has {len(names)}: put those that hold {delimiter!r} in quotes",
            )
        twice = next((name for number, name in enumerate(names) if name in names[:number]), None)
        if twice is not None:
            raise BadSample("bad_csv", f"the header names {twice!r} twice, of which only one could be read: rename one")
        record: dict[str, Any] = {n: "" if v.strip() in _NOTHING else v.strip(" ") for n, v in zip(names, values)}
        for name in self.reading.where_fields & set(record):
            record[name] = _number(record[name])
        return with_picture(record, self.reading)

    def _header(self, files: FileReader, path: str) -> tuple[str, list[str]]:
        """Delimiter and names of the columns."""
        if path not in self._headers:
            try:
                start = files.read(path, 0, _LONGEST_HEADER).removeprefix(BYTE_ORDER_MARK)
            except FileNotFoundError:
                start = b""
            line = next(filter(_is_header, start.splitlines()), b"")
            said = line.decode("utf-8", "replace")
            tabs = ".tsv" in os.path.basename(path).lower()
            delimiter = "\t" if tabs else max(_DELIMITERS, key=said.count)
            names = [_column(name.strip(), self.reading) for name in _fields(line, delimiter)]
            sample = next(filter(looks_like_media, names), None)
            if sample is not None:
                detail = f"it holds {sample[:120]!r}, as a row of a sample does: write a first row that names the columns, as image,caption"
                raise BadSample("bad_csv", detail)
            self._headers[path] = delimiter, [name or f"column {n}" for n, name in enumerate(names, start=1)]
        return self._headers[path]


def _is_header(row: bytes) -> bool:
    """Whether the first row that is one is the header: not an empty one, nor what spreadsheets write about the delimiter."""
    said = row.removeprefix(BYTE_ORDER_MARK).strip()
    return bool(said) and re.fullmatch(rb'"?sep=.?"?', said) is None


def with_picture(record: dict[str, Any], reading: Reading) -> dict[str, Any]:
    """The record with the picture under the name that records have for it: in a table the name of a column says what it is."""
    if "image" not in reading.fields and "images" not in reading.fields and not {"image", "images"} & set(record):
        lower = {_plain(name): name for name in record}
        found = next((lower[name] for name in PICTURE_COLUMNS if name in lower), None)
        if found is not None:
            record = {("image" if name == found else name): value for name, value in record.items()}
    return record


def _plain(name: str) -> str:
    return re.sub(r"[\s-]+", "_", name.strip().lower())


def _column(name: str, reading: Reading) -> str:
    """What the column of a header is called: a name that is known whatever its case and spaces, unless an option names it so."""
    given = {*reading.fields.values(), *reading.where_fields}
    plain = _plain(name)
    return plain if name not in given and is_column(plain, Reading()) and not is_choice(name) else name


def _goes_on(row: bytes, delimiter: bytes) -> bool:
    """Whether a row goes on in the next line: a field that begins with a quotation mark is still open."""
    if b'"' not in row:
        return False
    place = len(BYTE_ORDER_MARK) if row.startswith(BYTE_ORDER_MARK) else 0
    while True:
        while row.startswith(b" ", place):
            place += 1
        if row.startswith(b'"', place):
            place += 1
            while True:
                end = row.find(b'"', place)
                if end < 0:
                    return True
                place = end + 1
                if not row.startswith(b'"', place):
                    break
                place += 1
        following = row.find(delimiter, place)
        if following < 0:
            return False
        place = following + 1


def _fits(row: bytes, delimiter: str, columns: int) -> bool:
    """Whether a row of several lines is one: it is whole, and has as many fields as the header."""
    try:
        return not _goes_on(row, delimiter.encode()) and len(_fields(row, delimiter, strict=True)) == columns
    except BadSample:
        return False


def _fields(raw: bytes, delimiter: str, strict: bool = False) -> list[str]:
    """The fields of a row. `strict`: nothing follows a closing quotation mark. Raises BadSample."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", f"a row is not UTF-8: {error}: save the table as UTF-8") from None
    if "\0" in text:
        raise BadSample("bad_csv", "a row holds a NUL character")
    csv.field_size_limit(1 << 30)
    try:
        return next(
            csv.reader(
                [*text.splitlines(keepends=True)] or [""], delimiter=delimiter, strict=strict, skipinitialspace=True
            ),
            [],
        )
    except csv.Error as error:
        raise BadSample("bad_csv", f"a row cannot be read: {error}") from None


def _number(value: Any) -> Any:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return value
    return int(number) if number.is_integer() else number
