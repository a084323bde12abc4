"""Walking a tar file by its 512-byte headers, and going on behind damage instead of giving up.

The stdlib reader builds an object per member and stops at the first fault; this one yields byte ranges and reports each
fault once, with its place. Formats: ustar, GNU long names, pax.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK = 512
_ZERO = bytes(BLOCK)
_FILE_TYPES = b"0\x007"
_SEARCH = 1 << 20


@dataclass(frozen=True)
class TarMember:
    """A regular file inside a tar: its bytes are at `offset` and `size` long."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarDamage:
    """Bytes that are no tar member: from `offset` to where the next readable header was found, or the end."""

    offset: int
    detail: str


def walk_tar(path: str) -> Iterator[TarMember | TarDamage]:
    """Every regular member and every damaged stretch of a tar file, in stored order; reads headers only."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        position, long_name = 0, None
        while True:
            file.seek(position)
            block = file.read(BLOCK)
            if block == _ZERO:
                end = _next_header(file, position + BLOCK, size)
                if end is not None or _has_data(file, position):
                    yield TarDamage(position, f"zeros at byte {position} and then more data")
                if end is None:
                    return
                position, long_name = end, None
                continue
            if not block:
                yield TarDamage(position, f"the file ends at byte {position} without the end-of-archive mark")
                return
            header = _parse_header(block)
            if header is None:
                yield TarDamage(position, f"no valid tar header at byte {position} of {size}")
                following = _next_header(file, position + BLOCK, size)
                if following is None:
                    return
                position, long_name = following, None
                continue
            name, length, kind = header
            data = position + BLOCK
            if data + length > size:
                yield TarDamage(
                    position, f"member {long_name or name!r} needs {data + length} bytes but the file has {size}"
                )
                following = _next_header(file, data, size)
                if following is None:
                    return
                position, long_name = following, None
                continue
            if kind in b"Lx":
                file.seek(data)
                long_name = _long_name(file.read(length), kind) or long_name
            else:
                if kind in _FILE_TYPES:
                    yield TarMember(long_name or name, data, length)
                long_name = None if kind != b"g" else long_name
            position = data + -(-length // BLOCK) * BLOCK


def _parse_header(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and type of a header block, or None where the checksum is wrong."""
    if len(block) < BLOCK:
        return None
    try:
        stored = int(block[148:156].split(b"\0")[0].strip() or b"-1", 8)
        if stored != sum(block[:148]) + sum(block[156:]) + 256:
            return None
        field = block[124:136]
        size = int.from_bytes(field[1:], "big") if field[0] & 0x80 else int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        return None
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace"), size, block[156:157]


def _long_name(data: bytes, kind: bytes) -> str | None:
    if kind == b"L":
        return data.rstrip(b"\0").decode("utf-8", "backslashreplace")
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or int(length) == 0:
            return None
        record = data[len(length) + 1 : int(length)].rstrip(b"\n")
        if record.startswith(b"path="):
            return record[5:].decode("utf-8", "backslashreplace")
        data = data[int(length) :]
    return None


def _next_header(file: BinaryIO, position: int, size: int) -> int | None:
    """The first place on the 512-byte grid from `position` on that holds a valid ustar header."""
    while position < size:
        file.seek(position)
        chunk = file.read(_SEARCH)
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257
            if start >= 0 and start % BLOCK == 0 and _parse_header(chunk[start : start + BLOCK]) is not None:
                return position + start
            found = chunk.find(b"ustar", found + 1)
        position += len(chunk)
    return None


def _has_data(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    while chunk := file.read(_SEARCH):
        if chunk.count(0) != len(chunk):
            return True
    return False
