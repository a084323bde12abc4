"""What the image processors share: settings and their files, accepted inputs, normalisation, padding to a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from m4train.processing.features import Features
from m4train.processing.files import read_processor_files, write_json
from m4train.processing.images import normalize, pixel_table
from m4train.processing.inputs import nest_images, read_image

Self = TypeVar("Self", bound="ImageProcessor")


class ImageProcessor:
    """Base of the image processors. Attributes are the settings of preprocessor_config.json, and may be changed."""

    def __init__(
        self,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: float | list[float],
        image_std: float | list[float],
        extra: dict[str, Any],
    ) -> None:
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = _per_channel(image_mean)
        self.image_std = _per_channel(image_std)
        self._extra = {k: v for k, v in extra.items() if k not in ("image_processor_type", "processor_class")}

    @classmethod
    def from_dict(cls: type[Self], settings: dict[str, Any]) -> Self:
        return cls(**settings)

    @classmethod
    def from_pretrained(cls: type[Self], folder: str | Path, **settings: Any) -> Self:
        """Reads preprocessor_config.json, or the image part of processor_config.json; `settings` override it."""
        return cls.from_dict(read_processor_files(folder).image_processor | settings)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes preprocessor_config.json."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_json(Path(folder) / "preprocessor_config.json", self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """The settings as they are written to preprocessor_config.json."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return self._extra | settings | {"image_processor_type": type(self).__name__}

    def replace(self: Self, **settings: Any) -> Self:
        """A copy with some settings changed; those given as None stay. Raises TypeError for a setting there is not."""
        unknown = [name for name in settings if name not in vars(self)]
        if unknown:
            raise TypeError(f"{type(self).__name__} has no setting {unknown[0]!r}; it has {', '.join(self.to_dict())}.")
        return type(self)(**(self.to_dict() | {k: v for k, v in settings.items() if v is not None}))

    def __call__(self, images: Any, **options: Any) -> Features:
        return self.preprocess(images, **options)

    def preprocess(self, images: Any, **options: Any) -> Features:
        raise NotImplementedError

    def pixel_table(self) -> np.ndarray:
        """The value (3, 256) float32 of each uint8 level of each channel after rescaling and normalising."""
        mean, std = (self.image_mean, self.image_std) if self.do_normalize else (None, None)
        return pixel_table(mean, std, self.rescale_factor if self.do_rescale else None)

    def values(self, frames: np.ndarray) -> np.ndarray:
        """Frames (..., 3, H, W) uint8 rescaled and normalised as the settings say (float32; uint8 where they say neither)."""
        return normalize(frames, self.pixel_table()) if self.do_rescale or self.do_normalize else frames

    def read_samples(self, images: Any) -> list[list[Image.Image]]:
        """Images in any accepted form, as one list per sample."""
        return [[read_image(image) for image in sample] for sample in nest_images(images)]


def stack_samples(samples: list[np.ndarray], pad: bool, tensors: bool) -> Features:
    """Frames (n, 3, H, W) per sample, as `pixel_values` (B, N, 3, H, W) and, where padded, `pixel_attention_mask`.

    Raises ValueError where no sample holds a frame.
    """
    if not any(len(sample) for sample in samples):
        raise ValueError("No images found in the batch: leave `images` out where no sample has one.")
    if not pad:
        return Features(pixel_values=np.stack(samples) if tensors else [list(sample) for sample in samples])
    count = max(len(sample) for sample in samples)
    shape = samples[0].shape[1:]
    pixels = np.zeros((len(samples), count, *shape), samples[0].dtype)
    mask = np.zeros((len(samples), count, *shape[1:]), np.int64)
    for row, sample in enumerate(samples):
        pixels[row, : len(sample)] = sample
        mask[row, : len(sample)] = 1
    return Features(pixel_values=pixels, pixel_attention_mask=mask)


def _per_channel(value: float | list[float]) -> list[float]:
    return [float(value)] * 3 if isinstance(value, (int, float)) else [float(v) for v in value]
