"""Records in JSON and JSONL files: LLaVA, ShareGPT and OpenAI messages, and what parquet rows hold."""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, BinaryIO

from m4train.data.documents.sample import json_value
from m4train.data.sources.base import ScannedSample
from m4train.data.sources.csv_records import with_picture
from m4train.data.sources.record_files import RecordFile, is_metadata, is_picture
from m4train.data.storage.files import FileReader, is_remote
from m4train.errors import BadSample
from m4train.processing.images import PICTURE_EXTENSIONS

_BETWEEN = re.compile(r"[ \t\r\n,]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK = 1 << 20  # bytes read at first
_LARGEST = 512 << 20  # characters of a record, behind which it is taken for broken


class JsonRecords(RecordFile):
    """A file holding one JSON array of records, one record per line, or records that go over several lines.

    If an array is cut or broken, what comes before is read; the rest is one bad sample. Files may be larger than the memory.
    Records in a `metadata` file name the pictures next to it as `file_name`.
    """

    name = "json"

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        found = super().scan(files, path)
        picture = _picture_of_same_name(path)
        if picture is None:
            yield from found
            return
        samples = list(islice(found, 2))
        if len(samples) == 1 and samples[0].bad is None and not any(member.is_image for member in samples[0].members):
            detail = (
                f"{picture} lies next to {os.path.basename(path)} and is not read: name it in the record, or set the "
            )
            bad = ("unread_media", detail + "source's format=picture_folder and its path to the folder")
            samples = [
                replace(
                    samples[0],
                    members=(),
                    bad=bad,
                    files=(*samples[0].files, os.path.join(os.path.dirname(path), picture)),
                )
            ]
        yield from (*samples, *found)

    def records(self, files: FileReader, path: str) -> Iterator[tuple[int, bytes | BadSample]]:
        with files.open(path) as file:
            array = file.read(64).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
            file.seek(0)
            if array or _goes_on(file):
                file.seek(0)
                yield from _values(file)
                return
            file.seek(0)
            offset = 0
            for line in file:
                if line.removeprefix(_BYTE_ORDER_MARK).strip():
                    yield offset, line.rstrip(b"\r\n")
                offset += len(line)

    def parse(self, files: FileReader, path: str, raw: bytes) -> Any:
        try:
            record = json_value(raw)
        except (ValueError, RecursionError) as error:
            raise BadSample("bad_json", f"not JSON in UTF-8: {error}") from None
        described = is_metadata(path) and isinstance(record, dict)
        return with_picture(record, self.reading) if described else record


def _picture_of_same_name(path: str) -> str | None:
    """The picture next to a local file that has its name but for the extension; None if there is none."""
    folder, name = os.path.split(path)
    stem, kind = os.path.splitext(name)
    if kind.lower() != ".json" or is_remote(path) or not os.path.isdir(folder or "."):
        return None
    candidates = (stem + each for each in (*PICTURE_EXTENSIONS, *map(str.upper, PICTURE_EXTENSIONS)))
    return next((each for each in candidates if os.path.exists(os.path.join(folder, each)) and is_picture(each)), None)


def _goes_on(file: BinaryIO) -> bool:
    """Whether the first record goes on in the next line, as printers for people write them."""
    first = next((line for line in file if line.removeprefix(_BYTE_ORDER_MARK).strip()), b"")
    return first.strip().endswith((b"{", b"[", b","))


class _Text:
    """The text of a file, of which no more is held than from `place` on as far as it was asked for."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._read = file, _CHUNK
        # What is not UTF-8 is found where its record is parsed.
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text, self.place, self.ended = "", 0, False

    def more(self) -> None:
        """Reads on, more each time while nothing was taken: no part is parsed often."""
        self._read = _CHUNK if self.place else 2 * self._read
        data = self._file.read(self._read)
        self.text, self.place = self.text[self.place :] + self._decoder.decode(data, final=not data), 0
        self.ended = not data

    def skip(self) -> int:
        """Passes over what is between records; returns how many characters."""
        passed = 0
        while True:
            found = _BETWEEN.match(self.text, self.place)
            assert found is not None
            passed += found.end() - self.place
            self.place = found.end()
            if self.ended or self.place < len(self.text):
                return passed
            self.more()


def _values(file: BinaryIO) -> Iterator[tuple[int, bytes | BadSample]]:
    """The values of an array, or values one after the other, as `records` gives them."""
    text, decoder = _Text(file), json.JSONDecoder()
    while not text.text and not text.ended:
        text.more()
    start = text.text
    marked = start.startswith("\ufeff")
    text.place = int(marked)
    offset = 3 * marked + text.skip()
    array = text.text.startswith("[", text.place)
    text.place, offset = text.place + array, offset + array
    while True:
        offset += text.skip()
        at_end = text.place == len(text.text)
        if at_end and not array:
            return
        if array and text.text.startswith("]", text.place):
            text.place += 1
            if text.skip() is not None and text.place < len(text.text):
                yield offset + 1, _broken(offset + 1, "there is more behind the end of the array")
            return
        try:
            _, end = decoder.raw_decode(text.text, text.place)
            whole = end < len(text.text) or text.ended
        except (ValueError, RecursionError) as error:
            if text.ended or isinstance(error, RecursionError) or len(text.text) - text.place > _LARGEST:
                yield offset, _broken(offset, "the file ends before its array does" if at_end else str(error))
                return
            whole = False
        if not whole:
            text.more()
            continue
        raw = text.text[text.place : end].encode("utf-8", "surrogateescape")
        yield offset, raw
        offset, text.place = offset + len(raw), end


def _broken(offset: int, what: str) -> BadSample:
    return BadSample("bad_json", f"from byte {offset} on the file holds no further record: {what}")
