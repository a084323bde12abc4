"""What planning asks of every sample of a source with many shards, in one mapped file, made from the indexes of its shards.

The shards' own indexes are then mapped one after the other when a sample of them is read, so that neither open files nor
mappings grow with the number of shards.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m4train.data.index.shard_index import VERSION, ShardIndex, sidecars
from m4train.data.index.tombstones import tombstones_stamp
from m4train.data.storage.arrays import read_arrays, smallest, write_arrays
from m4train.errors import StaleIndexError

_LOG = logging.getLogger(__name__)
_SAID = 10  # shards that are named for their bad samples

Stored = tuple[dict[str, Any], dict[str, np.ndarray]]


def most_mapped() -> int:
    """How many shards of a source stay mapped: two descriptors each, a small part of what a process may open."""
    return max(2, min(32, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 64))


class MappedShards(Sequence[ShardIndex]):
    """The indexes of the shards at `paths`, mapped when they are asked for. Pickled by path."""

    def __init__(
        self, paths: Sequence[str], index_dir: str | None, fingerprint: str, catalogue: Path | None = None
    ) -> None:
        self.paths, self._index_dir, self._fingerprint = tuple(paths), index_dir, fingerprint
        self._file = catalogue
        self._mapped: OrderedDict[int, ShardIndex] = OrderedDict()
        self._most = most_mapped()
        self.catalogue: Stored | None = None
        if catalogue is not None:
            self.catalogue = read_arrays(catalogue)
        elif len(self.paths) > self._most:
            self.catalogue = gathered(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return (MappedShards, (self.paths, self._index_dir, self._fingerprint, self._file))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        if number in self._mapped:
            self._mapped.move_to_end(number)
        else:
            while len(self._mapped) >= self._most:
                self._mapped.popitem(last=False)
            self._mapped[number] = ShardIndex(self.paths[number], self._index_dir, self._fingerprint)
        return self._mapped[number]

    def __iter__(self) -> Iterator[ShardIndex]:
        return (self[number] for number in range(len(self)))


def gathered(shards: Sequence[ShardIndex]) -> Stored:
    """The catalogue of these shards: their `meta` together, and (N, variants) tokens and frames, (N,) images of samples."""
    digest, taken, unread = hashlib.blake2b(digest_size=8), b"", Counter[str]()
    columns: dict[str, list[np.ndarray]] = {"lengths": [], "frames": [], "images": []}
    sizes: list[int] = []
    bad: list[int] = []
    blocks: list[int] = []
    outside: list[int] = []
    said: list[str] = []  # about these shards, whenever they are opened
    unsaid: list[int] = []
    read_whole = False
    for number, shard in enumerate(shards):
        digest.update(shard.digest_line())
        taken += shard.taken_line()
        unread.update(shard.meta.get("unread", {}))
        sizes.append(len(shard))
        bad.append(len(shard.bad))
        if len(said) < _SAID:
            said += shard.said()
        else:
            unsaid.append(len(shard.unusable))
        blocks += shard.meta["blocks"] or [len(shard)]
        read_whole |= bool(shard.meta["blocks"])
        outside += [number] if shard.names_files else []
        columns["lengths"].append(_least(shard.variant_lengths))
        columns["frames"].append(_least(shard.variant_frames))
        columns["images"].append(_least(shard.image_counts()))
    arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
    counted = {"ends": np.cumsum(sizes), "bad": np.array(bad, np.int64), "block_ends": np.cumsum(blocks)}
    meta = {"version": VERSION, "digest": digest.hexdigest(), "unread": dict(unread.most_common())}
    if any(unsaid):
        said.append(f"and {sum(map(bool, unsaid))} more shards with {sum(unsaid)} samples that cannot be used")
    meta |= {"taken": taken_digest(taken), "said": said, "read_whole": read_whole, "outside": outside}
    return meta, arrays | {name: array.astype(np.int64) for name, array in counted.items()}


def taken_digest(lines: bytes) -> str:
    """Names what is taken down; empty if nothing is."""
    return hashlib.blake2b(lines, digest_size=8).hexdigest() if lines else ""


def _least(array: np.ndarray) -> np.ndarray:
    return smallest({"": array})[""]


def catalogue_path(shards: Sequence[str], index_dir: str | None, fingerprint: str, reading: Mapping[str, Any]) -> Path:
    """Where the catalogue of these shards is: with their indexes. `reading` is what else decides what they hold."""
    described = "\0".join([*shards, json.dumps(reading, sort_keys=True, default=str)])
    name = hashlib.blake2b(described.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return Path(sidecars(shards[0], index_dir, fingerprint)[0]).parent / f".{name}.{fingerprint[:12]}.catalogue"


def fresh(path: Path, now: np.ndarray) -> Stored | None:
    """The catalogue at `path`, if it was made when files were as they are `now` (S, 8), see `stamps_of`."""
    try:
        meta, arrays = read_arrays(path)
    except (OSError, StaleIndexError):
        return None
    same = meta.get("version") == VERSION and np.array_equal(arrays["stamps"], now)
    return (meta, arrays) if same else None


def stamps_of(found: Mapping[str, list[Any]], index_dir: str | None, fingerprint: str) -> np.ndarray:
    """(S, 8) size and time of every shard, whose stamps are `found`, of its two indexes, and of the tombstones next to it; zeros
    for one there is not."""
    rows = []
    for shard, (size, time) in found.items():
        row = [size, time if isinstance(time, int) else _number(str(time))]
        for sidecar in sidecars(shard, index_dir, fingerprint):
            try:
                status = os.stat(sidecar)
            except OSError:
                row += [0, 0]
            else:
                row += [status.st_size, status.st_mtime_ns]
        rows.append([*row, *tombstones_stamp(shard)])
    return np.array(rows, np.int64)


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def kept(path: Path, catalogue: Stored, stamps: np.ndarray) -> Path | None:
    """Writes a catalogue with the `stamps` (S, 8) of its files; None if it cannot be written, so that every process makes its own."""
    meta, arrays = catalogue
    try:
        write_arrays(path, meta, arrays | {"stamps": stamps})
    except OSError as error:
        _LOG.warning("%s cannot be written (%s): every process reads the indexes of all shards instead.", path, error)
        return None
    return path
