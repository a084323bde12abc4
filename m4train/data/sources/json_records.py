"""Conversations in JSON and JSONL files: LLaVA, ShareGPT and OpenAI messages, with images in files or as base64.

An image is a path relative to the JSON file's folder, or a data URL. Remote images are refused: fetch them first.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from m4train.data.sample import Sample
from m4train.data.sources.base import FileReader, Member, ScannedSample, content_hash
from m4train.data.sources.dialogues import dialogue
from m4train.data.sources.tar_layouts import from_base64
from m4train.errors import BadSample, DataError
from m4train.processing.images import decode_image, read_image_info

_SPACE = re.compile(r"[\s,]*")


class JsonRecords:
    """A file holding one JSON array of records, or one record a line."""

    name = "json"

    def scan(self, path: str) -> Iterator[ScannedSample]:
        for number, (offset, raw) in enumerate(_records(path)):
            key = str(number)
            try:
                sample = dialogue(_parse(raw))
                images = [self._image(path, name) for name in sample.images]
                yield ScannedSample(key, (Member(offset, len(raw), content_hash(raw)), *images))
            except BadSample as error:
                yield ScannedSample(key, bad=(error.reason, error.detail))

    def count(self, path: str, limit: int) -> int:
        total = 0
        for _ in _records(path):
            total += 1
            if total > limit:
                break
        return total

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        text = members[0]
        raw = files.read(path, text.offset, text.size)
        if content_hash(raw) != text.hash:
            raise BadSample(
                "damaged", f"the record at byte {text.offset} has other bytes than when the file was indexed"
            )
        return dialogue(_parse(raw))

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
            if content_hash(data) != member.hash:
                raise BadSample("damaged", f"image {number} ({name[:80]}) has other bytes than when it was indexed")
            found.append(data)
        return found

    def blocks(self, path: str) -> None:
        return None

    def _image(self, path: str, name: str) -> Member:
        if re.match(r"[a-z0-9]+://", name):
            raise BadSample("remote_image", f"{name[:80]} is not a local file: fetch the images before training")
        if _embedded(name):
            data = from_base64(name)
        else:
            try:
                with open(_beside(path, name), "rb") as file:
                    data = file.read()
            except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
                raise BadSample("missing_image", f"no file {_beside(path, name)}") from None
        info = read_image_info(data)
        return Member(0, len(data), content_hash(data), info.width, info.height)


def _embedded(name: str) -> bool:
    return name.startswith("data:")


def _beside(path: str, name: str) -> str:
    return os.path.join(os.path.dirname(path), name)


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON in UTF-8: {error}") from None


def _records(path: str) -> Iterator[tuple[int, bytes]]:
    """Byte offset and bytes of every record."""
    with open(path, "rb") as file:
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
