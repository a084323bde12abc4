"""The image processor of Idefics: every image is one square, whatever its shape was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from m4train.processing.features import Features
from m4train.processing.image_processor import ImageProcessor, square_side
from m4train.processing.settings import in_documented_order

Self = TypeVar("Self", bound="IdeficsImageProcessor")

MEAN = [0.48145466, 0.4578275, 0.40821073]  # of CLIP
STD = [0.26862954, 0.26130258, 0.27577711]


class IdeficsImageProcessor(ImageProcessor):
    """Resizes every image to `image_size` x `image_size`; a dictionary may say so as equal "height" and "width"."""

    documented_order = ("image_num_channels", "image_size", "image_mean", "image_std", "transform")
    model_input_names = ["pixel_values"]

    def __init__(
        self,
        image_size: int | dict[str, int] | None = None,
        image_mean: float | list[float] | None = None,
        image_std: float | list[float] | None = None,
        image_num_channels: int = 3,
        do_convert_rgb: bool = True,
        do_resize: bool = True,
        size: int | dict[str, int] | None = None,
        resample: int = Image.Resampling.BICUBIC,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        **extra: Any,
    ) -> None:
        self.image_size = square_side("image_size", image_size or size or 224)
        if image_num_channels != 3:
            raise ValueError(f"image_num_channels is {image_num_channels}, but every image becomes RGB: leave it at 3.")
        self.image_num_channels = image_num_channels
        self.do_resize = do_resize
        mean = MEAN if image_mean is None else image_mean
        std = STD if image_std is None else image_std
        super().__init__(do_convert_rgb, resample, do_rescale, rescale_factor, do_normalize, mean, std, extra)

    def replace(self: Self, **settings: Any) -> Self:
        """As for every image processor; `size` is another word for `image_size`."""
        size = settings.pop("size", None)
        if size is not None and settings.get("image_size") is None:
            settings["image_size"] = size
        return super().replace(**settings)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"size": {"height": self.image_size, "width": self.image_size}}

    def frame_sizes(self, width: int, height: int) -> list[tuple[int, int]]:
        return [(self.image_size, self.image_size) if self.do_resize else (width, height)]

    @property
    def fixed_size(self) -> bool:
        return self.do_resize

    def needed_size(self, width: int, height: int) -> tuple[int, int] | None:
        return self.frame_sizes(width, height)[0] if self.do_resize else None

    def frames(self, image: Image.Image, size: tuple[int, int] | None = None) -> list[np.ndarray]:
        """The one frame (3, S, S) uint8 of an image."""
        whole = self._canvas(image)
        (target,) = self.frame_sizes(*(size or whole.size))
        return [np.stack(whole.resized(target).planes())]

    @in_documented_order
    def preprocess(  # the reference returns the values alone
        self,
        images: Any,
        *,
        transform: Callable[[Image.Image], Any] | None = None,
        return_tensors: str | None = "pt",
        input_data_format: str | None = None,
        **settings: Any,
    ) -> Any:
        """The values (n, 3, S, S) float32 of all images, as one tensor or array; `settings` are for this call.

        `transform`, for training, takes a Pillow image and gives a tensor (3, S, S); it replaces every other step.
        """
        if isinstance(images, (list, tuple)) and not images:
            return []
        processor = self.for_values_of(images, **settings)
        samples = processor.read_samples(images, input_data_format)
        flat = [image for sample in samples for image in sample]
        if transform is not None:
            import torch

            return torch.stack([transform(image) for image in flat])
        frames = [processor.frames(image) for image in flat]
        values = processor.stack(frames, pad=False, tensors=True)["pixel_values"]
        if isinstance(values, list):
            raise ValueError("Images of different sizes cannot become a batch: set do_resize=True.")
        return Features(pixel_values=values[:, 0]).convert(return_tensors or "np")["pixel_values"]
