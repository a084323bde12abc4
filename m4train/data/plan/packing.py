"""Packing: which documents share a pack, chosen from a small pool of those that come next."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

_CANDIDATES = 32  # documents looked at for one place before the best so far is taken
_FINISH = 1.0  # mean documents of room that are left for the exact finish
_BOTH_SCARCE = (
    0.8  # above this ratio of what the pool needs of one budget to what it needs of the other, it is twice as large
)
_PACKS_HELD = 1.5  # packs' worth that the pool holds at least, however short the documents are


class Unit(NamedTuple):
    """One segment to be packed: pieces `first` to `last` of a sample (0 and -1 for all), and what it takes."""

    source: int
    sample: int
    epoch: int
    first: int
    last: int
    tokens: int
    frames: int


class Packer:
    """Packs units under a budget of `tokens` and of `frames`, from a pool of about `pool` units, twice as many if both
    budgets are scarce.

    Every pack begins with the unit that has waited longest, so none waits for more packs than the pool holds. Then
    it takes the oldest units that keep the two budgets in step (so that neither runs out early if both are
    scarce), and at the end the one or two that fill what is left best. Units are never reordered otherwise, and the
    result depends on nothing but the units and their order.
    """

    def __init__(self, tokens: int, frames: int, pool: int) -> None:
        self.budgets = (tokens, frames)
        self.limit = pool
        self._pool: list[Unit] = []
        self._sums = [0, 0]

    def add(self, unit: Unit) -> list[list[Unit]]:
        """Takes one unit (which must fit an empty pack); returns the packs this completes, at most one."""
        self._pool.append(unit)
        self._sums[0] += unit.tokens
        self._sums[1] += unit.frames
        held = len(self._pool)
        if held < self.limit:
            return []
        tokens, frames = self._sums[0] / self.budgets[0], self._sums[1] / self.budgets[1]
        both_scarce = min(tokens, frames) > _BOTH_SCARCE * max(tokens, frames)
        if max(tokens, frames) < _PACKS_HELD or (both_scarce and held < 2 * self.limit):
            return []
        return [self._make()]

    def flush(self) -> list[list[Unit]]:
        """Packs what is left."""
        packs = []
        while self._pool:
            packs.append(self._make())
        return packs

    def _make(self) -> list[Unit]:
        """Takes one pack out of the pool."""
        tokens, frames = self._sums
        scarce = 0 if tokens * self.budgets[1] >= frames * self.budgets[0] else 1
        chosen, rest, room = self._begin(scarce)
        finish = _finish([self._pool[number][5:] for number in rest], room, scarce)
        chosen += [rest[number] for number in finish]
        pack = [self._pool[number] for number in chosen]
        taken = set(chosen)
        self._pool = [unit for number, unit in enumerate(self._pool) if number not in taken]
        self._sums[0] -= sum(unit.tokens for unit in pack)
        self._sums[1] -= sum(unit.frames for unit in pack)
        return pack

    def _begin(self, scarce: int) -> tuple[list[int], list[int], list[int]]:
        """Pool numbers of the first units of a pack, of all others, and the room left of each budget."""
        ample = 1 - scarce
        mean = self._sums[scarce] / len(self._pool)
        ratio = self._sums[ample] / max(1, self._sums[scarce])
        first = self._pool[0]
        chosen, rest = [0], list(range(1, len(self._pool)))
        room = [self.budgets[0] - first.tokens, self.budgets[1] - first.frames]
        while room[scarce] - mean >= _FINISH * mean:
            best, least, looked = None, 0.0, 0
            for number in rest:
                unit = self._pool[number]
                left = (room[0] - unit.tokens, room[1] - unit.frames)
                if left[0] < 0 or left[1] < 0 or left[scarce] < _FINISH * mean:
                    continue
                shortage = left[scarce] * ratio - left[ample]
                if best is None or shortage < least:
                    best, least = number, shortage
                looked += 1
                if shortage <= 0 or looked == _CANDIDATES:
                    break
            if best is None:
                break
            chosen.append(best)
            rest.remove(best)
            room = [room[0] - self._pool[best].tokens, room[1] - self._pool[best].frames]
        return chosen, rest, room

    def state(self) -> list[list[int]]:
        """The pool, as JSON."""
        return [list(unit) for unit in self._pool]

    def load_state(self, state: Sequence[Sequence[int]]) -> None:
        self._pool = [Unit(*unit) for unit in state]
        self._sums = [sum(unit.tokens for unit in self._pool), sum(unit.frames for unit in self._pool)]


def _finish(sizes: Sequence[tuple[int, int]], room: Sequence[int], scarce: int) -> tuple[int, ...]:
    """Numbers of the one or two sizes (tokens, frames) that leave least of the scarce budget, then of the other."""
    ample = 1 - scarce
    tokens, frames = room
    fitting = [
        (size[scarce], size[ample], number)
        for number, size in enumerate(sizes)
        if size[0] <= tokens and size[1] <= frames
    ]
    fitting.sort()
    scarce_sizes = [size for size, _, _ in fitting]
    chosen: tuple[int, ...] = ()
    least, least_other = room[scarce], room[ample]
    for place in range(len(fitting) - 1, -1, -1):
        size, other, number = fitting[place]
        left, other_left = room[scarce] - size, room[ample] - other
        if left < least or (left == least and other_left < least_other):
            chosen, least, least_other = (number,), left, other_left
        partner = bisect_right(scarce_sizes, left, 0, place) - 1
        for candidate in range(partner, max(-1, partner - _CANDIDATES), -1):
            size, other, second = fitting[candidate]
            if left - size > least:
                break
            if other <= other_left:
                if left - size < least or other_left - other < least_other:
                    chosen, least, least_other = (number, second), left - size, other_left - other
                break
        if least == 0 and scarce == 0:  # frames are few and meet exactly all the time: there tokens still decide
            break
    return chosen
