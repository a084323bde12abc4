"""Records in JSON and JSONL files: LLaVA, ShareGPT and OpenAI messages, and what parquet rows hold, with images in files or
as base64.

An image is a path relative to the JSON file's folder, or base64, plain or as a data URL. Remote images are refused: fetch them first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, BinaryIO

from PIL import Image

from m4train.data.documents.sample import Sample
from m4train.data.sources.base import Member, ScannedSample, content_hash
from m4train.data.sources.records import image_member, record_sample, unchanged
from m4train.data.sources.tar_layouts import from_base64
from m4train.data.storage.files import FileReader, Range
from m4train.errors import BadSample
from m4train.processing.images import decode_image, read_image_info

_LONGEST_NAME = 255  # characters of a file name
_BETWEEN = re.compile(r"[ \t\r\n,]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_IN_FILE, _IN_RECORD = 0, 1  # where an image is stored, as its member's offset


class JsonRecords:
    """A file holding one JSON array of records, one record per line, or records that go over several lines.

    If an array is cut or broken, what comes before is read; the rest is one bad sample.
    """

    name = "json"
    image_range: Sequence[float] = ()

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        for number, (offset, raw) in enumerate(_records(files, path)):
            key = str(number)
            try:
                if isinstance(raw, BadSample):
                    raise raw
                names = record_sample(_parse(raw)).images
                images = [self._image(files, path, name, place) for place, name in enumerate(names)]
                yield ScannedSample(key, (Member(offset, len(raw), content_hash(raw)), *images))
            except BadSample as error:
                yield ScannedSample(key, bad=(error.reason, error.detail))

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return sum(1 for _ in islice(_records(files, path), limit + 1))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        text = members[0]
        raw = files.read(path, text.offset, text.size)
        return record_sample(_parse(unchanged(raw, text, f"the record at byte {text.offset}")))

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        stored = self.stored_images(files, path, members, wanted)
        return {number: decode_image(data, image_range=self.image_range) for number, data in zip(wanted, stored)}

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        names = self.sample(files, path, members).images if wanted else []
        found = []
        for number in wanted:
            member, name = members[1 + number], names[number]
            embedded = member.offset == _IN_RECORD
            data = from_base64(name) if embedded else files.read(_next_to(path, name), 0, member.size)
            found.append(unchanged(data, member, f"image {number} ({name[:80]})"))
        return found

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        """The records: they say where their images are."""
        return [(path, members[0].offset, members[0].size)]

    def keep(self, window: int, pool: int) -> None:
        return  # samples are read one by one

    def blocks(self, files: FileReader, path: str) -> None:
        return None

    def _image(self, files: FileReader, path: str, name: str, number: int) -> Member:
        if re.match(r"[a-z0-9]+://", name):
            raise BadSample("remote_image", f"image {number}, {name[:80]}, is a URL: fetch the images before training")
        if _only_base64(name):
            return image_member(from_base64(name), number, _IN_RECORD)
        place = _next_to(path, name)
        try:
            data = files.read(place, 0, files.size(place))
        except (FileNotFoundError, NotADirectoryError):
            coded = _short_base64(name)
            if coded is None:
                raise BadSample("missing_image", f"image {number}: no file {place[:1000]}") from None
            return image_member(coded, number, _IN_RECORD)
        return image_member(data, number, _IN_FILE, len(data))


def _only_base64(name: str) -> bool:
    """Whether an image can only be given as base64, in a data URL or plainly, and not by its path."""
    return name.startswith("data:") or (len(name) > _LONGEST_NAME and "." not in name)


def _short_base64(name: str) -> bytes | None:
    """The image that a name is in base64, for the smallest ones are no longer than a path; None if it is none."""
    try:
        data = from_base64(name)
        read_image_info(data)
    except BadSample:
        return None
    return data


def _next_to(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


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
            if line.strip():
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
