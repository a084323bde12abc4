"""Tokenizers, chat templates, images, and one processor per model: from samples to token ids and frames, without torch.

`protocol.py` is what data asks of a processor, `processor.py` what the processors share, `sample_encoding.py` turns the
items of a sample into pieces, `chat.py` renders conversations, `image_processor.py` and `images.py` make frames.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from m4train.families import FAMILIES

_OTHERS = {
    "AutoProcessor": "m4train.processing.auto",
    "AutoTokenizer": "m4train.processing.auto",
    "EncodedImage": "m4train.processing.pieces",
    "ImagePiece": "m4train.processing.pieces",
    "Piece": "m4train.processing.pieces",
    "TextPiece": "m4train.processing.pieces",
    "Tokenizer": "m4train.processing.tokenizer",
}


def _homes() -> dict[str, str]:
    """Every public name of this package, and the module it is in."""
    return _OTHERS | {name: home for row in FAMILIES.values() for name, home in row.processing_homes().items()}


__all__ = sorted(_homes())


def __getattr__(name: str) -> Any:
    home = _homes().get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home), name)
