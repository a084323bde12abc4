"""A WARC file cut into the bytes of its records, so that damage costs the record it is in and nothing else.

A parser that reads the file as one stream ends at the first damaged gzip member, and takes a record that was cut off for an
empty one. Here every member is unpacked by itself, its checksum compared, and after damage the next member that begins a
record is searched for.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from m4train.errors import DataError

_MAGIC = b"\x1f\x8b\x08"
_BEGINS = b"WARC/1."
_CHUNK = 16 << 10
_SEARCH = 1 << 20
_MAX_HEAD = 64 << 10
_LENGTH = re.compile(rb"\r?\ncontent-length:[ \t]*(\d{1,15})[ \t]*\r?\n", re.IGNORECASE)
_END_OF_HEAD = re.compile(rb"\r?\n\r?\n")


class Cut(NamedTuple):
    """The bytes of one record, or why there are none."""

    offset: int  # of the record, or of the gzip member that holds it, in the file
    length: int  # bytes in the file, as stored
    data: bytes  # header, block and the two line ends after it; of trouble what could be read
    trouble: str = ""  # damaged, truncated, too_large, or nothing


def cuts(file: BinaryIO, max_bytes: int) -> Iterator[Cut]:
    """The records of a WARC file from where it stands, packed by gzip or not; none is larger than `max_bytes` unpacked.

    Raises DataError for a file that is packed in another way.
    """
    begin = file.tell()
    magic = file.read(4)
    file.seek(begin)
    if magic == b"\x28\xb5\x2f\xfd":
        raise DataError("it is packed by zstd, which is not read: pack it by gzip, record by record.")
    window = _Window(file)
    packed = magic[:2] == _MAGIC[:2] or (magic != _BEGINS[:4] and _next_member(window, begin) is not None)
    yield from (_of_gzip if packed else _plain)(window, begin, max_bytes)


class _Window:
    """Reads a file forward and a little back, by offset."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._base, self._held = 0, b""

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only at the end of the file."""
        start = offset - self._base
        if start < 0 or start + size > len(self._held):
            self._file.seek(offset)
            self._base, self._held, start = offset, self._file.read(max(size, _SEARCH)), 0
        return self._held[start : start + size]

    def find(self, pattern: bytes, offset: int) -> int:
        """The first place of `pattern` from `offset` on; -1 if there is none."""
        while block := self.read(offset, _SEARCH):
            found = block.find(pattern)
            if found >= 0:
                return offset + found
            if len(block) < _SEARCH:
                break
            offset += len(block) - len(pattern) + 1
        return -1


def _of_gzip(window: _Window, offset: int, max_bytes: int) -> Iterator[Cut]:
    limit = max_bytes + _MAX_HEAD
    while window.read(offset, 1):
        data, end, trouble = _inflated(window, offset, limit)
        if trouble in ("damaged", "truncated"):
            following = _next_member(window, offset + 1)
            if following is not None:
                trouble = "damaged"  # its end was not found, though the file goes on
            yield Cut(offset, (following if following is not None else end) - offset, data, trouble)
            if following is None:
                return
            offset = following
            continue
        length = end - offset
        if trouble or not data:
            _check_packed_by_record(data, trouble)
            yield from [Cut(offset, length, data, trouble)] if data or trouble else []
        else:
            for cut in _plain(_Window(io.BytesIO(data)), 0, max_bytes):
                yield cut._replace(offset=offset, length=length)
        offset = end


def _inflated(window: _Window, offset: int, limit: int) -> tuple[bytes, int, str]:
    """A gzip member unpacked up to `limit` bytes, where it ends, and what is wrong with it."""
    unpacker = zlib.decompressobj(31)
    parts: list[bytes] = []
    size, place, trouble = 0, offset, ""
    while not unpacker.eof:
        chunk = unpacker.unconsumed_tail
        if not chunk:
            chunk = window.read(place, _CHUNK)
            place += len(chunk)
        if not chunk:
            return b"".join(parts), place, "truncated"
        try:
            part = unpacker.decompress(chunk, _SEARCH)
        except zlib.error:
            return b"".join(parts), place, "damaged"
        parts.append(part[: max(0, limit - size)])
        size += len(part)
        if size > limit:
            trouble = "too_large"
    return b"".join(parts), place - len(unpacker.unused_data), trouble


def _next_member(window: _Window, offset: int) -> int | None:
    """The next gzip member that begins a record."""
    while (offset := window.find(_MAGIC, offset)) >= 0:
        try:
            if zlib.decompressobj(31).decompress(window.read(offset, 1 << 10), 16).startswith(_BEGINS):
                return offset
        except zlib.error:
            pass
        offset += 1
    return None


def _check_packed_by_record(data: bytes, trouble: str) -> None:
    head = _END_OF_HEAD.search(data[:_MAX_HEAD])
    length = _LENGTH.search(data, 0, head.end()) if head else None
    if trouble == "too_large" and head and length and head.end() + int(length[1]) + 4 < len(data):
        raise DataError("it is packed as a whole, not record by record: unpack it, or run `warcio recompress` on it.")


def _plain(window: _Window, offset: int, max_bytes: int) -> Iterator[Cut]:
    while head := window.read(offset, _MAX_HEAD):
        blank = len(head) - len(head.lstrip(b"\r\n"))
        if blank:
            offset += blank
            continue
        cut = _plain_record(window, offset, head, max_bytes)
        if cut.trouble == "damaged":
            following = window.find(_BEGINS, offset + 1)
            cut = cut._replace(length=(following if following >= 0 else offset + len(head)) - offset)
            yield cut
            if following < 0:
                return
        else:
            yield cut
        offset += cut.length


def _plain_record(window: _Window, offset: int, head: bytes, max_bytes: int) -> Cut:
    end = _END_OF_HEAD.search(head)
    length = _LENGTH.search(head, 0, end.end()) if end else None
    if not head.startswith(_BEGINS) or not end or not length:
        cut_off = _BEGINS.startswith(head[: len(_BEGINS)]) and not end and len(head) < _MAX_HEAD
        return Cut(offset, len(head), head[:_CHUNK], "truncated" if cut_off else "damaged")
    whole = end.end() + int(length[1])
    if int(length[1]) > max_bytes:
        ends = window.read(offset + whole, 4)
        trouble = "too_large" if ends.strip(b"\r\n") == b"" and ends else "damaged"
        return Cut(offset, whole, head[: end.end()], trouble)
    data = window.read(offset, whole + 4)
    if len(data) < whole:  # cut off, or its length is wrong if another record follows
        return Cut(offset, len(data), data, "damaged" if b"\n\r\n" + _BEGINS in data else "truncated")
    if data[whole:].strip(b"\r\n"):
        return Cut(offset, whole, data, "damaged")  # not at the end of a record: its length is wrong
    return Cut(offset, len(data), data)
