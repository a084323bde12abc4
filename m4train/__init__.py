"""m4train: trains the Idefics family of vision-language models.

The public names are those of the Hugging Face documentation of these models, and the commands as functions; each is loaded when it is first used, so
that `import m4train` is light.
"""

from __future__ import annotations

import importlib
from typing import Any

from m4train.families import FAMILIES

__version__ = "0.1.0"

_OTHERS = {
    "AutoModelForImageTextToText": "m4train.models.auto",
    "AutoModelForVision2Seq": "m4train.models.auto",
    "AutoProcessor": "m4train.processing.auto",
    "AutoTokenizer": "m4train.processing.auto",
    "BitsAndBytesConfig": "m4train.models.quantized",
    "PackedBatch": "m4train.batch",
    "Callback": "m4train.training.callbacks.base",
    **dict.fromkeys(("load_config", "train", "evaluate", "estimate", "export", "preview"), "m4train.api"),
}


def _homes() -> dict[str, str]:
    """Every public name, and the module it is in."""
    return _OTHERS | {name: home for family in FAMILIES.values() for name, home in family.homes().items()}


__all__ = ["__version__", *_homes()]


def __getattr__(name: str) -> Any:
    home = _homes().get(name)
    if home is None:
        raise AttributeError(f"m4train has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(["__version__", *_homes()])
