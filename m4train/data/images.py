"""Stored images: their size without decoding, and the decoded upright picture."""

from __future__ import annotations

import io
import warnings

from PIL import Image, ImageOps

from m4train.errors import BadSample

_ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 lay the picture on its side


def image_size(data: bytes, name: str) -> tuple[int, int]:
    """Width and height of the upright image, from its header. Raises BadSample `unreadable_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                sideways = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
                return (image.height, image.width) if sideways else (image.width, image.height)
    except Exception as error:
        raise BadSample(
            "unreadable_image", f"image {name!r} ({len(data)} bytes) has no readable header: {error}"
        ) from None


def decode_image(data: bytes, what: str) -> Image.Image:
    """The image upright in RGB, all of it. Raises BadSample `unreadable_image` for broken, cut or oversized ones."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise BadSample("unreadable_image", f"{what} ({len(data)} bytes) cannot be decoded: {error}") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Transparency is laid on white, as a page would show it."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image.convert("RGB")
