"""MinHash signatures of texts in bands: two texts that share most of their shingles very likely share a band.

With 14 bands of 8 hashes, texts of similarity 0.7 share one with a chance of 0.56, of 0.8 with 0.92, of 0.9 with 0.999, of
0.5 with 0.05 (1 - (1 - s^8)^14).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xxhash

_MIX = np.uint64(0x94D049BB133111EB)


class MinHash:
    """Bands of texts, of `bands` times `rows` hashes over shingles of `shingle` words."""

    def __init__(self, bands: int = 14, rows: int = 8, shingle: int = 5, seed: int = 1) -> None:
        self.bands, self.rows, self.shingle = bands, rows, shingle
        rng = np.random.default_rng(seed)
        drawn = rng.integers(0, np.iinfo(np.uint64).max, (bands * rows, 2), np.uint64)
        self._terms, self._factors = drawn[:, 0], drawn[:, 1] | np.uint64(1)

    def shingles(self, words: Sequence[str]) -> np.ndarray:
        """(S,) hashes of all runs of `shingle` words, each once; of a shorter text that of all its words."""
        if not words:
            return np.empty(0, np.uint64)
        size = min(self.shingle, len(words))
        runs = {" ".join(words[start : start + size]) for start in range(len(words) - size + 1)}
        return np.array(
            sorted(xxhash.xxh3_64_intdigest(run.encode("utf-8", "surrogatepass")) for run in runs), np.uint64
        )

    def keys(self, words: Sequence[str]) -> list[int]:
        """A key of 64 bits for each band; none of a text without words."""
        shingles = self.shingles(words)
        if not len(shingles):
            return []
        signature = np.empty(len(self._factors), np.uint64)
        for number, (factor, term) in enumerate(zip(self._factors, self._terms)):
            mixed = (shingles ^ term) * factor  # of 64 bits, the overflow is meant
            mixed = (
                mixed ^ (mixed >> np.uint64(32))
            ) * _MIX  # without this the order of shingles is nearly that of others
            signature[number] = (mixed ^ (mixed >> np.uint64(29))).min()
        rows = signature.reshape(self.bands, self.rows)
        return [xxhash.xxh3_64_intdigest(row.tobytes(), seed=band) for band, row in enumerate(rows)]
