"""`load_image`, under the name that the documentation's examples import it by."""

from __future__ import annotations

import os
from typing import Any

from PIL import Image

from m4train.processing.images import to_rgb
from m4train.processing.inputs import read_image


def load_image(image: str | os.PathLike | bytes | Image.Image | Any) -> Image.Image:
    """The image at a path or URL (or in any other accepted form) in RGB, upright, laid on white if it is transparent."""
    return to_rgb(read_image(image))
