"""Reading the files that wandb writes when it is offline."""

from __future__ import annotations

import contextlib
import json
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BLOCK, _HEADER, _FIRST = 1 << 15, 7, 7  # bytes of a block, of the header of a chunk, and of that of the file


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, whose entries are messages of wandb."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, entry = path.read_bytes(), _FIRST, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        entry += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # a whole entry, or the last chunk of one
            yield Record.FromString(entry)
            entry = b""


def logged(folder: Path) -> list[dict[str, Any]]:
    """The history that the offline runs in `folder`/wandb hold, in the order of their starts."""
    found = []
    for path in offline_files(folder):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                found.append({key: json.loads(value) for key, value in items.items()})
    return found


def opened(folder: Path) -> list[Any]:
    """What each offline run in `folder`/wandb was opened with."""
    kinds = [record for path in offline_files(folder) for record in records(path)]
    return [record.run for record in kinds if record.WhichOneof("record_type") == "run"]


def offline_files(folder: Path) -> list[Path]:
    """The files of the offline runs in `folder`/wandb, once nothing writes to them any more: `finish` of wandb returns before its
    other process has written the last entries."""
    found = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    given_up = time.monotonic() + 30
    while _open_somewhere({str(path.resolve()) for path in found}) and time.monotonic() < given_up:
        time.sleep(0.02)
    return found


def _open_somewhere(paths: set[str]) -> bool:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) in paths:
                return True
    return False
