"""Local copies of blocks of remote files, in a folder that many processes share and that stays below a size."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import xxhash

from m4train.errors import DataError

_BLOCK = 4 << 20
_HASH_BYTES = 8
_OWN = re.compile(r"[0-9a-f]{32}-\d+|\.[0-9a-f]{32}-\d+\.\d+\.tmp")  # a block, and one that is being written
_ROOM = 0.9  # of the limit is left when the oldest blocks have been removed
_ABANDONED = 3600  # seconds after which an unfinished file is one of a process that died


@dataclass(frozen=True)
class BlockCache:
    """Blocks as files in `folder`, of at most `limit` bytes together: those not used for longest are removed,
    and nothing else that lies there.

    Every block carries a hash, so that a damaged one is fetched again. Files appear whole, by renaming; one lock file
    guards the sum of their sizes.
    """

    folder: str
    limit: int

    @property
    def block(self) -> int:
        """Bytes of a block; the last one of a file is shorter."""
        return max(1, min(_BLOCK, self.limit // 8))

    def name(self, path: str, stamp: list[Any], number: int) -> str:
        """The file that holds one block of one version of a remote file."""
        described = f"{path}\0{stamp}\0{self.block}".encode()
        return f"{hashlib.blake2b(described, digest_size=16).hexdigest()}-{number}"

    def get(self, name: str) -> bytes | None:
        """The bytes of a block, which is then the last used; None if it is not here whole."""
        path = os.path.join(self.folder, name)
        try:
            with open(path, "rb") as file:
                stored = file.read()
            os.utime(path)
        except OSError:
            return None
        data, expected = stored[:-_HASH_BYTES], stored[-_HASH_BYTES:]
        return data if xxhash.xxh3_64_digest(data) == expected else None

    def put(self, name: str, data: bytes) -> None:
        """Adds a block, making room for it. Raises DataError if the folder cannot be written."""
        size = len(data) + _HASH_BYTES
        temporary = os.path.join(self.folder, f".{name}.{os.getpid()}.tmp")
        try:
            os.makedirs(self.folder, exist_ok=True)
            with self._locked() as usage:
                used = int(usage.read() or 0) + size
                if used > self.limit:
                    used = self._make_room(size) + size
                with open(temporary, "wb") as file:
                    file.write(data + xxhash.xxh3_64_digest(data))
                os.replace(temporary, os.path.join(self.folder, name))
                usage.seek(0)
                usage.truncate()
                usage.write(str(used))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise DataError(
                f"The cache of remote shards cannot be written to {self.folder} ({error}): make room there, or lower "
                "data.cache_size, or set data.cache_dir to another folder."
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[Any]:
        """The file that holds the sum of all sizes, held by this process alone."""
        with open(os.path.join(self.folder, ".bytes"), "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            yield file

    def _make_room(self, size: int) -> int:
        """Removes what was not used for longest until `size` more bytes leave some room; returns the bytes that stay."""
        blocks = []
        for entry in os.scandir(self.folder):
            if not _OWN.fullmatch(entry.name):  # of somebody whose folder this is, too
                continue
            status = entry.stat()
            if not entry.name.startswith("."):
                blocks.append((status.st_mtime_ns, status.st_size, entry.path))
            elif time.time() - status.st_mtime > _ABANDONED:
                os.unlink(entry.path)
        used = sum(bytes_ for _, bytes_, _ in blocks)
        for _, bytes_, path in sorted(blocks):
            if used + size <= _ROOM * self.limit:
                break
            os.unlink(path)
            used -= bytes_
        return used
