"""Resizing of images by Pillow or by torch: two ways to the same sizes, whose levels differ by a few here and there.

Pillow's pixels are those of the first image processors of these models and of transformers' Pillow backend; torch's are
those of transformers' torchvision backend, and come in a fraction of the time. A model sees best what it was trained on, so
the folder of a processor says which one it was.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import numpy as np
from PIL import Image

from m4train.errors import ConfigError

BACKENDS = ("pil", "torch", "auto")
_MODES = {  # Pillow's filter -> the mode of torch's `interpolate`, and whether it takes the antialiasing filter
    Image.Resampling.NEAREST: ("nearest-exact", False),
    Image.Resampling.BILINEAR: ("bilinear", True),
    Image.Resampling.BICUBIC: ("bicubic", True),
    Image.Resampling.LANCZOS: ("lanczos", True),
}


class WrongBackend(ConfigError, ValueError):
    """A way to resize that there is not, or not on this machine."""


def resolved(backend: str | None, resample: int) -> str | None:
    """The backend that is meant: "auto" is torch if it resizes bytes with that filter here, else Pillow.

    Raises WrongBackend for another name, and for torch with a filter it does not have.
    """
    backend = "torch" if backend == "torchvision" else backend  # as transformers calls it
    if backend is None or backend == "pil":
        return backend
    if backend not in BACKENDS:
        raise WrongBackend(f"backend={backend!r} is not a way to resize images: choose pil, torch or auto.")
    if backend == "auto":
        return "torch" if torch_has(resample) and _on_bytes(resample) else "pil"
    if not torch_has(resample):
        raise WrongBackend(
            f"backend='torch' cannot resize with resample={int(resample)}: this torch has no such mode; set backend='pil', "
            "or install torch 2.13 or newer."
        )
    return backend


@functools.cache
def torch_has(resample: int) -> bool:
    """Whether torch resizes as Pillow's filter `resample` does."""
    import torch

    if resample not in _MODES:
        return False
    try:
        _interpolated(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), (3, 3), resample)
    except (NotImplementedError, ValueError, RuntimeError):
        return False
    return True


def _on_bytes(resample: int) -> bool:
    """Whether torch computes on bytes with that filter: for the bilinear one it asks the processor for vectors of bytes."""
    import torch

    if _MODES[Image.Resampling(resample)][0] != "bilinear":
        return True
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or platform.machine() in ("aarch64", "arm64")


def _interpolated(pixels: Any, size: tuple[int, int], resample: int) -> Any:
    """Bytes (1, 3, H, W) at another (width, height)."""
    import torch

    interpolate = torch.nn.functional.interpolate
    mode, smooth = _MODES[Image.Resampling(resample)]
    if not smooth:
        return interpolate(pixels, size[::-1], mode=mode)
    bytewise = _on_bytes(resample)
    given = pixels if bytewise else pixels.float()
    found = interpolate(given, size[::-1], mode=mode, align_corners=False, antialias=True)
    return found if bytewise else found.round_().to(torch.uint8)


class PillowCanvas:
    """An RGB image that Pillow resizes."""

    def __init__(self, image: Image.Image, resample: int) -> None:
        self._image, self._resample = image, resample

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self._image.size

    def resized(self, size: tuple[int, int]) -> PillowCanvas:
        if size == self.size:
            return self
        return PillowCanvas(self._image.resize(size, Image.Resampling(self._resample)), self._resample)

    def cropped(self, box: tuple[int, int, int, int]) -> PillowCanvas:
        """The part between left, top, right and lower."""
        return self if box == (0, 0, *self.size) else PillowCanvas(self._image.crop(box), self._resample)

    def planes(self) -> list[np.ndarray]:
        """Red, green and blue, (H, W) uint8 each."""
        return [np.asarray(band) for band in self._image.split()]


class TorchCanvas:
    """An RGB image that torch resizes."""

    def __init__(self, pixels: Any, resample: int) -> None:
        self._pixels, self._resample = pixels, resample  # (1, 3, H, W) uint8

    @classmethod
    def of(cls, image: Image.Image, resample: int) -> TorchCanvas:
        import torch

        rows = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)  # several times as quick as np.asarray
        return cls(rows.view(1, image.height, image.width, 3).permute(0, 3, 1, 2), resample)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self._pixels.shape[3], self._pixels.shape[2]

    def resized(self, size: tuple[int, int]) -> TorchCanvas:
        if size == self.size:
            return self
        return TorchCanvas(_interpolated(self._pixels, size, self._resample), self._resample)

    def cropped(self, box: tuple[int, int, int, int]) -> TorchCanvas:
        """The part between left, top, right and lower."""
        left, top, right, lower = box
        return TorchCanvas(self._pixels[:, :, top:lower, left:right], self._resample)

    def planes(self) -> list[np.ndarray]:
        """Red, green and blue, (H, W) uint8 each."""
        return list(self._pixels[0].contiguous().numpy())


Canvas = PillowCanvas | TorchCanvas


def canvas(image: Image.Image, resample: int, backend: str | None) -> Canvas:
    """An RGB image to be resized by `backend`, Pillow if it is None."""
    return TorchCanvas.of(image, resample) if backend == "torch" else PillowCanvas(image, resample)


def normalize_by_torch(
    frame: np.ndarray, mean: list[float], std: list[float], rescale_factor: float, out: np.ndarray
) -> None:
    """Writes a frame (3, H, W) uint8 to `out` (3, H, W) float32: the values of `fused_pixel_table`, computed rather than
    looked up, which takes a third of the time."""
    import torch

    scale = 1.0 / rescale_factor
    values = torch.from_numpy(out).copy_(torch.from_numpy(frame))
    values.sub_((torch.tensor(mean) * scale)[:, None, None]).div_((torch.tensor(std) * scale)[:, None, None])
