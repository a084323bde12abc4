"""What a pack costs a device: a constant, and so much for each token, squared token of segment length, and frame."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

FEWEST = 6  # micro-batches that are timed at least
_SPREAD = 0.1  # root mean square of what a fit leaves, relative to the mean: above that the times say nothing


class PackCosts(NamedTuple):
    """In tokens or in seconds: only what they are relative to each other matters."""

    pack: float
    token: float
    squared: float
    frame: float

    def of(self, tokens: int, squared: int, frames: int) -> float:
        """The cost of one pack with so many tokens, squared tokens summed over its segments, and frames."""
        return self.pack + self.token * tokens + self.squared * squared + self.frame * frames


def fit_costs(shapes: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[PackCosts, float]:
    """The costs that explain the `seconds` of micro-batches of (packs, tokens, squared, frames) best, by least squares, and the
    root mean square of what they leave, relative to the mean. No cost is negative.

    Raises ValueError, saying why, for times that no such costs explain.
    """
    given, taken = np.asarray(shapes, float), np.asarray(seconds, float)
    if len(taken) < FEWEST or len({tuple(row) for row in given}) < FEWEST:
        raise ValueError(f"fewer than {FEWEST} micro-batches of different shapes")
    if not np.isfinite(taken).all() or (taken <= 0).any():
        raise ValueError("a time is not a positive number")
    scale = np.maximum(given.max(axis=0), 1.0)
    best, least = np.zeros(4), np.inf
    for used in product((False, True), repeat=4):  # the best without a negative cost is the best of one of these
        columns = np.flatnonzero(used)
        found = np.zeros(4)
        found[columns] = np.linalg.lstsq(given[:, columns] / scale[columns], taken, rcond=1e-6)[0]
        left = float(np.square(given / scale @ found - taken).sum())
        if found.min() >= 0 and left < least:
            best, least = found, left
    spread = float(np.sqrt(least / len(taken)) / taken.mean())
    if spread > _SPREAD:
        raise ValueError(f"equal micro-batches differ by {spread:.0%}")
    if not best[1:].any():
        raise ValueError("all micro-batches take the same time")
    return PackCosts(*(float(value) for value in best / scale)), spread
