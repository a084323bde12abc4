"""The models in plain PyTorch on the packed form, imported when first used.

Each family has one file (`idefics.py`, `idefics2.py`, `idefics3.py`) that puts towers, connector and decoder together;
`multimodal.py` is what they share, `attention.py` the one attention operator, `padded.py` and `doors.py` the documented
padded arguments, `pretrained.py` reads and writes Hugging Face folders, `generation.py` generates.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from m4train.families import FAMILIES

_OTHERS = {
    "AutoModelForImageTextToText": "m4train.models.auto",
    "AutoModelForVision2Seq": "m4train.models.auto",
    "BitsAndBytesConfig": "m4train.models.quantized",
}


def _homes() -> dict[str, str]:
    """Every public name of this package, and the module it is in."""
    own = [{k: v for k, v in row.homes().items() if k not in row.processing_homes()} for row in FAMILIES.values()]
    return _OTHERS | {name: home for homes in own for name, home in homes.items()}


__all__ = sorted(_homes())


def __getattr__(name: str) -> Any:
    home = _homes().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
