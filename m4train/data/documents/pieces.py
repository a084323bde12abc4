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


def loss_tokens(pieces: Pieces, loss: str) -> int:
    """Tokens of a sample that are predicted with `loss` auto, all or last_turn, as far as its pieces say: a turn of weight 0 and the
    first token of a document count as well."""
    kinds = np.array([PIECE_KINDS[kind] for kind in pieces.kinds])
    if loss == "all":
        trained = ~np.isin(kinds, ["template", "image", "border"])
    else:
        trained = np.isin(kinds, ["assistant"] if loss == "last_turn" else ["assistant", "document"])
    if loss == "last_turn":
        trained[: int(np.flatnonzero(kinds == "user").max(initial=-1)) + 1] = False
    return int(pieces.tokens[trained].sum())
