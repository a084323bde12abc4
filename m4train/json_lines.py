"""Files of one JSON object a line that a run appends to, and whose last line a kill may leave unfinished."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of the finished lines; none if there is no file."""
    return [json.loads(line) for line in _finished(path)]


def keep_lines(path: Path, step: int | None = None) -> list[dict[str, Any]]:
    """Cuts off an unfinished last line, and all from the first line past `step` on; returns what is left.

    The file is replaced at once, so a kill loses nothing.
    """
    lines = _finished(path)
    objects = [json.loads(line) for line in lines]
    past = (number for number, found in enumerate(objects) if step is not None and found["step"] > step)
    kept = next(past, len(lines))
    text = "".join(lines[:kept]).encode()
    if path.exists() and path.stat().st_size != len(text):
        aside = path.with_name(f"{path.name}.{os.getpid()}.writing")
        aside.write_bytes(text)
        os.replace(aside, path)
    return objects[:kept]


def _finished(path: Path) -> list[str]:
    data = path.read_bytes() if path.is_file() else b""
    return data[: data.rfind(b"\n") + 1].decode("utf-8").splitlines(keepends=True)
