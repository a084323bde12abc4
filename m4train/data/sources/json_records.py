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
from typing import Any

from PIL import Image

from m4train.data.sample import Sample
from m4train.data.sources.base import Member, ScannedSample, content_hash
from m4train.data.sources.records import image_member, record_sample, unchanged
from m4train.data.sources.tar_layouts import from_base64
from m4train.data.storage import FileReader, Range
from m4train.errors import BadSample, DataError
from m4train.processing.images import decode_image

_LONGEST_NAME = 255  # characters of a file name
_SPACE = re.compile(r"[\s,]*")


class JsonRecords:
    """A file holding one JSON array of records, or one record a line."""

    name = "json"

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        for number, (offset, raw) in enumerate(_records(files, path)):
            key = str(number)
            try:
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
        return {number: decode_image(data) for number, data in zip(wanted, stored)}

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        names = self.sample(files, path, members).images if wanted else []
        found = []
        for number in wanted:
            member, name = members[1 + number], names[number]
            data = from_base64(name) if _embedded(name) else files.read(_beside(path, name), 0, member.size)
            found.append(unchanged(data, member, f"image {number} ({name[:80]})"))
        return found

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        """The records: where their images lie is said by them."""
        return [(path, members[0].offset, members[0].size)]

    def blocks(self, files: FileReader, path: str) -> None:
        return None

    def _image(self, files: FileReader, path: str, name: str, number: int) -> Member:
        if re.match(r"[a-z0-9]+://", name):
            raise BadSample("remote_image", f"image {number}, {name[:80]}, is a URL: fetch the images before training")
        if _embedded(name):
            data = from_base64(name)
        else:
            try:
                data = files.read(_beside(path, name), 0, files.size(_beside(path, name)))
            except (FileNotFoundError, NotADirectoryError):
                raise BadSample("missing_image", f"image {number}: no file {_beside(path, name)}") from None
        return image_member(data, number, size=len(data))


def _embedded(name: str) -> bool:
    """Whether an image is given as base64, in a data URL or plainly, and not by its path."""
    return name.startswith("data:") or (len(name) > _LONGEST_NAME and "." not in name)


def _beside(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON in UTF-8: {error}") from None


def _records(files: FileReader, path: str) -> Iterator[tuple[int, bytes]]:
    """Byte offset and bytes of every record."""
    with files.open(path) as file:
        start = file.read(64).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from _array_records(path, file.read())
            return
        offset = 0
        for line in file:
            if line.strip():
                yield offset, line.rstrip(b"\r\n")
            offset += len(line)


def _array_records(path: str, data: bytes) -> Iterator[tuple[int, bytes]]:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8: {error}.") from None
    decoder = json.JSONDecoder()
    place, offset = text.index("[") + 1, len(text[: text.index("[") + 1].encode())
    while True:
        skipped = _SPACE.match(text, place)
        assert skipped is not None
        offset += skipped.end() - place
        place = skipped.end()
        if text[place : place + 1] == "]":
            return
        try:
            _, end = decoder.raw_decode(text, place)
        except ValueError as error:
            raise DataError(
                f"{path} is no JSON array of records: {error}; mend it or write one record a line."
            ) from None
        raw = text[place:end].encode()
        yield offset, raw
        offset, place = offset + len(raw), end
