"""Random changes of decoded images, the same for a sample and epoch wherever and whenever it is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from m4train.config import AugmentConfig
from m4train.data.documents.variants import Draws

_ATTEMPTS = 10  # of a random crop


def draw_key(config: AugmentConfig, seed: int, epoch: int, source: str, key: str) -> bytes:
    """Names the random draws of one sample in one epoch; empty if nothing is drawn."""
    if not (config.shift_pixels or config.rotate_degrees or config.crop_scale):
        return b""
    described = f"{seed} {epoch} {source} {key} shift={config.shift_pixels} rotate={config.rotate_degrees}"
    if config.crop_scale:
        described += f" crop={list(config.crop_scale)} {list(config.crop_ratio)}"
    return hashlib.blake2b(described.encode(), digest_size=16).digest()


def augment(image: Image.Image, config: AugmentConfig, draws: bytes, number: int) -> Image.Image:
    """Image `number` of the sample whose `draw_key` is `draws`, turned, translated and cropped; only a crop changes its size."""
    if not draws:
        return image
    raw = hashlib.blake2b(draws + number.to_bytes(4, "little"), digest_size=24).digest()
    right, down, turn = (int.from_bytes(raw[start : start + 8], "little") for start in (0, 8, 16))
    span = 2 * config.shift_pixels + 1
    degrees = config.rotate_degrees * (2 * turn / 2**64 - 1)
    if config.shift_pixels or config.rotate_degrees:
        image = moved(image, degrees, right % span - config.shift_pixels, down % span - config.shift_pixels)
    if config.crop_scale:
        image = image.crop(crop_box(*image.size, config, Draws(draws.hex(), number, "crop")))
    return image


def crop_box(width: int, height: int, config: AugmentConfig, draws: Draws) -> tuple[int, int, int, int]:
    """Left, upper, right, lower of a random part: its share of the area from `crop_scale`, its width / height from
    `crop_ratio`; after ten that do not fit, the largest part in the middle with the nearest allowed shape, as the
    RandomResizedCrop that Idefics was trained with does it."""
    narrowest, widest = config.crop_ratio
    for _ in range(_ATTEMPTS):
        area = width * height * _between(config.crop_scale, draws)
        ratio = math.exp(_between((math.log(narrowest), math.log(widest)), draws))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, upper = int(draws.uniform() * (width - w + 1)), int(draws.uniform() * (height - h + 1))
            return left, upper, left + w, upper + h
    w, h = width, height
    if width < narrowest * height:
        h = max(1, round(width / narrowest))
    elif width > widest * height:
        w = max(1, round(height * widest))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def _between(bounds: Sequence[float], draws: Draws) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draws.uniform()


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
