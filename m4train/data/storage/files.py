"""Where shards are stored: local paths and anything fsspec opens (http, s3 ...), read by byte ranges.

Short lapses of the storage are waited out; what keeps failing ends the run, for that is not a fault of the sample.
"""

from __future__ import annotations

import glob
import io
import os
import resource
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, BinaryIO

from m4train.data.storage.block_cache import BlockCache
from m4train.data.storage.hub_cache import HUB, cached_files, hub_files, is_offline
from m4train.data.storage.packed import Unpacked, is_packed
from m4train.data.storage.read_ahead import Range, ReadAhead, inside, merged
from m4train.data.storage.remote_stream import RemoteStream
from m4train.errors import ConfigError, DataError

READ_ATTEMPTS = 8
FIRST_PAUSE = 0.1  # seconds before the second attempt; doubles each time, so that lapses of 12 seconds are waited out
_OPEN_FILES = 64  # at most, and an eighth of what the process may open
_WINDOWS = 4  # stretches of a file that are kept when reading runs ahead
_WINDOWED_FILES = 16
_BUFFER = 1 << 20
_STATS_AT_ONCE = 32
_VERSION_FIELDS = (
    "ETag",
    "etag",
    "LastModified",
    "Last-Modified",
    "md5Hash",
    "checksum",
    "blob_id",
    "updated",
    "mtime",
    "created",
)

_FINAL = (PermissionError, ValueError, TypeError, NotImplementedError)  # answers of a store that stay the same


class UnreachableError(DataError):
    """A file that its storage says is not there, or may not be read: asking again does not help."""


def is_remote(path: str) -> bool:
    """Whether fsspec reads this path, and not the operating system."""
    return "://" in path


def is_there(path: str) -> bool:
    """Whether a local file or folder has this very name, whatever it would mean as a pattern."""
    return not is_remote(path) and os.path.exists(os.path.expanduser(path))


def find_files(pattern: str) -> list[str]:
    """The files a path without braces names, sorted if it is a glob. An object store's single name is not looked up."""
    if pattern.startswith(HUB):
        return cached_files(pattern) if is_offline() else hub_files(pattern, *_filesystem(pattern), _patiently)
    if is_remote(pattern):
        if not set("*[") & set(pattern):  # `?` begins the query of a URL
            return [pattern]
        filesystem, place = _filesystem(pattern)
        filesystem.invalidate_cache()
        return sorted(filesystem.unstrip_protocol(path) for path in _patiently(pattern, lambda: filesystem.glob(place)))
    there, pattern = is_there(pattern), os.path.expanduser(pattern)
    if set("*?[") & set(pattern) and not there:
        return sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    return [pattern] if os.path.isfile(pattern) else []


def stamp(path: str) -> list[Any]:
    """Size in bytes, and what changes with the content: a modification time, or the store's own version.

    Raises DataError if there is no such file.
    """
    try:
        if is_remote(path):
            return _remote_stamp(path)
        status = os.stat(path)
    except FileNotFoundError:
        raise DataError(f"There is no shard {path}: write it first or correct the source's path.") from None
    return [status.st_size, status.st_mtime_ns]


def _remote_stamp(path: str) -> list[Any]:
    filesystem, place = _filesystem(path)
    filesystem.invalidate_cache()
    info = _patiently(path, lambda: filesystem.info(place))
    if info.get("size") is None:
        raise DataError(f"{path} is served without its size, so that it cannot be indexed: stream it instead.")
    return [int(info["size"]), next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), "")]


def stamps(paths: Sequence[str]) -> dict[str, list[Any]]:
    """The stamp of each path; those of object stores are asked for side by side. Raises as `stamp`."""
    if not any(map(is_remote, paths)):
        return {path: stamp(path) for path in paths}
    with ThreadPoolExecutor(_STATS_AT_ONCE) as pool:
        return dict(zip(paths, pool.map(stamp, paths)))


class FileReader:
    """Reads byte ranges. Each process that unpickles one opens its own files and connections.

    `cache` keeps local blocks of what comes from object stores. With `read_ahead` a remote read fetches at least so many
    bytes, for reading a file from one end to the other. `reads` counts the requests made.
    """

    def __init__(self, cache: BlockCache | None = None, read_ahead: int = 0) -> None:
        self._made_from = (cache, read_ahead)
        self._cache, self._read_ahead = cache, read_ahead
        self._open: OrderedDict[str, int] = OrderedDict()
        weakref.finalize(self, _close, self._open).atexit = False  # then the system closes them
        self._held: dict[str, list[tuple[int, bytes]]] = {}  # path -> (first byte, bytes) fetched before
        self._stamps: dict[str, list[Any]] = {}
        self._packed = Unpacked()
        self._ahead = ReadAhead()
        self._counting = Lock()
        self.reads = 0

    def know(self, path: str, stamp: list[Any]) -> None:
        """Says what the stamp of a file is, so that its store need not be asked."""
        self._stamps.setdefault(path, stamp)

    def size(self, path: str) -> int:
        """Bytes of a file, unpacked if it is packed, which is taken not to change. Raises FileNotFoundError."""
        if is_packed(path):
            return len(self._unpacked(path))
        if is_remote(path):
            return int(self._stamp(path)[0])
        if not os.path.isfile(path):
            raise FileNotFoundError(path)
        return os.path.getsize(path)

    def read(self, path: str, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`, fewer only if the file ends. Raises DataError when the storage keeps failing."""
        if is_packed(path):
            try:
                return self._unpacked(path)[offset : offset + size]
            except FileNotFoundError:
                raise _gone(path) from None
        if not is_remote(path):
            return _patiently(path, lambda: self._pread(path, offset, size), lambda: self._forget(path))
        try:
            size = max(0, min(size, self.size(path) - offset))
        except FileNotFoundError:
            raise _gone(path) from None
        for start, data in self._held.get(path, ()):
            if start <= offset and offset + size <= start + len(data):
                return data[offset - start : offset - start + size]
        [data] = self._fetch([(path, offset, max(size, min(self._read_ahead, self.size(path) - offset)))])
        if self._read_ahead:
            self._held[path] = [*self._held.pop(path, [])[1 - _WINDOWS :], (offset, data)]
            if len(self._held) > _WINDOWED_FILES:
                del self._held[next(iter(self._held))]
        return data[:size]

    def _unpacked(self, path: str) -> bytes:
        return self._packed.get(path, lambda: self.whole(path))

    def whole(self, path: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError as soon as it is not there or may not be read; otherwise as `read`."""
        try:
            if not is_remote(path):
                return self._whole(path)
            return self._fetch([(path, 0, int(self._stamp(path)[0]))])[0]
        except UnreachableError as error:
            raise FileNotFoundError(str(error)) from None

    def _whole(self, path: str) -> bytes:
        def read() -> bytes | None:
            if not os.path.isfile(path):  # nor if it is a folder, or no name for a file at all
                return None
            try:
                with open(path, "rb") as file:
                    return file.read()
            except (FileNotFoundError, PermissionError):
                return None

        self.reads += 1
        data = _patiently(path, read)
        if data is None:
            raise FileNotFoundError(path)
        return data

    def expect(self, ranges: Iterable[Range]) -> None:
        """Says what is read next: remote ranges are fetched together, neighbours as one, and held until the next call, or
        until what is read ahead has had them, too."""
        wanted = [part for part in ranges if is_remote(part[0]) and not is_packed(part[0])]
        came = self._ahead.take(wanted)
        held = [(path, start, data) for path, parts in self._held.items() for start, data in parts]
        self._held = {}
        for path, start, data in (*held, *came):
            place = path, start, len(data)
            if any(inside(each, *place) for each in wanted) or self._ahead.wants(*place):
                self._held.setdefault(path, []).append((start, data))
        missing = merged([part for part in wanted if not self.holds(part)])
        for (path, start, _), data in zip(missing, self._fetch(missing)):
            self._held.setdefault(path, []).append((start, data))

    def prefetch(self, ranges: Iterable[Range]) -> None:
        """Begins to fetch, in the background, remote ranges that a later call of `expect` names."""
        wanted = [part for part in ranges if is_remote(part[0]) and not is_packed(part[0])]
        if wanted:
            self._ahead.begin(wanted, self._fetch)

    def holds(self, wanted: Range) -> bool:
        """Whether a remote range was fetched before and is still held."""
        return any(inside(wanted, wanted[0], start, len(data)) for start, data in self._held.get(wanted[0], ()))

    def open(self, path: str) -> BinaryIO:
        """The file as a seekable stream, unpacked if it is packed. Raises FileNotFoundError."""
        if is_packed(path):
            return io.BytesIO(self._unpacked(path))
        if not is_remote(path):
            return open(path, "rb")
        return io.BufferedReader(RemoteStream(self, path), _BUFFER)

    def _stamp(self, path: str) -> list[Any]:
        if path not in self._stamps:
            self._stamps[path] = _remote_stamp(path)
        return self._stamps[path]

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes]:
        """Remote ranges, through the cache if there is one."""
        if self._cache is None:
            return self._request(ranges)
        cache = self._cache
        blocks: dict[tuple[str, int], bytes] = {}
        names: dict[tuple[str, int], str] = {}
        missing: list[Range] = []
        for path, start, size in ranges:
            for number in range(start // cache.block, -(-(start + size) // cache.block)):
                names[path, number] = cache.name(path, self._stamp(path), number)
                found = cache.get(names[path, number])
                if found is None:
                    missing.append((path, number * cache.block, cache.block))
                else:
                    blocks[path, number] = found
        runs = [(path, start, min(size, self.size(path) - start)) for path, start, size in merged(missing, gap=0)]
        for (path, start, _), data in zip(runs, self._request(runs)):
            for place in range(0, len(data), cache.block):
                block = path, (start + place) // cache.block
                blocks[block] = data[place : place + cache.block]
                cache.put(names[block], blocks[block])
        found_ranges = []
        for path, start, size in ranges:
            first = start // cache.block
            joined = b"".join(blocks[path, n] for n in range(first, -(-(start + size) // cache.block)))
            found_ranges.append(joined[start - first * cache.block :][:size])
        return found_ranges

    def _request(self, ranges: Sequence[Range]) -> list[bytes]:
        """Remote ranges from the store, side by side; those that fail are asked for again."""
        found: dict[int, bytes] = {}
        pause = FIRST_PAUSE
        for attempt in range(1, READ_ATTEMPTS + 1):
            left = [number for number in range(len(ranges)) if number not in found]
            answers = self._ask([ranges[number] for number in left])
            found |= {number: answer for number, answer in zip(left, answers) if isinstance(answer, bytes)}
            failed = [(number, answer) for number, answer in zip(left, answers) if number not in found]
            if not failed:
                break
            for number, answer in failed:
                if _is_missing(answer):
                    raise _gone(ranges[number][0])
                if isinstance(answer, _FINAL):
                    raise UnreachableError(f"{ranges[number][0]} cannot be read: {answer}.")
            if attempt == READ_ATTEMPTS:
                raise _gave_up(ranges[failed[0][0]][0], failed[0][1])
            time.sleep(pause)
            pause *= 2
        return [found[number] for number in range(len(ranges))]

    def _ask(self, ranges: Sequence[Range]) -> list[Any]:
        """The bytes of each range, or the exception that came instead."""
        answers: list[Any] = [None] * len(ranges)
        stores: dict[int, tuple[Any, list[int]]] = {}
        for number, (path, _, _) in enumerate(ranges):
            filesystem = _filesystem(path)[0]
            stores.setdefault(id(filesystem), (filesystem, []))[1].append(number)
        for filesystem, numbers in stores.values():
            places = [_filesystem(ranges[n][0])[1] for n in numbers]
            starts, ends = ([ranges[n][1] for n in numbers], [ranges[n][1] + ranges[n][2] for n in numbers])
            with self._counting:
                self.reads += len(numbers)
            try:
                parts = filesystem.cat_ranges(places, starts, ends, on_error="return")
            except Exception as error:
                parts = [error] * len(numbers)
            for number, part in zip(numbers, parts):
                answers[number] = _whole(part, ranges[number])
        return answers

    def _pread(self, path: str, offset: int, size: int) -> bytes:
        descriptor = self._open.get(path)
        if descriptor is None:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open[path] = descriptor
            if len(self._open) > min(_OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8):
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

    def __reduce__(self) -> tuple[Any, ...]:
        return (FileReader, self._made_from)


def _close(opened: dict[str, int]) -> None:
    while opened:
        os.close(opened.popitem()[1])


def _filesystem(path: str) -> tuple[Any, str]:
    """fsspec's filesystem of a URL (one per process and setting), and the path as it wants it."""
    import fsspec.core

    try:
        return fsspec.core.url_to_fs(path)
    except Exception as error:  # filesystems raise what they like for a URL that they cannot use
        raise ConfigError(
            f"{path} cannot be opened ({error}): install what fsspec needs for it, such as the extra m4train[remote]."
        ) from error


def _patiently(path: str, action: Any, between: Any = None) -> Any:
    """What `action` returns, tried again after a pause while the storage fails. Raises DataError, FileNotFoundError.

    Local files that are not there are waited for, too: a network folder may come back.
    """
    pause = FIRST_PAUSE
    for attempt in range(1, READ_ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if is_remote(path) and _is_missing(error):
                raise FileNotFoundError(path) from error
            if is_remote(path) and isinstance(error, _FINAL):
                raise UnreachableError(f"{path} cannot be read: {error}.") from error
            if not is_remote(path) and not isinstance(error, OSError):
                raise
            if between is not None:
                between()
            if attempt == READ_ATTEMPTS:
                raise _gave_up(path, error) from error
        time.sleep(pause)
        pause *= 2
    raise AssertionError("unreachable")


def _is_missing(error: Exception) -> bool:
    """Whether the store says that there is no such file; fsspec says so of servers that fail, too."""
    status = getattr(error.__cause__, "status", 404)
    return isinstance(error, FileNotFoundError) and status in (404, 410)


def _gone(path: str) -> UnreachableError:
    return UnreachableError(f"{path} was there when it was indexed and is gone: restore it, or index the rest.")


def _gave_up(path: str, error: Any) -> DataError:
    return DataError(
        f"Reading {path} failed {READ_ATTEMPTS} times ({type(error).__name__}: {error}): check the storage; "
        "the run continues from its last checkpoint when started again."
    )


def _whole(part: Any, wanted: Range) -> Any:
    """What a store answered, or an exception if that is not the range."""
    path, _, size = wanted
    if not isinstance(part, bytes) or len(part) == size:
        return part
    if len(part) > size:
        return OSError(f"the server of {path} answers a range request with {len(part)} bytes instead of {size}")
    return OSError(f"{len(part)} bytes came of {size}")
