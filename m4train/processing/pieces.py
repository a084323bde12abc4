"""What a sample becomes before it is packed: spans of token ids and images, in reading order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

ORIGINS = ("document", "user", "system", "assistant", "template")


@dataclass(frozen=True)
class TextPiece:
    """Token ids `ids` (n,) int64 of one origin.

    `origin` is one of ORIGINS: "document" for the text of a document and its closing eos; "assistant" for what the
    assistant says with the token that ends its turn; "user" and "system" for what they say (any role that is neither
    user nor assistant counts as system); "template" for bos and for what a chat template writes around the messages.
    `turn` is the number of the message, or of the item of a document; -1 for what belongs to none.
    """

    ids: np.ndarray
    origin: str
    turn: int = -1


@dataclass(frozen=True)
class ImagePiece:
    """The place of image number `image` of the sample, counted in reading order from 0."""

    image: int


Piece = TextPiece | ImagePiece


Frames = np.ndarray | list[np.ndarray]


@dataclass(frozen=True)
class EncodedImage:
    """One image, as tiles and as tokens, made together so that they cannot disagree.

    `frames` (n, 3, S, S) uint8, or a list of n arrays (3, H, W) if their sizes differ (Idefics2); `ids` (m,) int64,
    everything the image takes in the text; `feature_mask` (m,) bool, True where an image feature replaces the
    embedding, in the order of the frames.
    """

    frames: Frames
    ids: np.ndarray
    feature_mask: np.ndarray


def text_ids(pieces: Iterable[Piece], images: list[np.ndarray] | None = None) -> np.ndarray:
    """All ids (n,) int64 of a sample laid end to end; `images[i]` holds the ids of image i."""
    parts = [p.ids if isinstance(p, TextPiece) else (images or [])[p.image] for p in pieces]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)
