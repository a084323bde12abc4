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
    if config.rotate_degrees:
        image = rotate(image, config.rotate_degrees * (2 * turn / 2**64 - 1))
    if config.shift_pixels:
        span = 2 * config.shift_pixels + 1
        image = shift(image, right % span - config.shift_pixels, down % span - config.shift_pixels)
    return image


def rotate(image: Image.Image, degrees: float) -> Image.Image:
    """The image turned counter-clockwise about its centre; what comes in from outside repeats the edge."""
    width, height = image.size
    border = math.ceil((math.hypot(width, height) - min(width, height)) / 2)
    pixels = np.asarray(image)
    padded = np.pad(pixels, [(border, border)] * 2 + [(0, 0)] * (pixels.ndim - 2), mode="edge")
    turned = Image.fromarray(padded).rotate(degrees, Image.Resampling.BILINEAR)
    return turned.crop((border, border, border + width, border + height))


def shift(image: Image.Image, right: int, down: int) -> Image.Image:
    """The image moved by whole pixels; what comes in from outside repeats the edge."""
    pixels = np.asarray(image)
    rows = np.clip(np.arange(pixels.shape[0]) - down, 0, pixels.shape[0] - 1)
    columns = np.clip(np.arange(pixels.shape[1]) - right, 0, pixels.shape[1] - 1)
    return Image.fromarray(pixels[rows][:, columns])
