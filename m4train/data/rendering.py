"""From a sample to token ids: the pieces of the text, and the images expanded between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from m4train.data.index import IMAGE_KIND, PIECE_KINDS, Pieces
from m4train.data.sample import Sample
from m4train.errors import BadSample, StaleIndexError
from m4train.processing.pieces import ImagePiece, TextPiece


@dataclass(frozen=True)
class Rendered:
    """Token ids of a run of pieces.

    `ids` (T,) int64; `kinds` (T,) uint8, the `PIECE_KINDS` number of the piece each id belongs to; `turns` (T,) int32, the
    message each id belongs to (-1 for none); `feature_mask` (T,) True where an image feature goes; `frames` (F, 3, S, S)
    uint8 of each image, in order (or lists of frames of different sizes).
    """

    ids: np.ndarray
    kinds: np.ndarray
    turns: np.ndarray
    feature_mask: np.ndarray
    frames: list[Any]


def render(sample: Sample, processor: Any) -> list[Any]:
    """The pieces of a sample, in reading order. Raises BadSample when there are none or the images do not match."""
    if sample.items is not None:
        pieces = processor.encode_document(sample.items)
    else:
        pieces = processor.encode_messages(sample.messages)
    images = [piece.image for piece in pieces if isinstance(piece, ImagePiece)]
    if images != list(range(len(sample.images))):
        raise BadSample(
            "image_count", f"the text has places for images {images} but the sample names {len(sample.images)}"
        )
    if not pieces:
        raise BadSample("empty", "the sample renders to no tokens")
    return pieces


def image_size_pieces(pieces: Sequence[Any], sizes: Sequence[tuple[int, int]], processor: Any) -> Pieces:
    """Token count, kind and frames of each piece, for images of (width, height) `sizes`."""
    tokens, kinds, frames = [], [], []
    for piece in pieces:
        if isinstance(piece, ImagePiece):
            width, height = sizes[piece.image]
            tokens.append(processor.tokens_for(width, height))
            kinds.append(IMAGE_KIND)
            frames.append(processor.frames_for(width, height))
        else:
            tokens.append(len(piece.ids))
            kinds.append(PIECE_KINDS.index(piece.origin))
            frames.append(0)
    return Pieces(np.array(tokens, np.int32), np.array(kinds, np.uint8), np.array(frames, np.int32))


def expand(pieces: Sequence[Any], images: Mapping[int, Image.Image], planned: Pieces, processor: Any) -> Rendered:
    """The ids of a run of pieces with its images in place.

    Raises StaleIndexError where a piece does not have the length the index promised: the plan was made for another
    processor, and going on would overflow packs or shift labels.
    """
    if len(pieces) != len(planned.tokens):
        raise StaleIndexError(f"renders to {len(pieces)} pieces where the index has {len(planned.tokens)}: {_ADVICE}")
    ids, kinds, turns, masks, frames = [], [], [], [], []
    for number, piece in enumerate(pieces):
        if isinstance(piece, TextPiece):
            piece_ids, mask, kind, turn = (
                piece.ids,
                np.zeros(len(piece.ids), bool),
                PIECE_KINDS.index(piece.origin),
                piece.turn,
            )
        else:
            encoded = processor.encode_image(images[piece.image])
            piece_ids, mask, kind, turn = encoded.ids, encoded.feature_mask, IMAGE_KIND, -1
            frames.append(encoded.frames)
            if len(encoded.frames) != planned.frames[number]:
                raise StaleIndexError(
                    f"image {piece.image} has {len(encoded.frames)} frames where the index has {planned.frames[number]}: {_ADVICE}"
                )
        if len(piece_ids) != planned.tokens[number] or kind != planned.kinds[number]:
            raise StaleIndexError(
                f"piece {number} has {len(piece_ids)} tokens ({PIECE_KINDS[kind]}) where the index has "
                f"{planned.tokens[number]} ({PIECE_KINDS[planned.kinds[number]]}): {_ADVICE}"
            )
        ids.append(np.asarray(piece_ids, np.int64))
        masks.append(mask)
        kinds.append(np.full(len(piece_ids), kind, np.uint8))
        turns.append(np.full(len(piece_ids), turn, np.int32))
    return Rendered(np.concatenate(ids), np.concatenate(kinds), np.concatenate(turns), np.concatenate(masks), frames)


_ADVICE = "run `m4train data index` again"
