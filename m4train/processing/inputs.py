"""Images as callers give them: paths, URLs, bytes, Pillow images, arrays, tensors, alone or in lists."""

from __future__ import annotations

import base64
import os
from typing import Any
from urllib.parse import urlparse

import numpy as np
from PIL import Image

from m4train.downloads import DownloadError, fetch
from m4train.errors import BadSample
from m4train.processing.images import MAX_PIXELS, check_size, decode_image, upright
from m4train.processing.levels import levels

URL_TIMEOUT = 30  # seconds, for all of a download
MAX_DOWNLOAD = 100 << 20  # bytes of an image file


def is_image(value: Any) -> bool:
    """Whether `value` is one image rather than a collection of images."""
    return isinstance(value, (Image.Image, str, bytes, os.PathLike)) or (
        hasattr(value, "ndim") and value.ndim in (2, 3)
    )


def is_url(text: str) -> bool:
    """Whether a string is a URL and nothing else."""
    if " " in text:
        return False
    parsed = urlparse(text)
    return bool(parsed.scheme and parsed.netloc)


def is_fractions(image: Any) -> bool:
    """Whether an image is an array or tensor of floating-point values none of which exceeds 1."""
    floating = hasattr(image, "dtype") and "float" in str(image.dtype) and 0 not in image.shape
    return floating and bool(image.max() <= 1)


def nest_images(images: Any) -> list[list[Any]]:
    """Images as one list per sample: one image or a flat list is one sample. Raises ValueError for anything else."""
    if is_image(images):
        return [[images]]
    if hasattr(images, "ndim") and images.ndim == 4:
        return [list(images)]
    if isinstance(images, (list, tuple)):
        if images and all(is_image(image) for image in images):
            return [list(images)]
        if all(_is_sample(sample) for sample in images):
            return [list(sample) for sample in images]
    raise ValueError(
        f"Images of type {type(images).__name__} are not understood: give an image, a list, or a list per sample."
    )


def _is_sample(value: Any) -> bool:
    """Whether `value` holds several images: a list of them, or an array with one dimension more."""
    return getattr(value, "ndim", 0) == 4 or (isinstance(value, (list, tuple)) and all(map(is_image, value)))


def from_base64(text: str) -> bytes:
    """The bytes of an image file in base64, with or without "data:image/...;base64," before. Raises BadSample."""
    try:
        return base64.b64decode("".join(text.rpartition(",")[2].split()), validate=True)
    except ValueError as error:
        raise BadSample("unreadable_image", f"{text[:40]!r} is not an image in base64: {error}.") from error


def read_image(image: Any, upstream: bool = False, channels: str | None = None) -> Image.Image:
    """One image as a Pillow image, upright as its EXIF data say.

    Files, URLs and data URLs are decoded to RGB and laid on white. Arrays and tensors are (H, W), (H, W, C) or (C, H,
    W) of levels from 0 to 255, whatever their type, of 16-bit integers, which they are taken for if one exceeds 255, or
    of floating-point values in [0, 1], if none exceeds 1; `channels` ("channels_first", "channels_last") decides if the
    shape does not. `upstream`: see ImageProcessor. Raises BadSample for a file that cannot be read or is too large, and
    ValueError for an array that is not an image.
    """
    if isinstance(image, Image.Image):
        check_size(image, MAX_PIXELS)
        return image if upstream else upright(image)
    if isinstance(image, str) and image[:5].lower() == "data:":
        image = from_base64(image)
    if isinstance(image, str) and is_url(image):
        return decode_image(_download(image), as_pillow=upstream)
    if isinstance(image, (str, bytes, os.PathLike)):
        return decode_image(image, as_pillow=upstream)
    if hasattr(image, "detach"):  # a torch tensor, on any device
        image = image.detach().cpu()
    return _from_array(np.asarray(image), channels)


def _download(url: str) -> bytes:
    try:
        return fetch(url, MAX_DOWNLOAD, URL_TIMEOUT)
    except DownloadError as error:
        raise BadSample("unreachable_image", f"The image at {url} cannot be downloaded: {error}") from error


def _from_array(array: np.ndarray, channels: str | None) -> Image.Image:
    """If both ends could be channels the first is, as in transformers."""
    if array.ndim == 3:
        first = array.shape[0] in (1, 3, 4) if channels is None else str(channels).lower().endswith("first")
        array = np.moveaxis(array, 0, -1) if first else array
        array = array[..., 0] if array.shape[-1] == 1 else array
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"An array of shape {array.shape} is not an image: use (H, W), (H, W, C) or (C, H, W).")
    return Image.fromarray(np.ascontiguousarray(levels(array)))
