"""Random changes of decoded images, the same for a sample and epoch wherever and whenever it is read."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from PIL import Image

from m4train.config import AugmentConfig


def draw_key(config: AugmentConfig, seed: int, epoch: int, source: str, key: str) -> bytes:
    """Names the random draws of one sample in one epoch; empty where nothing is drawn."""
    if config == AugmentConfig():
        return b""
    described = f"{seed} {epoch} {source} {key} shift={config.shift_pixels} rotate={config.rotate_degrees}"
    return hashlib.blake2b(described.encode(), digest_size=16).digest()


def augment(image: Image.Image, config: AugmentConfig, draws: bytes, number: int) -> Image.Image:
    """Image `number` of the sample whose `draw_key` is `draws`, turned and translated; its size does not change."""
    if not draws:
        return image
    raw = hashlib.blake2b(draws + number.to_bytes(4, "little"), digest_size=24).digest()
    right, down, turn = (int.from_bytes(raw[start : start + 8], "little") for start in (0, 8, 16))
    span = 2 * config.shift_pixels + 1
    degrees = config.rotate_degrees * (2 * turn / 2**64 - 1)
    return moved(image, degrees, right % span - config.shift_pixels, down % span - config.shift_pixels)


def moved(image: Image.Image, degrees: float, right: int, down: int) -> Image.Image:
    """The image turned counter-clockwise about its centre, then shifted; what comes in from outside repeats the edge."""
    width, height = image.size
    border = math.ceil((math.hypot(width, height) - min(width, height)) / 2) if degrees else 0
    border += max(abs(right), abs(down)) + 1
    pixels = np.asarray(image)
    padded = np.pad(pixels, [(border, border)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge")
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = width / 2, height / 2
    inverse = (
        *(cos, -sin, x + border - cos * (x + right) + sin * (y + down)),
        *(sin, cos, y + border - sin * (x + right) - cos * (y + down)),
    )
    return Image.fromarray(padded).transform(
        (width, height), Image.Transform.AFFINE, inverse, Image.Resampling.BILINEAR
    )
