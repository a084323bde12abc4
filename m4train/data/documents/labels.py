"""Which tokens are trained on: decided from the ids after image expansion, piece by piece.

Never a target: a turn whose weight is 0, an image's expansion, what the chat template or bos wrote, and the first token of a segment, which
nothing predicts.
"""

from __future__ import annotations

import numpy as np

from m4train.data.documents.pieces import PIECE_KINDS
from m4train.data.documents.rendering import Rendered
from m4train.errors import BadSample, ConfigError

_TEMPLATE, _DOCUMENT, _USER, _SYSTEM, _ASSISTANT, _IMAGE, _BORDER = range(len(PIECE_KINDS))


def trained_tokens(rendered: Rendered, loss: str) -> np.ndarray:
    """(T,) bool, True for each token that must be predicted.

    `loss` "auto": all text of documents, and what the assistant says in conversations; "all": all text, whoever says it;
    "last_turn": what the assistant says last. Raises BadSample `no_label` if nothing is left.
    """
    return trained_kinds(rendered.kinds, rendered.turns, loss, rendered.weights)


def weight_sum(rendered: Rendered, trained: np.ndarray) -> float | None:
    """The sum () of the weights of all tokens `trained` (T,); None if the turns have none."""
    return None if rendered.weights is None else float(rendered.weights[trained].sum(dtype=np.float64))


def trained_kinds(kinds: np.ndarray, turns: np.ndarray, loss: str, weights: np.ndarray | None = None) -> np.ndarray:
    """As `trained_tokens`, from the kind, turn and weight of each token, all (T,)."""
    if loss == "auto":
        mask = (kinds == _DOCUMENT) | (kinds == _ASSISTANT)
    elif loss == "all":
        mask = (kinds != _TEMPLATE) & (kinds != _IMAGE)
    elif loss == "last_turn":
        said = kinds == _ASSISTANT
        mask = said & (turns == turns[said].max(initial=-1))
    else:
        raise ConfigError(f"loss is {loss!r}, but must be one of auto, all, last_turn.")
    if weights is not None:
        mask &= weights > 0
    mask[0] = False
    if not mask.any():
        raise BadSample("no_label", f"none of its {len(kinds)} tokens is trained on with loss {loss!r}")
    return mask
