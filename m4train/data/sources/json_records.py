"""Records in JSON and JSONL files: LLaVA, ShareGPT and OpenAI messages, and what parquet rows hold, with images in files or
as base64.

An image is a path, from the JSON file's folder or the source's image_folder, the URL of an object store, or base64, plain or as a
data URL. Images on web pages are refused: fetch them first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, BinaryIO

from PIL import Image

from m4train.data.documents.sample import Sample
from m4train.data.sources.base import Member, ScannedSample, content_hash
from m4train.data.sources.fields import RECORD_OPTIONS, Reading
from m4train.data.sources.pictures import Pictures
from m4train.data.sources.records import Composed, compose, found_images, kept_images, unchanged
from m4train.data.storage.files import FileReader, Range
from m4train.errors import BadSample
from m4train.processing.images import decode_image

_BETWEEN = re.compile(r"[ \t\r\n,]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class JsonRecords:
    """A file holding one JSON array of records, one record per line, or records that go over several lines.

    If an array is cut or broken, what comes before is read; the rest is one bad sample.
    """

    name = "json"
    settings: Mapping[str, Any] = {"rules": 2}
    pictures = Pictures()
    image_range: Sequence[float] = ()
    honours = RECORD_OPTIONS

    def __init__(self, reading: Reading = Reading()) -> None:  # noqa: B008 (frozen)
        self.reading = reading

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        for number, (offset, raw) in enumerate(_records(files, path)):
            key = str(number)
            named: tuple[str, ...] = ()
            try:
                if isinstance(raw, BadSample):
                    raise raw
                composed = compose(_parse(raw), self.reading)
                named = self.pictures.files_of(path, [str(picture) for picture in composed.pictures])
                images, lost = found_images(
                    composed, self.reading, lambda name, n: self.pictures.find(files, path, str(name), n)
                )
                text = Member(offset, len(raw), content_hash(raw))
                yield ScannedSample(key, (text, *images), files=named, unread=composed.unread() + lost)
            except BadSample as error:
                yield ScannedSample(key, bad=(error.reason, error.detail), files=named)

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return sum(1 for _ in islice(_records(files, path), limit + 1))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        return self._composed(files, path, members).sample

    def _composed(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Composed:
        text = members[0]
        raw = unchanged(files.read(path, text.offset, text.size), text, f"the record at byte {text.offset}")
        return compose(_parse(raw), self.reading, kept=kept_images(members, self.reading))

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        stored = self.stored_images(files, path, members, wanted)
        return {number: decode_image(data, image_range=self.image_range) for number, data in zip(wanted, stored)}

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        if not wanted:
            return []
        composed = self._composed(files, path, members)
        names = [str(composed.pictures[int(composed.sample.images[number])]) for number in wanted]
        return self.pictures.read(files, path, names, [members[1 + number] for number in wanted])

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        """The records: they say where their images are."""
        return [(path, members[0].offset, members[0].size)]

    def keep(self, window: int, pool: int) -> None:
        return  # samples are read one by one

    def blocks(self, files: FileReader, path: str) -> None:
        return None


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON in UTF-8: {error}") from None


def _records(files: FileReader, path: str) -> Iterator[tuple[int, bytes | BadSample]]:
    """Byte offset and bytes of every record, or what is wrong with the file from there on."""
    with files.open(path) as file:
        array = file.read(64).removeprefix(_BYTE_ORDER_MARK).lstrip().startswith(b"[")
        file.seek(0)
        if array or _goes_on(file):
            file.seek(0)
            yield from _values(file.read())
            return
        file.seek(0)
        offset = 0
        for line in file:
            if line.removeprefix(_BYTE_ORDER_MARK).strip():
                yield offset, line.rstrip(b"\r\n")
            offset += len(line)


def _goes_on(file: BinaryIO) -> bool:
    """Whether the first record goes on in the next line, as printers for people write them."""
    first = next((line for line in file if line.removeprefix(_BYTE_ORDER_MARK).strip()), b"")
    return first.strip().endswith((b"{", b"[", b","))


def _values(data: bytes) -> Iterator[tuple[int, bytes | BadSample]]:
    """The values of an array, or values one after the other, as `_records` gives them."""
    text = data.decode("utf-8", "surrogateescape")  # what is not UTF-8 is found where its record is parsed
    place = len(text) - len(text.removeprefix("\ufeff").lstrip())
    array = text.startswith("[", place)
    place += array
    offset = len(_stored(text[:place]))
    decoder = json.JSONDecoder()
    while True:
        skipped = _BETWEEN.match(text, place)
        assert skipped is not None
        offset, place = offset + skipped.end() - place, skipped.end()
        ended = place == len(text)
        if ended and not array:
            return
        if array and text.startswith("]", place):
            if text[place + 1 :].strip():
                yield offset + 1, _broken(offset + 1, "there is more behind the end of the array")
            return
        try:
            _, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            yield offset, _broken(offset, "the file ends before its array does" if ended else str(error))
            return
        raw = _stored(text[place:end])
        yield offset, raw
        offset, place = offset + len(raw), end


def _stored(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _broken(offset: int, what: str) -> BadSample:
    return BadSample("bad_json", f"from byte {offset} on the file holds no further record: {what}")
