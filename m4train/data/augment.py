"""Random changes of decoded images, the same for a sample and epoch wherever and whenever it is read."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from m4train.config import AugmentConfig


def draw_key(config: AugmentConfig, seed: int, epoch: int, source: str, key: str) -> bytes:
    """Names the random draws of one sample in one epoch; empty where nothing is drawn."""
    if not config.shift_pixels:
        return b""
    described = f"{seed} {epoch} {source} {key} shift={config.shift_pixels}"
    return hashlib.blake2b(described.encode(), digest_size=16).digest()


def augment(image: Image.Image, config: AugmentConfig, draws: bytes, number: int) -> Image.Image:
    """Image `number` of the sample whose `draw_key` is `draws`, translated; its size does not change."""
    if not config.shift_pixels:
        return image
    raw = hashlib.blake2b(draws + number.to_bytes(4, "little"), digest_size=16).digest()
    span = 2 * config.shift_pixels + 1
    right = int.from_bytes(raw[:8], "little") % span - config.shift_pixels
    down = int.from_bytes(raw[8:], "little") % span - config.shift_pixels
    return shift(image, right, down)


def shift(image: Image.Image, right: int, down: int) -> Image.Image:
    """The image moved by whole pixels; what comes in from outside repeats the edge."""
    pixels = np.asarray(image)
    rows = np.clip(np.arange(pixels.shape[0]) - down, 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(pixels.shape[1]) - right, 0, pixels.shape[1] - 1)
    return Image.fromarray(pixels[rows][:, columns])
