"""m4train: trains the Idefics family of vision-language models.

The public names are those of the Hugging Face documentation of these models; each is loaded when it is first used, so
that `import m4train` is light.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "m4train.models": (
        "AutoModelForImageTextToText",
        "AutoModelForVision2Seq",
        "BitsAndBytesConfig",
        "IdeficsConfig",
        "IdeficsModel",
        "IdeficsForVisionText2Text",
        "Idefics2Config",
        "Idefics2Model",
        "Idefics2ForConditionalGeneration",
        "Idefics3Config",
        "Idefics3Model",
        "Idefics3ForConditionalGeneration",
        "SmolVLMConfig",
        "SmolVLMModel",
        "SmolVLMForConditionalGeneration",
    ),
    "m4train.processing": (
        "AutoProcessor",
        "AutoTokenizer",
        "IdeficsImageProcessor",
        "IdeficsProcessor",
        "Idefics2ImageProcessor",
        "Idefics2ImageProcessorFast",
        "Idefics2Processor",
        "Idefics3ImageProcessor",
        "Idefics3Processor",
        "SmolVLMImageProcessor",
        "SmolVLMProcessor",
    ),
    "m4train.batch": ("PackedBatch",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"m4train has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
