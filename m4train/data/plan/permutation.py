"""A permutation of any number of samples that takes no memory and can be entered anywhere."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 5
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Permutation:
    """A pseudo-random order of `range(size)` that depends on `key` only.

    A Feistel network permutes the next power of four; what falls outside is sent through again until it is inside (cycle
    walking), which keeps it a permutation. It does not depend on any library's random stream, so an order written down
    in a checkpoint stays valid.
    """

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self._half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        digest = hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def take(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the elements at positions `start` to `start + count`; fewer at the end of the order."""
        values = np.arange(start, min(start + count, self.size), dtype=np.uint64)
        values = self._encrypt(values)
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        mask = (np.uint64(1) << self._half) - np.uint64(1)
        left, right = values >> self._half, values & mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << self._half) | right


class WindowOrder:
    """An order for samples that are read in blocks: blocks are shuffled, and samples within windows of `window` of them.

    `ends` are the sample numbers where blocks end. As a Permutation, it can be entered anywhere.
    """

    def __init__(self, ends: np.ndarray, window: int, key: str) -> None:
        self.size = int(ends[-1])
        self._key, self._window = key, window
        starts = np.concatenate([[0], ends[:-1]])
        blocks = Permutation(len(ends), key).take(0, len(ends))
        self._starts = starts[blocks]
        self._ends = np.cumsum((ends - starts)[blocks])  # of the shuffled blocks, as positions

    def take(self, start: int, count: int) -> np.ndarray:
        """(count,) int64: the elements at positions `start` to `start + count`; fewer at the end of a window, at least one."""
        block = int(np.searchsorted(self._ends, start, side="right"))
        first = block - block % self._window
        last = min(first + self._window, len(self._ends)) - 1
        begin = int(self._ends[first - 1]) if first else 0
        inside = Permutation(int(self._ends[last]) - begin, f"{self._key} {first}").take(start - begin, count) + begin
        blocks = np.searchsorted(self._ends, inside, side="right")
        before = np.where(blocks > 0, self._ends[blocks - 1], 0)
        return (self._starts[blocks] + inside - before).astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))
