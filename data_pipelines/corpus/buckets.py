"""Keys of a whole corpus, sorted and counted in buckets on disk, so that memory stays flat however large the corpus is.

`KeyWriter` cuts the keys of one rank into buckets by their first bits and writes sorted runs; `merged_groups` gives one bucket's
keys in order, a bounded part at a time; `Listed` looks keys up in the files that were made of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from data_pipelines.frame.store import aside
from m4train.errors import DataError

# A document among those of a key: the lowest `order` is preferred, then the lowest `place` (see `place_of`).
ENTRY = np.dtype([("key", "<u8"), ("order", "<i8"), ("place", "<u8")])
COUNTED = np.dtype([("key", "<u8")])
BUFFERED = 1 << 18  # keys of a kind that a rank holds before it writes a run of them
AT_ONCE = 1 << 21  # keys of a bucket that are merged at once
_RANK_BITS = 40  # documents of a rank


def key_hash(text: str | bytes) -> int:
    """64 bits of a text; of 10^9 keys about one pair is taken for the same."""
    return xxhash.xxh3_64_intdigest(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))


def place_of(rank: int, number: int) -> int:
    """Names a document by its rank and its number there."""
    return rank << _RANK_BITS | number


def places_of_rank(rank: int) -> tuple[int, int]:
    """The first place of a rank, and that of the next."""
    return rank << _RANK_BITS, (rank + 1) << _RANK_BITS


def bucket_of(keys: np.ndarray, buckets: int) -> np.ndarray:
    """(N,) which of `buckets` equal stretches of 64 bits each key is in."""
    return ((keys >> np.uint64(32)) * np.uint64(buckets) >> np.uint64(32)).astype(np.int64)


class KeyWriter:
    """Collects the keys of one rank under `folder` and writes `BBBB/RRRRR-NNN.npy`, sorted."""

    def __init__(self, folder: Path, rank: int, buckets: int, kind: np.dtype, buffered: int = BUFFERED) -> None:
        self._folder, self._rank, self._buckets, self._kind = folder, rank, buckets, kind
        self._buffered, self._runs = buffered, 0
        self._held: list[tuple[int, ...]] = []
        for left in folder.glob(f"*/{rank:05d}-*.npy"):
            left.unlink()  # of an attempt that was killed

    def add(self, *entry: int) -> None:
        self._held.append(entry)
        if len(self._held) >= self._buffered:
            self.flush()

    def flush(self) -> None:
        """Writes what is held as a run a bucket."""
        if not self._held:
            return
        entries = _in_order(np.array(self._held, self._kind))
        which = bucket_of(entries["key"], self._buckets)
        for bucket in np.unique(which).tolist():
            name = f"{bucket:04d}/{self._rank:05d}-{self._runs:03d}.npy"
            save(self._folder / name, entries[which == bucket])
        self._held, self._runs = [], self._runs + 1


def save(path: Path, array: np.ndarray) -> None:
    """Writes an array aside and renames it."""
    with aside(path) as file:
        np.save(file, array)


def merged_groups(paths: Sequence[Path], kind: np.dtype, at_once: int = AT_ONCE) -> Iterator[np.ndarray]:
    """The entries of sorted runs in order, in parts of about `at_once` that never divide the entries of one key.

    A single key with more entries than that is given whole.
    """
    runs = [np.load(path, mmap_mode="r") for path in paths]
    for path, run in zip(paths, runs):
        if run.dtype != kind:
            raise DataError(f"{path} holds keys of another version: remove the folder of its stage.")
    pending = [(0, 1 << 64)]
    while pending:
        first, end = pending.pop()
        found = [_between(run, first, end) for run in runs]
        if sum(map(len, found)) > at_once and end - first > 1:
            middle = (first + end) // 2
            pending += [(middle, end), (first, middle)]
            continue
        entries = np.concatenate(found) if found else np.empty(0, kind)
        if len(entries):
            yield _in_order(entries)


def _in_order(entries: np.ndarray) -> np.ndarray:
    names = ("place", "order", "key")  # the last counts most
    return entries[np.lexsort([entries[name] for name in names if name in (entries.dtype.names or ())])]


def _between(run: np.ndarray, first: int, end: int) -> np.ndarray:
    """The entries of a sorted run whose keys are at least `first` and below `end`."""
    keys = run["key"]
    begin = int(np.searchsorted(keys, np.uint64(first)))
    stop = len(keys) if end > np.iinfo(np.uint64).max else int(np.searchsorted(keys, np.uint64(end)))
    return run[begin:stop]


def group_starts(keys: np.ndarray) -> np.ndarray:
    """(G,) where each key of a sorted array begins."""
    return np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.empty(0, np.int64)


class Listed:
    """Sorted keys in a file a bucket, mapped: nothing of them is held."""

    def __init__(self, folder: Path, buckets: int) -> None:
        self._arrays = [np.load(folder / f"{bucket:04d}.npy", mmap_mode="r") for bucket in range(buckets)]

    def __contains__(self, key: int) -> bool:
        found = self._arrays[(key >> 32) * len(self._arrays) >> 32]
        place = int(np.searchsorted(found, np.uint64(key)))
        return place < len(found) and int(found[place]) == key


def places_listed(folder: Path, buckets: int, rank: int) -> set[int]:
    """The numbers of the documents of a rank that the files of places name."""
    first, end = places_of_rank(rank)
    numbers: set[int] = set()
    for bucket in range(buckets):
        found = np.load(folder / f"{bucket:04d}.npy", mmap_mode="r")
        begin, stop = np.searchsorted(found, np.array([first, end], np.uint64)).tolist()
        numbers.update((found[begin:stop] - np.uint64(first)).tolist())
    return numbers
