"""The models, imported when first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_PUBLIC = {
    "AutoModelForImageTextToText": "auto",
    "AutoModelForVision2Seq": "auto",
    "BitsAndBytesConfig": "quantized",
    "IdeficsConfig": "model_configs",
    "IdeficsForVisionText2Text": "idefics",
    "IdeficsModel": "idefics",
    "Idefics2Config": "model_configs",
    "Idefics2ForConditionalGeneration": "idefics2",
    "Idefics2Model": "idefics2",
    "Idefics3Config": "model_configs",
    "Idefics3ForConditionalGeneration": "idefics3",
    "Idefics3Model": "idefics3",
    "SmolVLMConfig": "model_configs",
    "SmolVLMForConditionalGeneration": "idefics3",
    "SmolVLMModel": "idefics3",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
