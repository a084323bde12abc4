"""Walking a tar file by its 512-byte headers, and going on behind damage instead of giving up.

The stdlib reader builds an object per member and stops at the first fault; this one yields byte ranges and reports each
fault once, with its place. Formats: ustar, GNU long names, pax.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from m4train.data.storage.files import FileReader

BLOCK = 512
_ZERO = bytes(BLOCK)
_FILE_TYPES = b"0\x007"
_SEARCH = 1 << 20  # bytes read at once when looking for the next header; the first look takes less
_FIRST_SEARCH = 1 << 13
_MOST_NAME = 1 << 20  # bytes of a long name or of pax records: real ones take some hundred
_MOST_DAMAGE = 1000  # damaged places in one file, after which the rest of it counts as damaged
_RECORD = 20 * BLOCK  # archives of other tools are filled up with zeros to a multiple of this
_END = 2 * BLOCK  # zeros that end an archive

_JUNK = frozenset((".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"))
_JUNK_FOLDERS = frozenset(("__macosx", ".ipynb_checkpoints", "@eadir", ".appledouble", ".trashes", ".spotlight-v100"))

_OCTAL = re.compile(rb"[0-7]*")
_DECIMAL = re.compile(rb"[0-9]{1,18}")
_PAX = re.compile(rb"([1-9][0-9]{0,7}) ([^=\n]+)=")

Read = Callable[[int, int], bytes]  # offset and size -> bytes


@dataclass(frozen=True)
class TarMember:
    """A regular file inside a tar: its bytes are at `offset` and `size` long."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class TarDamage:
    """Bytes that are not a tar member: from `offset` to where the next readable header was found, or the end."""

    offset: int
    detail: str


def is_junk(name: str) -> bool:
    """Whether a file is one that desktops leave among the files of their users: nobody's sample, whatever it is named like."""
    *folders, last = name.lower().split("/")
    return last.startswith("._") or last in _JUNK or not _JUNK_FOLDERS.isdisjoint(folders)


def walk_tar(files: FileReader, path: str) -> Iterator[TarMember | TarDamage]:
    """Every regular member and every damaged stretch of a tar file, in stored order; reads headers only.

    A file cannot make this take longer than some passes over it: see `_MOST_DAMAGE` and `_MOST_NAME`.
    """
    damaged = 0
    for entry in _walk(files, path):
        yield entry
        damaged += isinstance(entry, TarDamage)
        if damaged == _MOST_DAMAGE:
            yield TarDamage(entry.offset + 1, f"more than {damaged} damaged places: the rest of the file is not read")
            return


def _walk(files: FileReader, path: str) -> Iterator[TarMember | TarDamage]:
    size = files.size(path)

    def read(offset: int, length: int) -> bytes:
        return files.read(path, offset, length)

    position, long_name, real_size = 0, None, None
    while True:
        block = read(position, BLOCK)
        if block == _ZERO or not block:
            following = _next_header(read, position + BLOCK, size)
            detail = _wrong_end(read, position, size) if following is None else "zeros and then more data"
            if detail is not None:
                yield TarDamage(position, f"{detail} at byte {position} of {size}")
            if following is None:
                return
            position, long_name, real_size = following, None, None
            continue
        header = _parse_header(block)
        if header is None:
            yield TarDamage(position, f"no valid tar header at byte {position} of {size}")
            following = _next_header(read, position + BLOCK, size)
            if following is None:
                return
            position, long_name, real_size = following, None, None
            continue
        name, length, kind = header
        length = length if real_size is None or kind in b"Lxg" else real_size
        data = position + BLOCK
        wrong = None
        if data + length > size:
            wrong = f"member {long_name or name!r} needs {data + length} bytes but the file has {size}"
        elif kind in b"Lx" and length > _MOST_NAME:
            wrong = f"the name of a member takes {length} bytes, which no name does, at byte {position}"
        if wrong is not None:
            yield TarDamage(position, wrong)
            following = _next_header(read, data, size)
            if following is None:
                return
            position, long_name, real_size = following, None, None
            continue
        if kind == b"L":
            long_name = _text(read(data, length).rstrip(b"\0"))
        elif kind == b"x":
            try:
                long_name, real_size = _pax(read(data, length))
            except ValueError as error:
                yield TarDamage(position, f"pax records that cannot be read ({error}) at byte {position}")
        elif kind != b"g":
            if kind in _FILE_TYPES and not is_junk(long_name or name):
                yield TarMember(long_name or name, data, length)
            long_name = real_size = None
        position = data + -(-length // BLOCK) * BLOCK


def _wrong_end(read: Read, position: int, size: int) -> str | None:
    """What is wrong with the zeros from `position` on, with which an archive ends; None if they are as they should be.

    Zeros over the last samples would look like the end of a shorter shard, but leave too many of them: `ShardWriter` ends
    shards with two blocks and never on a multiple of the record size, other tools fill up to that multiple.
    """
    if position >= size:
        return "the file ends without the end-of-archive mark"
    if _has_data(read, position, size):
        return "zeros and then more data"
    allowed = _END + (_RECORD - BLOCK if size % _RECORD == 0 else BLOCK)
    return f"{size - position} zeros, more than end an archive," if size - position > allowed else None


def _parse_header(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, size and type of a header block, or None if the checksum is wrong."""
    if len(block) < BLOCK:
        return None
    try:
        stored = int(block[148:156].split(b"\0")[0].strip() or b"-1", 8)
        if stored != sum(block[:148]) + sum(block[156:]) + 256:
            return None
    except ValueError:
        return None
    size = _number(block[124:136])
    if size is None:
        return None
    name = block[:100].split(b"\0")[0]
    prefix = block[345:500].split(b"\0")[0] if block[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name), size, block[156:157]


def _number(field: bytes) -> int | None:
    """The value of a size field, octal or (of large files) base 256; None if it is neither, or negative."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else None
    digits = field.split(b"\0")[0].strip()
    return int(digits or b"0", 8) if _OCTAL.fullmatch(digits) else None


def _text(data: bytes) -> str:
    return data.decode("utf-8", "backslashreplace")


def _pax(data: bytes) -> tuple[str | None, int | None]:
    """Name and size that pax records "LENGTH KEY=VALUE\\n" give to the next member. Raises ValueError for other bytes."""
    name, size, place = None, None, 0
    while place < len(data) and data[place]:
        match = _PAX.match(data, place)
        end = place + int(match[1]) if match else place
        if match is None or not match.end() <= end <= len(data) or data[end - 1 : end] != b"\n":
            raise ValueError(f"at byte {place} of them")
        value = data[match.end() : end - 1]
        if match[2] == b"path":
            name = _text(value)
        elif match[2] == b"size":
            if not _DECIMAL.fullmatch(value):
                raise ValueError("their size is not a number")
            size = int(value)
        place = end
    return name, size


def _next_header(read: Read, position: int, size: int) -> int | None:
    """The first place on the 512-byte grid from `position` on that holds a valid ustar header."""
    step = _FIRST_SEARCH
    while position < size:
        chunk, step = read(position, step), min(2 * step, _SEARCH)
        found = chunk.find(b"ustar")
        while found >= 0:
            start = found - 257
            if start >= 0 and start % BLOCK == 0 and _parse_header(chunk[start : start + BLOCK]) is not None:
                return position + start
            found = chunk.find(b"ustar", found + 1)
        position += len(chunk)
    return None


def _has_data(read: Read, position: int, size: int) -> bool:
    while position < size:
        chunk = read(position, _SEARCH)
        if chunk.count(0) != len(chunk):
            return True
        position += len(chunk)
    return False
