"""What a data format offers: how its shards are scanned for the index, and how one sample is read back by position.

A new format is one file beside this one with a `ShardFormat`; everything after it (index, plan, packing, loader) is the same.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import xxhash
from PIL import Image

from m4train.data.sample import Sample
from m4train.errors import DataError

READ_ATTEMPTS = 4
FIRST_PAUSE = 0.1  # seconds before the second attempt; doubles each time
_OPEN_FILES = 64


@dataclass(frozen=True)
class Member:
    """One stored part of a sample: a text (no width), or an image with the size it has when decoded upright.

    `offset`, `size` and `part` mean what the format wants them to: usually a byte range, and which of several things in it.
    """

    offset: int
    size: int
    hash: int  # of its bytes, see content_hash
    width: int = 0
    height: int = 0
    part: int = 0

    @property
    def is_image(self) -> bool:
        return self.width > 0


@dataclass(frozen=True)
class ScannedSample:
    """A sample as the scan found it: `members` are its texts and then every image in reading order, or `bad` says why not."""

    key: str
    members: tuple[Member, ...] = ()
    bad: tuple[str, str] | None = None  # reason, detail


def content_hash(data: bytes) -> int:
    """64 bits that tell stored bytes from changed ones; XXH3 costs less than copying them."""
    return xxhash.xxh3_64_intdigest(data)


class ShardFormat(Protocol):
    """How one kind of shard is read. Instances are picklable and hold no open files."""

    name: str

    def scan(self, path: str) -> Iterator[ScannedSample]:
        """Every sample of the shard in stored order, one sequential pass; damage is reported as bad samples."""

    def count(self, path: str, limit: int) -> int:
        """The number of samples, or any number above `limit` as soon as it is known to be exceeded; reads no payload."""

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        """The text of one sample. Raises BadSample."""

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        """The decoded images numbered `wanted`, upright RGB. Raises BadSample."""

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        """The images numbered `wanted` as image files, with their stored bytes wherever they are stored as files.
        Raises BadSample."""

    def blocks(self, path: str) -> list[int] | None:
        """Samples in each stretch that is read whole, where single samples cannot be read; None where they can."""


class FileReader:
    """Positional reads with a bounded number of open files; each process that unpickles one opens its own.

    A read that fails with OSError is tried again after a pause, as storage on a network has short lapses; when it keeps
    failing the run must stop, for that is not a fault of the sample.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()
        self.reads = 0

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only where the file ends. Raises DataError when the storage keeps failing."""
        pause = FIRST_PAUSE
        for attempt in range(1, READ_ATTEMPTS + 1):
            try:
                return self._pread(path, offset, size)
            except OSError as error:
                self._forget(path)
                if attempt == READ_ATTEMPTS:
                    raise DataError(
                        f"Reading {size} bytes at {offset} of {path} failed {attempt} times ({error}): "
                        "check the storage; the run continues from its last checkpoint when started again."
                    ) from error
            time.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable")

    def _pread(self, path: str, offset: int, size: int) -> bytes:
        descriptor = self._open.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open[path] = descriptor
            if len(self._open) > _OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(path)
        self.reads += 1
        data = os.pread(descriptor, size, offset)
        while len(data) < size:
            more = os.pread(descriptor, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data

    def _forget(self, path: str) -> None:
        descriptor = self._open.pop(path, None)
        if descriptor is not None:
            os.close(descriptor)

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]

    def __del__(self) -> None:
        for path in list(self._open):
            self._forget(path)
