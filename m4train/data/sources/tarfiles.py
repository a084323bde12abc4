"""Walking a tar file by its 512-byte headers, and going on behind damage instead of giving up.

The stdlib reader builds an object per member and stops at the first fault; this one yields byte ranges and reports each
fault once, with its place. Formats: ustar, GNU long names, pax.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from m4train.data.storage.files import FileReader

BLOCK = 512
_ZERO = bytes(BLOCK)
_FILE_TYPES = b"0\x007"
_SEARCH = 1 << 20
_RECORD = 20 * BLOCK  # archives of other tools are filled up with zeros to a multiple of this
_END = 2 * BLOCK  # zeros that end an archive

_JUNK = frozenset((".ds_store", "thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"))
_JUNK_FOLDERS = frozenset(("__macosx", ".ipynb_checkpoints", "@eadir", ".appledouble", ".trashes", ".spotlight-v100"))

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
    """Every regular member and every damaged stretch of a tar file, in stored order; reads headers only."""
    size = files.size(path)

    def read(offset: int, length: int) -> bytes:
        return files.read(path, offset, length)

    position, long_name = 0, None
    while True:
        block = read(position, BLOCK)
        if block == _ZERO or not block:
            following = _next_header(read, position + BLOCK, size)
            detail = _wrong_end(read, position, size) if following is None else "zeros and then more data"
            if detail is not None:
                yield TarDamage(position, f"{detail} at byte {position} of {size}")
            if following is None:
                return
            position, long_name = following, None
            continue
        header = _parse_header(block)
        if header is None:
            yield TarDamage(position, f"no valid tar header at byte {position} of {size}")
            following = _next_header(read, position + BLOCK, size)
            if following is None:
                return
            position, long_name = following, None
            continue
        name, length, kind = header
        data = position + BLOCK
        if data + length > size:
            needs = f"member {long_name or name!r} needs {data + length} bytes but the file has {size}"
            yield TarDamage(position, needs)
            following = _next_header(read, data, size)
            if following is None:
                return
            position, long_name = following, None
            continue
        if kind in b"Lx":
            long_name = _long_name(read(data, length), kind) or long_name
        else:
            if kind in _FILE_TYPES and not is_junk(long_name or name):
                yield TarMember(long_name or name, data, length)
            long_name = None if kind != b"g" else long_name
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


def _next_header(read: Read, position: int, size: int) -> int | None:
    """The first place on the 512-byte grid from `position` on that holds a valid ustar header."""
    while position < size:
        chunk = read(position, _SEARCH)
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
