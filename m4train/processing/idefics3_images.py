"""The image processor of Idefics3 and SmolVLM: an image becomes square tiles and a small view of the whole."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

from m4train.processing.features import Features
from m4train.processing.image_processor import ImageProcessor, checked_size, square_side
from m4train.processing.resampling import Canvas
from m4train.processing.settings import in_documented_order

MAX_SIDE = 4096  # no image is resized beyond this, whatever the settings ask for
MEAN = STD = [0.5, 0.5, 0.5]


class Idefics3ImageProcessor(ImageProcessor):
    """Resizes the longest side to `size`, then cuts the image into tiles of `max_image_size`, with a view of the whole last.

    Without splitting an image is one frame. Every frame is square, with sides of `max_image_size["longest_edge"]`.
    """

    documented_order = (
        "do_convert_rgb", "do_resize", "size", "resample", "do_image_splitting", "do_rescale", "max_image_size",
        "rescale_factor", "do_normalize", "image_mean", "image_std", "do_pad", "return_tensors", "return_row_col_info",
        "data_format", "input_data_format",
    )  # fmt: skip

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: dict[str, int] | int | None = None,
        resample: int = Image.Resampling.LANCZOS,
        do_image_splitting: bool = True,
        max_image_size: dict[str, int] | int | None = None,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_pad: bool = True,
        **extra: Any,
    ) -> None:
        self.do_resize = do_resize
        size = {"longest_edge": size or 4 * 364} if size is None or isinstance(size, int) else size
        self.size = checked_size("size", size, ("longest_edge",), ("height", "width"))
        self.do_image_splitting = do_image_splitting
        self.max_image_size = {"longest_edge": _frame_side(364 if max_image_size is None else max_image_size)}
        self.do_pad = do_pad
        mean = MEAN if image_mean is None else image_mean
        std = STD if image_std is None else image_std
        super().__init__(do_convert_rgb, resample, do_rescale, rescale_factor, do_normalize, mean, std, extra)

    @property
    def frame_size(self) -> int:
        """Side of every frame, in pixels."""
        return self.max_image_size["longest_edge"]

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of the tiles of an image of this size; (0, 0) if it is one frame."""
        if not self.do_image_splitting:
            return 0, 0
        side = self.frame_size
        width, height = self._tiled_size(*self._resized(width, height))
        return (height // side, width // side) if max(width, height) > side else (0, 0)

    def get_number_of_image_patches(
        self, height: int, width: int, images_kwargs: dict[str, Any] | None = None
    ) -> tuple[int, int, int]:
        """How many frames an image of this size becomes, and the rows and columns of its tiles, with the settings of
        `images_kwargs`; three zeros if it is one frame, as in transformers."""
        rows, columns = self.replace(**(images_kwargs or {})).grid(width, height)
        return (rows * columns + 1 if rows else 0), rows, columns

    @property
    def fixed_size(self) -> bool:
        return self.do_resize

    @property
    def most_detail(self) -> int:
        """Tiles along the longest side."""
        longest = self.size.get("longest_edge") if self.do_resize and self.do_image_splitting else None
        return 1 if longest is None else math.ceil(min(longest, MAX_SIDE) / self.frame_size)

    def natural_detail(self, width: int, height: int) -> int:
        return min(self.most_detail, math.ceil(max(width, height) / self.frame_size))

    def detail_settings(self, detail: int) -> dict[str, Any]:
        return {"size": {"longest_edge": detail * self.frame_size}}

    def frame_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        rows, columns = self.grid(width, height)
        return [(self.frame_size, self.frame_size)] * (rows * columns + 1)

    def needed_size(self, width: int, height: int) -> tuple[int, int] | None:
        return self._resized(width, height) if self.do_resize else None

    def frames(self, image: Image.Image, size: tuple[int, int] | None = None) -> np.ndarray:
        """The frames (n, 3, S, S) uint8 of an image: tiles in reading order, and the whole image last."""
        whole = self._canvas(image)
        side = self.frame_size
        if self.do_resize:
            whole = whole.resized(self._resized(*(size or whole.size)))
        if not self.do_image_splitting:
            return _tiles(whole.resized((side, side)), side, 1)
        whole = whole.resized(self._tiled_size(*whole.size))
        width, height = whole.size
        if max(width, height) <= side:
            return _tiles(whole, side, 1)
        count = (width // side) * (height // side)
        frames = _tiles(whole, side, count + 1)
        frames[count] = whole.resized((side, side)).planes()
        return frames

    @in_documented_order
    def preprocess(
        self,
        images: Any,
        *,
        return_tensors: str | None = None,
        return_row_col_info: bool = False,
        data_format: str | None = None,
        input_data_format: str | None = None,
        **settings: Any,
    ) -> Features:
        """As for every image processor; with `return_row_col_info`, `rows` and `cols` list the grid of each image."""
        processor = self.for_values_of(images, **settings)
        samples = processor.read_samples(images, input_data_format)
        features = processor.features(samples, return_tensors, data_format)
        if return_row_col_info:
            grids = [[processor.grid(*image.size) for image in sample] for sample in samples]
            features["rows"] = [[rows for rows, _ in sample] for sample in grids]
            features["cols"] = [[columns for _, columns in sample] for sample in grids]
        return features

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        """Size after the first step: the longest side set (up or down), the other one even."""
        if not self.do_resize:
            return width, height
        if "longest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        ratio, longest = width / height, self.size["longest_edge"]
        if width >= height:
            width, height = longest, max(_even(int(longest / ratio)), 1)
        else:
            width, height = max(_even(int(longest * ratio)), 1), longest
        ratio = width / height
        if width >= height and width > MAX_SIDE:
            width, height = MAX_SIDE, max(int(MAX_SIDE / ratio), 1)
        elif height > width and height > MAX_SIDE:
            width, height = max(int(MAX_SIDE * ratio), 1), MAX_SIDE
        return width, height

    def _tiled_size(self, width: int, height: int) -> tuple[int, int]:
        """Size after the second step: both sides the next multiples of the tile."""
        side, ratio = self.frame_size, width / height
        if width >= height:
            width = math.ceil(width / side) * side
            return width, math.ceil(int(width / ratio) / side) * side
        height = math.ceil(height / side) * side
        return math.ceil(int(height * ratio) / side) * side, height


def _tiles(whole: Canvas, side: int, count: int) -> np.ndarray:
    """Room for `count` frames (count, 3, side, side) uint8, with the tiles of the image in the first of them.

    The sides of the image are multiples of `side`.
    """
    columns, rows = (length // side for length in whole.size)
    frames = np.empty((count, 3, side, side), np.uint8)
    tiles = frames[: rows * columns].reshape(rows, columns, 3, side, side)
    for channel, plane in enumerate(whole.planes()):  # whole rows of a plane are copied at once
        tiles[:, :, channel] = plane.reshape(rows, side, columns, side).transpose(0, 2, 1, 3)
    return frames


def _even(n: int) -> int:
    return n + n % 2


def _frame_side(size: dict[str, int] | int) -> int:
    """The side of a frame, given as a number, as its longest edge, or as equal height and width."""
    if isinstance(size, dict) and size.get("longest_edge") is not None:
        return size["longest_edge"]
    return square_side("max_image_size", size)


class SmolVLMImageProcessor(Idefics3ImageProcessor):
    """The image processor of SmolVLM: the same computation under the name its folders carry."""
