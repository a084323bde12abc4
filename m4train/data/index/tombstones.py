"""Samples that are taken down: lines of `taken-down.tombstones` next to the shards, honoured by whoever reads them from then on.

Nothing is rewritten: a line names a shard of its folder, the key of a sample there, and why. What was planned stays planned; the
samples are left out with the reason `taken_down`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache

from filelock import FileLock

from m4train.data.storage.files import FileReader, UnreachableError, is_remote
from m4train.errors import DataError

TOMBSTONES = "taken-down.tombstones"
TAKEN_DOWN = "taken_down"  # reason of a sample that is left out


@dataclass(frozen=True)
class Tombstone:
    """One sample that is taken down: the name of its shard in the folder, its key there, why, and since when."""

    shard: str
    key: str
    why: str
    date: str


def tombstones_path(shard: str) -> str:
    """Where the tombstones of a shard are: in its folder, together with those of the others there."""
    folder, slash, _ = shard.rstrip("/").rpartition("/")
    return f"{folder}{slash}{TOMBSTONES}"


def taken_down(shard: str) -> Mapping[str, str]:
    """Why each sample of a shard is taken down, by key. Raises DataError if the file is not what it should be."""
    path = tombstones_path(shard)
    content = _remote(path) if is_remote(path) else _local(path, *tombstones_stamp(shard))
    return content.get(shard.rstrip("/").rpartition("/")[2], {})


def tombstones_stamp(shard: str) -> tuple[int, int]:
    """Two numbers that change with the tombstones next to a shard; zeros if there are none."""
    path = tombstones_path(shard)
    if is_remote(path):
        found = _remote(path)
        digest = hashlib.blake2b(repr(sorted(found.items())).encode(), digest_size=7).digest()
        return len(found), int.from_bytes(digest, "little") if found else 0
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(64)
def _local(path: str, size: int, time: int) -> dict[str, dict[str, str]]:
    if not size:
        return {}
    with open(path, "rb") as file:
        return _by_shard(path, file.read())


@lru_cache(1024)
def _remote(path: str) -> dict[str, dict[str, str]]:
    """Those of an object store, asked for once a process."""
    if not path.partition("://")[2].count("/"):
        return {}
    try:
        return _by_shard(path, FileReader().whole(path))
    except (UnreachableError, FileNotFoundError):
        return {}


def _by_shard(path: str, content: bytes) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for stone in _parsed(path, content):
        found[stone.shard][stone.key] = stone.why
    return dict(found)


def _parsed(path: str, content: bytes) -> list[Tombstone]:
    stones = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            stones.append(Tombstone(**json.loads(line)))
        except (ValueError, TypeError):
            raise DataError(
                f"Line {number} of {path} does not name a sample that is taken down: repair it, so that no such sample is used."
            ) from None
    return stones


def bury(folder: str, stones: Iterable[Tombstone]) -> int:
    """Adds tombstones to those of a local folder, all or none; returns how many were not there yet."""
    path = os.path.join(folder, TOMBSTONES)
    with FileLock(f"{path}.lock"):
        before = b""
        if os.path.exists(path):
            with open(path, "rb") as file:
                before = file.read()
        known = {(stone.shard, stone.key) for stone in _parsed(path, before)}
        added = {(stone.shard, stone.key): stone for stone in stones if (stone.shard, stone.key) not in known}
        if added:
            lines = [json.dumps(asdict(stone), ensure_ascii=False) + "\n" for _, stone in sorted(added.items())]
            unfinished = f"{path}.unfinished"
            with open(unfinished, "wb") as file:
                file.write(before + "".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
    return len(added)
