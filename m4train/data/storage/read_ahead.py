"""What will be needed of an object store, fetched while whoever needs it works on something else."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

Range = tuple[str, int, int]  # path, first byte, number of bytes
Part = tuple[str, int, bytes]  # path, first byte, bytes
_MAX_GAP = 512 << 10  # bytes between two remote ranges that are cheaper to fetch than another request


def inside(wanted: Range, path: str, start: int, size: int) -> bool:
    """Whether a range lies in the `size` bytes of `path` from `start` on."""
    return wanted[0] == path and start <= wanted[1] and wanted[1] + wanted[2] <= start + size


def merged(ranges: Sequence[Range], gap: int = _MAX_GAP) -> list[Range]:
    """The ranges by path and offset, those that overlap or are within `gap` bytes of each other as one."""
    found: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for path, start, size in sorted(ranges):
        runs = found[path]
        if runs and start <= runs[-1][1] + gap:
            runs[-1] = runs[-1][0], max(runs[-1][1], start + size)
        else:
            runs.append((start, start + size))
    return [(path, start, end - start) for path, runs in found.items() for start, end in runs]


@dataclass(frozen=True)
class _Coming:
    """What somebody will want, and the ranges that are being fetched for it: what was on its way already is not among them."""

    wanted: Sequence[Range]
    ranges: Sequence[Range]
    future: Future[list[bytes]]


class ReadAhead:
    """Fetches in the background, each in a thread of its own, in the order in which they were begun."""

    def __init__(self) -> None:
        self._coming: list[_Coming] = []

    def begin(self, wanted: Sequence[Range], fetch: Callable[[Sequence[Range]], list[bytes]]) -> None:
        """Begins to `fetch` what of these ranges is not on its way."""
        ranges = merged([part for part in wanted if not self._covers(part)])
        future: Future[list[bytes]] = Future()
        self._coming.append(_Coming(wanted, ranges, future))

        def run() -> None:
            try:
                future.set_result(fetch(ranges))
            except BaseException as error:
                future.set_exception(error)

        if ranges:
            threading.Thread(target=run, name="m4train-read-ahead", daemon=True).start()
        else:
            future.set_result([])

    def _covers(self, wanted: Range) -> bool:
        return any(inside(wanted, *found) for coming in self._coming for found in coming.ranges)

    def wants(self, path: str, start: int, size: int) -> bool:
        """Whether something that was begun and not taken yet wants a part of these bytes."""
        return any(inside(part, path, start, size) for coming in self._coming for part in coming.wanted)

    def take(self, wanted: Sequence[Range]) -> list[Part]:
        """What came of the fetch that was begun for `wanted`, or else of those in which one of `wanted` lies, waited for; raises
        what they raised. Those that were begun before them are given up, for nobody has asked for them in their turn."""
        chosen = [number for number, coming in enumerate(self._coming) if coming.wanted == wanted][:1] or [
            number
            for number, coming in enumerate(self._coming)
            if any(inside(each, *found) for found in coming.ranges for each in wanted)
        ]
        if not chosen:
            return []
        taken = [self._coming[number] for number in chosen]
        self._coming = self._coming[chosen[-1] + 1 :]
        return [
            (path, start, data)
            for coming in taken
            for (path, start, _), data in zip(coming.ranges, coming.future.result())
        ]
