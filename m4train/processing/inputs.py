"""Images as callers give them: paths, bytes, Pillow images, arrays, tensors, alone or in lists."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from m4train.processing.images import decode_image


def is_image(value: Any) -> bool:
    """Whether `value` is one image rather than a collection of images."""
    return isinstance(value, (Image.Image, str, bytes, os.PathLike)) or (
        hasattr(value, "ndim") and value.ndim in (2, 3)
    )


def nest_images(images: Any) -> list[list[Any]]:
    """Images as one list per sample: one image or a flat list is one sample. Raises ValueError for anything else."""
    if is_image(images):
        return [[images]]
    if hasattr(images, "ndim") and images.ndim == 4:
        return [list(images)]
    if isinstance(images, (list, tuple)):
        if images and all(is_image(image) for image in images):
            return [list(images)]
        if all(isinstance(sample, (list, tuple)) and all(map(is_image, sample)) for sample in images):
            return [list(sample) for sample in images]
    raise ValueError(
        f"Images of type {type(images).__name__} are not understood: give an image, a list, or a list per sample."
    )


def read_image(image: Any) -> Image.Image:
    """One image as a Pillow image; files are decoded, rotated as their EXIF data say, and laid on white.

    Arrays and tensors are (H, W), (H, W, C) or (C, H, W), uint8 or floating point in [0, 1]. Raises BadSample for a file
    that cannot be decoded and ValueError for an array that is no image.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, (str, bytes, os.PathLike)):
        return decode_image(image)
    return _from_array(np.asarray(image))


def _from_array(array: np.ndarray) -> Image.Image:
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[-1] not in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"An array of shape {array.shape} is no image: use (H, W), (H, W, C) or (C, H, W).")
    if np.issubdtype(array.dtype, np.floating):
        if array.size and (array.min() < 0 or array.max() > 1):
            raise ValueError("An image of floating-point values must lie in [0, 1]: rescale it, or give uint8.")
        array = np.round(array * 255)
    return Image.fromarray(np.ascontiguousarray(array.astype(np.uint8)))
