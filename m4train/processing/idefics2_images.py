"""The image processor of Idefics2: images near their own size and shape, optionally cut in four."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from m4train.processing.features import Features
from m4train.processing.image_processor import ImageProcessor, checked_size
from m4train.processing.resampling import Canvas
from m4train.processing.settings import in_documented_order

MEAN = STD = [0.5, 0.5, 0.5]


class Idefics2ImageProcessor(ImageProcessor):
    """Shrinks the longest side to `size["longest_edge"]`, and widens sides below `size["shortest_edge"]`.

    With splitting, an image becomes its four quarters and then the whole, each resized on its own.
    """

    documented_order = (
        "do_convert_rgb", "do_resize", "size", "resample", "do_rescale", "rescale_factor", "do_normalize", "image_mean",
        "image_std", "do_pad", "do_image_splitting", "return_tensors", "input_data_format", "data_format",
    )  # fmt: skip

    def __init__(
        self,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: dict[str, int] | None = None,
        resample: int = Image.Resampling.BILINEAR,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        do_pad: bool = True,
        do_image_splitting: bool = False,
        **extra: Any,
    ) -> None:
        self.do_resize = do_resize
        size = {"shortest_edge": 378, "longest_edge": 980} if size is None else size
        self.size = checked_size("size", size, ("shortest_edge", "longest_edge"), ("height", "width"))
        self.do_pad = do_pad
        self.do_image_splitting = do_image_splitting
        mean = MEAN if image_mean is None else image_mean
        std = STD if image_std is None else image_std
        super().__init__(do_convert_rgb, resample, do_rescale, rescale_factor, do_normalize, mean, std, extra)

    @property
    def most_detail(self) -> int:
        """2 if images are cut in four."""
        return 2 if self.do_image_splitting else 1

    def natural_detail(self, width: int, height: int) -> int:
        quarter = min(width, height) // 2
        return self.most_detail if quarter >= self.size.get("shortest_edge", 0) else 1

    def detail_settings(self, detail: int) -> dict[str, Any]:
        return {"do_image_splitting": False}

    def frame_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        return [self._resized(right - left, lower - top) for left, top, right, lower in self._boxes(width, height)]

    def needed_size(self, width: int, height: int) -> tuple[int, int] | None:
        return self._resized(width, height) if self.do_resize and not self.do_image_splitting else None

    def frames(self, image: Image.Image, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """The frames (3, H, W) uint8 of an image: itself, or its quarters and itself."""
        whole = self._canvas(image)
        if size is not None:  # then there is one frame: see needed_size
            return [self._frame(whole, size)]
        return [self._frame(whole.cropped(box)) for box in self._boxes(*whole.size)]

    def _boxes(self, width: int, height: int) -> list[tuple[int, int, int, int]]:
        """The parts of an image that become frames, as left, top, right, lower; of a side of one pixel both halves are it."""
        whole = (0, 0, width, height)
        if not self.do_image_splitting:
            return [whole]
        x, y = width // 2, height // 2
        right, lower = max(x, 1), max(y, 1)
        return [(0, 0, right, lower), (x, 0, width, lower), (0, y, right, height), (x, y, width, height), whole]

    def _frame(self, part: Canvas, original: tuple[int, int] | None = None) -> np.ndarray:
        return np.stack(part.resized(self._resized(*(original or part.size))).planes())

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if not self.do_resize:
            return width, height
        if "longest_edge" not in self.size:
            return self.size["width"], self.size["height"]
        longest, shortest, ratio = self.size["longest_edge"], self.size["shortest_edge"], width / height
        if width >= height and width > longest:
            width, height = longest, int(longest / ratio)
        elif height > width and height > longest:
            width, height = int(longest * ratio), longest
        return max(width, shortest), max(height, shortest)


def cut_patches(frame: np.ndarray, size: int) -> tuple[np.ndarray, int, int]:
    """The patches (rows * columns, 3, size, size) of a frame (3, H, W), row by row, and the rows and columns there are.

    What is left over at the right and below, less than a patch, is dropped, as the vision tower drops it; a frame thinner
    than a patch is continued by its edge to one.
    """
    short = [(0, max(0, size - side)) for side in frame.shape[1:]]
    if any(added for _, added in short):
        frame = np.pad(frame, [(0, 0), *short], mode="edge")
    rows, columns = frame.shape[1] // size, frame.shape[2] // size
    whole = frame[:, : rows * size, : columns * size].reshape(3, rows, size, columns, size)
    return np.ascontiguousarray(whole.transpose(1, 3, 0, 2, 4)).reshape(-1, 3, size, size), rows, columns


CALL_OPTIONS = (
    "return_tensors", "data_format", "input_data_format", "device", "disable_grouping", "default_to_square",
    "do_center_crop", "crop_size",
)  # fmt: skip


def _square(size: Any) -> Any:
    """The size itself, or that of a square if it is a number."""
    return {"height": size, "width": size} if isinstance(size, int) else size


class Idefics2ImageProcessorFast(Idefics2ImageProcessor):
    """The same frames, with the images of a batch resized in parallel threads.

    The options of a call may be given to the constructor, for all calls; they are not written to files.
    """

    def __init__(self, **settings: Any) -> None:
        self._options = {name: settings.pop(name) for name in CALL_OPTIONS if name in settings}
        if self._options.get("default_to_square"):
            settings["size"] = _square(settings.get("size"))
        super().__init__(**settings)

    @classmethod
    def setting_names(cls) -> list[str]:
        return [*Idefics2ImageProcessor.setting_names(), *CALL_OPTIONS]

    @in_documented_order
    def preprocess(self, images: Any, **options: Any) -> Features:
        """As for every image processor, with the options of `_preprocess`."""
        return self._preprocess(images, **self._options | {k: v for k, v in options.items() if v is not None})

    def _preprocess(
        self,
        images: Any,
        device: Any = None,
        disable_grouping: bool | None = None,
        default_to_square: bool | None = None,
        do_center_crop: bool | None = None,
        crop_size: dict[str, int] | None = None,
        **settings: Any,
    ) -> Features:
        """As for every image processor; tensors are put on `device`.

        With `default_to_square` a `size` may be one number. Grouping is accepted and changes nothing: images are taken
        one by one. Raises ValueError for a crop, which Idefics2 has none of.
        """
        if default_to_square:
            settings["size"] = _square(settings.get("size"))
        if do_center_crop or crop_size:
            raise ValueError("Idefics2 does not crop the centre of images: leave do_center_crop and crop_size out.")
        features = super().preprocess(images, **settings)
        return features if device is None else features.to(device)

    def frames_of_batch(self, samples: list[list[Image.Image]]) -> list[list[np.ndarray]]:
        """As `ImageProcessor.frames_of_batch`, (3, H, W) each; images are framed by several threads."""
        images = [image for sample in samples for image in sample]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            framed = iter(list(pool.map(self.frames, images)))
        return [[frame for _ in sample for frame in next(framed)] for sample in samples]
