"""Files compressed as a whole (.gz, .tgz, .zst), which cannot be read from the middle: unpacked once into memory if they are
small, and refused otherwise."""

from __future__ import annotations

import gzip
import io
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping

from m4train.config.packages import need
from m4train.errors import DataError

_GZIP, _ZSTD = (".gz", ".tgz"), (".zst",)
MOST_PACKED = 256 << 20  # compressed bytes of a source
_MOST_UNPACKED = 2 << 30  # bytes of one file, and of all that are held
_CHUNK = 4 << 20


def is_packed(path: str) -> bool:
    """Whether a file is compressed as a whole, by its name."""
    return path.lower().endswith((*_GZIP, *_ZSTD))


def check_packed(sizes: Mapping[str, int]) -> None:
    """Raises DataError if the packed ones of these shards, with their sizes in bytes, are too large to be unpacked in memory."""
    packed = {path: size for path, size in sizes.items() if is_packed(path)}
    if sum(packed.values()) > MOST_PACKED:
        raise _too_large(
            f"{len(packed)} shards, such as {next(iter(packed))}, hold {sum(packed.values()) >> 20} MiB",
            next(iter(packed)),
        )


def _too_large(what: str, path: str) -> DataError:
    tool = "zstd -d" if path.lower().endswith(_ZSTD) else "gunzip"
    return DataError(
        f"{what} that are compressed as a whole, of which samples cannot be read one by one (up to {MOST_PACKED >> 20} MiB of a "
        f"source are unpacked into memory): unpack them first, with {tool}, and name the unpacked files."
    )


class Unpacked:
    """The content of packed files, those used last held as long as they are not too large together."""

    def __init__(self) -> None:
        self._held: OrderedDict[str, bytes] = OrderedDict()

    def get(self, path: str, stored: Callable[[], bytes]) -> bytes:
        """The content of the file whose bytes `stored()` gives. Raises DataError if it is damaged or too large."""
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        self._held[path] = data = _unpack(path, stored())
        while len(self._held) > 1 and sum(map(len, self._held.values())) > _MOST_UNPACKED:
            self._held.popitem(last=False)
        return data


def _unpack(path: str, data: bytes) -> bytes:
    if not data:
        return b""
    parts: list[bytes] = []
    try:
        with _opened(path, data) as file:
            while chunk := file.read(_CHUNK):
                parts.append(chunk)
                if sum(map(len, parts)) > _MOST_UNPACKED:
                    raise _too_large(f"{path} holds more than {_MOST_UNPACKED >> 20} MiB of bytes", path)
    except (OSError, EOFError, zlib.error) as error:
        done = sum(map(len, parts))
        raise DataError(
            f"{path} cannot be unpacked behind byte {done} of its content ({error}): fetch it again, or unpack what there is and "
            "name that file."
        ) from None
    return b"".join(parts)


def _opened(path: str, data: bytes) -> io.BufferedIOBase:
    if path.lower().endswith(_GZIP):
        return gzip.GzipFile(fileobj=io.BytesIO(data))
    need("pyarrow", f"reading {path}")
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd")
