"""Perceptual hashes of pictures: 64 bits that hardly change when a picture is scaled or stored again."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

_SIDE, _KEPT = 32, 8
_FLAT = 3.0  # of 255: deviation of the grey values


@lru_cache(1)
def _cosines() -> np.ndarray:
    """(8, 32) the lowest rows of the discrete cosine transform."""
    place = np.arange(_SIDE)
    return np.cos(np.pi / _SIDE * np.outer(np.arange(_KEPT), place + 0.5))


def perceptual_hash(image: Image.Image) -> int:
    """pHash: which of the lowest 8 x 8 frequencies of the grey picture, at 32 x 32, are above their median."""
    grey = np.asarray(image.convert("L").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), np.float64)
    low = _cosines() @ grey @ _cosines().T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes(), "big")


def distance(first: np.ndarray | int, second: np.ndarray | int) -> np.ndarray:
    """(...,) in how many of their 64 bits hashes differ."""
    differing = np.bitwise_xor(np.asarray(first, np.uint64), np.asarray(second, np.uint64))
    return np.bitwise_count(differing)


def is_flat(image: Image.Image) -> bool:
    """Whether a picture is of nearly one grey: its hash is then that of its noise, and says nothing."""
    return float(np.asarray(image.convert("L"), np.float32).std()) < _FLAT
