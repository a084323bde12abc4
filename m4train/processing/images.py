"""Reading images: one decoder for training and inference, and what every image processor shares."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from m4train.errors import BadSample
from m4train.processing.levels import eight_bits, is_deep
from m4train.processing.png import png_damage

# Of every picture that Pillow opens, by the type it is registered for; what it only identifies or plays is none.
PICTURE_EXTENSIONS = frozenset(
    [
        ".apng",
        ".avif",
        ".avifs",
        ".bmp",
        ".bw",
        ".cur",
        ".dcx",
        ".dds",
        ".dib",
        ".fit",
        ".fits",
        ".flc",
        ".fli",
        ".ftc",
        ".ftu",
        ".gbr",
        ".gif",
        ".icb",
        ".icns",
        ".ico",
        ".im",
        ".j2c",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpc",
        ".jpe",
        ".jpeg",
        ".jpf",
        ".jpg",
        ".jpx",
        ".mpo",
        ".msp",
        ".pbm",
        ".pcd",
        ".pcx",
        ".pfm",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".psd",
        ".pxr",
        ".qoi",
        ".ras",
        ".rgb",
        ".rgba",
        ".sgi",
        ".tga",
        ".tif",
        ".tiff",
        ".vda",
        ".vst",
        ".webp",
        ".xbm",
        ".xpm",
        ".blp",
        ".pict",
        ".spi",
    ]
)
MAX_PIXELS = 89_478_485  # a quarter of a gigabyte of RGB, and where Pillow itself begins to warn
_SEVERAL = ("GIF", "TIFF", "WEBP", "PNG", "AVIF")  # formats whose further frames are pictures of their own
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LINKED_SIDE = 320  # pixels of the longer side of an image that a page holds
_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that exchange width and height
_EXIF = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where an image may say its orientation


@dataclass(frozen=True)
class ImageInfo:
    """Format ("JPEG", "PNG", ...) and size in pixels, as seen after the EXIF rotation."""

    format: str
    width: int
    height: int


def read_image_info(source: bytes | str | os.PathLike, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Format and oriented size of an image file, from its header alone. Raises BadSample like `decode_image`."""
    if isinstance(source, bytes):
        _refuse_damage(source, source)
    with _open(source, max_pixels) as image:
        width, height = image.size
        if _lies_sideways(image, source):
            width, height = height, width
        return ImageInfo(image.format or "", width, height)


def frames_in(data: bytes) -> int:
    """How many pictures an animation or a file of several pages holds, of which the first is read; 1 for anything else.

    The small pictures that cameras keep next to a photo, sizes of an icon and layers are no further pictures.
    """
    moving = (data[:4] == b"RIFF" and b"ANIM" in data[:64]) or (data[:4] == b"\x89PNG" and b"acTL" in data[:4096])
    if not (
        moving
        or data[:3] == b"GIF"
        or data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
        or data[4:12] == b"ftypavis"
    ):
        return 1
    try:
        with _open(data, MAX_PIXELS) as image:
            return int(getattr(image, "n_frames", 1)) if image.format in _SEVERAL else 1
    except BadSample:
        return 1


def _lies_sideways(image: Image.Image, source: bytes | str | os.PathLike) -> bool:
    """Whether decoding exchanges width and height. Of a TIFF Pillow gives the size after its rotation."""
    return image.format != "TIFF" and _may_be_rotated(image, source) and _orientation(image) in _SIDEWAYS


def _may_be_rotated(image: Image.Image, source: bytes | str | os.PathLike) -> bool:
    """Whether to ask for the orientation. Of a PNG Pillow tells it only after decoding, so its bytes are searched first."""
    if image.format != "PNG":
        return True
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    return any(mark in data for mark in (b"eXIf", b"exif", b"adobe.xmp"))


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1, as it is, if the data say nothing or are damaged."""
    try:
        return image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1


def decode_image(
    source: bytes | str | os.PathLike,
    max_pixels: int = MAX_PIXELS,
    as_pillow: bool = False,
    image_range: Sequence[float] = (),
) -> Image.Image:
    """An image file as upright RGB: EXIF rotation applied, transparency laid on white, more than 8 bits brought to 8 by
    `image_range` or as `levels` says; with `as_pillow` as Pillow alone converts it, as transformers does.

    Raises BadSample with reason "unreadable_image", "unknown_range", or "image_too_large" above `max_pixels` (before
    anything is decoded).
    """
    with _open(source, max_pixels) as image:
        return _decoded(image, source, as_pillow, image_range)


def decode_scaled(
    data: bytes, least: tuple[int, int] | None, max_pixels: int = MAX_PIXELS, image_range: Sequence[float] = ()
) -> tuple[Image.Image, tuple[int, int]]:
    """An image as `decode_image` gives it, and its full size. A JPEG is decoded at 1/2, 1/4 or 1/8 of it if both sides stay
    at least `least` (width, height); its pixels then differ a little from those of the whole image made smaller."""
    with _open(data, max_pixels) as image:
        sideways = _lies_sideways(image, data)
        size = image.size[::-1] if sideways else image.size
        if least is not None:
            image.draft(None, least[::-1] if sideways else least)
        return _decoded(image, data, False, image_range), size


def _decoded(
    image: Image.Image, source: bytes | str | os.PathLike, as_pillow: bool, image_range: Sequence[float]
) -> Image.Image:
    try:
        if image.format == "PNG":
            _refuse_damage(source if isinstance(source, bytes) else Path(source).read_bytes(), source)
        image.load()
        return upright(image.convert("RGB") if as_pillow else to_rgb(image, image_range), _orientation(image))
    except BadSample as error:
        named = error.detail if error.detail.startswith(_name(source)) else f"{_name(source)}: {error.detail}"
        raise BadSample(error.reason, named) from None
    except Exception as error:
        raise BadSample("unreadable_image", f"{_name(source)} cannot be decoded: {error}") from error


def check_size(image: Image.Image, max_pixels: int = MAX_PIXELS, name: str = "an image") -> None:
    """Raises BadSample "image_too_large" for an image above the limit, which may not be decoded yet, and "unreadable_image" for
    one without a pixel."""
    if not image.width or not image.height:
        raise BadSample(
            "unreadable_image", f"{name} has {image.width}x{image.height} pixels, so that there is nothing in it."
        )
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        raise BadSample("image_too_large", f"{name} has {size} pixels, above the limit of {max_pixels}.")


def upright(image: Image.Image, orientation: int | None = None) -> Image.Image:
    """The image as its EXIF orientation, or the one given, says it should be looked at.

    What was turned is without EXIF data: some cannot be written back, and nothing reads them later.
    """
    turn = _TURNS.get(_orientation(image) if orientation is None else orientation)
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in _EXIF:
        turned.info.pop(name, None)
    return turned


def to_rgb(image: Image.Image, image_range: Sequence[float] = ()) -> Image.Image:
    """The image in RGB; what is transparent shows white. More than 8 bits become 8 by `image_range` or as `levels` says.

    Raises BadSample "unknown_range" if the range of its values is neither known nor given.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    image = _eight_bits(image, image_range)
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image, image_range: Sequence[float]) -> Image.Image:
    if not is_deep(image):
        return image
    try:
        return eight_bits(image, image_range)
    except ValueError as error:
        raise BadSample("unknown_range", str(error)) from None


def pixel_table(
    mean: list[float] | None, std: list[float] | None, rescale_factor: float | None = 1 / 255
) -> np.ndarray:
    """The value (3, 256) float32 that each uint8 level of each channel has after rescaling and normalising.

    The steps round as the reference does: the product in float64, cast to float32, then (x - mean) / std in float32.
    `rescale_factor` None leaves levels as they are; `mean` None leaves values unnormalised.
    """
    levels = np.arange(256, dtype=np.float64)
    values = (levels if rescale_factor is None else levels * rescale_factor).astype(np.float32)
    table = np.repeat(values[None], 3, axis=0)
    if mean is None or std is None:
        return table
    return (table - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]


def fused_pixel_table(mean: list[float] | None, std: list[float] | None, rescale_factor: float) -> np.ndarray:
    """As `pixel_table`, (3, 256) float32, rounded as transformers' torchvision backend does: it scales mean and deviation, not
    the levels."""
    levels = np.repeat(np.arange(256, dtype=np.float32)[None], 3, axis=0)
    if mean is None or std is None:
        return levels * np.float32(rescale_factor)
    scale = np.float32(1.0 / rescale_factor)
    return (levels - (np.asarray(mean, np.float32) * scale)[:, None]) / (np.asarray(std, np.float32) * scale)[:, None]


def normalize_into(frame: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Writes a frame (3, H, W) uint8, looked up in a table (3, 256), to `out` (3, H, W) float32."""
    for channel in range(3):
        np.take(table[channel], frame[channel], out=out[channel], mode="clip")  # clip: no check, no buffer


def _refuse_damage(data: bytes, source: bytes | str | os.PathLike) -> None:
    damage = png_damage(data)
    if damage is not None:
        raise BadSample("unreadable_image", f"{_name(source)} is a damaged PNG: {damage}")


def _open(source: bytes | str | os.PathLike, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except Image.DecompressionBombError as error:
        raise BadSample("image_too_large", f"{_name(source)}: {error}") from error
    except UnidentifiedImageError as error:
        raise BadSample("unreadable_image", f"{_name(source)} is not an image of a kind that is known") from error
    except Exception as error:
        raise BadSample("unreadable_image", f"{_name(source)} is not an image: {error}") from error
    try:
        check_size(image, max_pixels, _name(source))
    except BadSample:
        image.close()
        raise
    return image


def _name(source: bytes | str | os.PathLike) -> str:
    return f"an image of {len(source)} bytes" if isinstance(source, bytes) else str(source)


def data_uri(image: Image.Image, side: int = _LINKED_SIDE, kind: str = "PNG") -> str:
    """An image, made small if a side is longer than `side` pixels, as a link that holds it, as PNG or JPEG."""
    small = to_rgb(image).copy()
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, kind)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode()
