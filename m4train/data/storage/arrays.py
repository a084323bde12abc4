"""One file that holds a few named numpy arrays and a JSON header, and is used by mapping it into memory.

Layout: 8 bytes of magic, the header's length as uint64, the header (JSON: `meta` and each array's type, shape and
offset), then the arrays, each aligned to 64 bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m4train.errors import StaleIndexError

_MAGIC = b"M4ARRAY1"
_ALIGN = 64


def smallest(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same integers, none of them negative, each array in the smallest unsigned type that holds them."""
    return {name: array.astype(np.min_scalar_type(int(array.max(initial=0)))) for name, array in arrays.items()}


def write_arrays(path: Path, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Writes `path` aside, syncs and renames it: readers see the old file or the whole new one."""
    layout, offset = {}, 0
    for name, array in arrays.items():
        layout[name] = {"dtype": array.dtype.str, "shape": list(array.shape), "offset": offset}
        offset += -(-array.nbytes // _ALIGN) * _ALIGN
    header = json.dumps({"meta": meta, "arrays": layout, "bytes": offset}).encode()
    header += b" " * (-(len(header) + 16) % _ALIGN)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(_MAGIC + len(header).to_bytes(8, "little") + header)
            for array in arrays.values():
                file.write(np.ascontiguousarray(array).tobytes())
                file.write(b"\0" * (-array.nbytes % _ALIGN))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The JSON `meta` and the read-only mapped arrays of a file made by `write_arrays`.

    Raises FileNotFoundError, or StaleIndexError for a file that is damaged or of another version.
    """
    with open(path, "rb") as file:
        start = file.read(16)
        size = os.fstat(file.fileno()).st_size
        if start[:8] != _MAGIC:
            raise StaleIndexError(f"{path} is not an index of this version: delete it or run `m4train data index`.")
        base = 16 + int.from_bytes(start[8:], "little")
        try:
            header = json.loads(file.read(base - 16)) if base <= size else None
            if not isinstance(header, dict) or base + header["bytes"] != size or not isinstance(header["meta"], dict):
                raise ValueError(f"{size} bytes")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            arrays = {name: _mapped(mapped, base, entry) for name, entry in header["arrays"].items()}
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise StaleIndexError(f"{path} is damaged ({error}): delete it or run `m4train data index`.") from error
    return header["meta"], arrays


def _mapped(mapped: mmap.mmap, base: int, entry: dict[str, Any]) -> np.ndarray:
    """One array, where its line of the header says; numbers alone, so that nothing in it stands for an object."""
    shape, dtype = [int(size) for size in entry["shape"]], np.dtype(entry["dtype"])
    if min(shape, default=0) < 0 or int(entry["offset"]) < 0 or dtype.hasobject:
        raise ValueError(f"{entry}")
    return np.frombuffer(mapped, dtype, math.prod(shape), base + int(entry["offset"])).reshape(shape)
