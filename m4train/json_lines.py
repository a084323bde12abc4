"""Files of one JSON object a line that a run appends to. A kill may leave the last line unfinished, a power cut any of them
damaged: such lines are passed over by who reads, and taken out by who goes on writing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

OF_A_STEP = ("step",)


def read_lines(path: Path, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of the good lines; none if there is no file. A good line is finished, and an object with the keys `needs`,
    of which `step` is a whole number."""
    return [found for _, found in _lines(path, needs) if found is not None]


def lines_past(path: Path, step: int) -> bytes:
    """The good lines of steps after `step`, as they are stored."""
    return b"".join(line for line, found in _lines(path, OF_A_STEP) if found is not None and found["step"] > step)


def keep_lines(
    path: Path, step: int | None = None, needs: Sequence[str] = OF_A_STEP, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Takes out an unfinished last line, damaged lines, and lines past `step`; returns what is left.

    Says a sentence if lines were damaged. The file is replaced at once, so a kill loses nothing.
    """
    lines = list(_lines(path, needs))
    kept = [(line, found) for line, found in lines if found is not None and (step is None or found["step"] <= step)]
    damaged = [line for line, found in lines if found is None and (line.endswith(b"\n") or b"\0" in line)]
    if damaged:
        say(f"{path} had {len(damaged)} damaged lines, which were taken out; those around them are kept.")
    text = b"".join(line for line, _ in kept)
    if path.exists() and path.stat().st_size != len(text):
        aside = path.with_name(f"{path.name}.{os.getpid()}.writing")
        aside.write_bytes(text)
        os.replace(aside, path)
    return [found for _, found in kept]


def _lines(path: Path, needs: Sequence[str]) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Every line as it is stored, with its object, or None if it is not good."""
    for line in path.read_bytes().splitlines(keepends=True) if path.is_file() else []:
        try:
            found = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError):
            found = None
        yield line, found if isinstance(found, dict) and _has(found, needs) else None


def _has(found: dict[str, Any], needs: Sequence[str]) -> bool:
    return all(type(found.get(key)) is int if key == "step" else found.get(key) is not None for key in needs)
