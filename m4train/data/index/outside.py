"""The files outside a shard that its samples depend on, such as the pictures that records name: which they are and how they were
when the shard was indexed, so that what was added, replaced or removed since is noticed."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

MOST_CHECKED = 200_000  # files of a shard that are looked at on every use; of more, `m4train data index` looks at all
_GONE = (0, 0)


def outside_stamp(path: str) -> tuple[int, int]:
    """Size, counted from 1, and time of change of a file; zeros if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return _GONE
    return status.st_size + 1, max(0, status.st_mtime_ns)


def outside_arrays(shard: str, stamps: Mapping[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """The stamps of files by path, as arrays of `SHARD.index`; what is below the shard's folder is named from there."""
    folder = os.path.join(os.path.dirname(shard), "")
    names = [path.removeprefix(folder) if folder else path for path in stamps]
    coded = [name.encode("utf-8", "surrogatepass") for name in names]
    return {
        "file_names": np.frombuffer(b"".join(coded), np.uint8),
        "file_ends": np.cumsum([len(name) for name in coded], dtype=np.int64),
        "file_stamps": np.array(list(stamps.values()), np.int64).reshape(-1, 2),
    }


def changed_outside(shard: str, arrays: Mapping[str, np.ndarray], thorough: bool) -> str | None:
    """What has changed since these arrays were written, or None. `thorough`: however many files there are."""
    if "file_names" not in arrays or (len(arrays["file_ends"]) > MOST_CHECKED and not thorough):
        return None
    names, start = arrays["file_names"].tobytes(), 0
    changed: list[str] = []
    for end, stamp in zip(arrays["file_ends"].tolist(), arrays["file_stamps"].tolist()):
        path = os.path.join(os.path.dirname(shard), names[start:end].decode("utf-8", "surrogatepass"))
        if outside_stamp(path) != tuple(stamp):
            changed.append(path)
        start = end
    if not changed:
        return None
    return f"{len(changed)} files that it names were added, replaced or removed since (first: {changed[0]})"
