"""The pieces that a sample renders to, as numbers: what the index keeps and the plan packs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PIECE_KINDS = ("template", "document", "user", "system", "assistant", "image", "border")
IMAGE_KIND = PIECE_KINDS.index("image")
BORDER_KIND = PIECE_KINDS.index("border")


@dataclass(frozen=True)
class Pieces:
    """The rendered pieces of one sample: token count, `PIECE_KINDS` number and frames (0 for text) of each.

    A piece of kind "border" takes nothing: what follows it is another document.
    """

    tokens: np.ndarray
    kinds: np.ndarray
    frames: np.ndarray
