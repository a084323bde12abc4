"""Pixels of more than 8 bits, brought by their range to the 256 levels that everything else computes on: one rule for
training, processors, generation and previews.

The range is the one given, else the one of the file (16 bits: 0 to 65535, or as many bits as a TIFF says). If neither
is known, integers of which none exceeds 255 are levels; those stored in 16 or 32 bits of which none exceeds 65535 have 16
bits; floating-point values in [0, 1] are fractions, others up to 255 are levels. Anything else has no
known range and is refused.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

_BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_SIXTEEN = (0, 65535)


def is_deep(image: Image.Image) -> bool:
    """Whether an image has more than 8 bits per channel; in Pillow only grey ones do."""
    return image.mode.startswith("I") or image.mode == "F"


def eight_bits(image: Image.Image, given: Sequence[float] = ()) -> Image.Image:
    """A deep image in 256 levels of grey, with alpha if one of its values is transparent.

    `given` are the values that are black and white, the nearer of which stands for a value outside. Raises ValueError
    if no range is given or known.
    """
    values = np.asarray(image)
    grey = Image.fromarray(levels(values, given or _range_of(image)))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    return Image.merge("LA", [grey, Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))])


def levels(values: np.ndarray, known: Sequence[float] = ()) -> np.ndarray:
    """The values (...) of an image as uint8 levels (...); `known` are the values of black and white, if they are known.

    Fractions become levels as in transformers: cut off, not rounded. Raises ValueError for values without a known range.
    """
    if known:
        black, white = known
        shares = (np.nan_to_num(values.astype(np.float64), nan=np.inf) - black) / (white - black)
        if not np.isfinite(shares).all():
            raise ValueError("some values of the image are not numbers")
        return np.round(shares.clip(0, 1) * 255).astype(np.uint8)
    if values.dtype == np.uint8 or not values.size:
        return values.astype(np.uint8)
    low, high = values.min(), values.max()
    floating = np.issubdtype(values.dtype, np.floating)
    if not floating and values.dtype.itemsize in (2, 4) and low >= 0 and 255 < high <= _SIXTEEN[1]:
        return levels(values, _SIXTEEN)
    if not (low >= 0 and high <= 255):  # also if a value is NaN
        raise ValueError(
            f"The values of an image of {values.dtype} go from {low} to {high}: bring them to 0..255, or as floating point "
            "to [0, 1], or say which are black and white with the source's image_range."
        )
    if floating:
        values = (values * np.float64(255)).astype(np.float32) if high <= 1 else np.round(values)
    return values.astype(np.uint8)


def _range_of(image: Image.Image) -> Sequence[float]:
    """The values of black and white as the file tells them; nothing if it does not."""
    tags = getattr(image, "tag_v2", None)
    if image.mode == "F":
        return ()
    if tags is None:
        return _SIXTEEN if image.mode != "I" or image.format in ("PPM", "PNG") else ()  # Pillow brings these two to 16
    if image.mode == "I" and tags.get(_SAMPLE_FORMAT, (_UNSIGNED,))[0] != _UNSIGNED:
        return ()
    bits = int(tags.get(_BITS_PER_SAMPLE, (16,))[0])
    if bits > 16:
        return ()
    most = 2**bits - 1
    return (most, 0) if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO else (0, most)
