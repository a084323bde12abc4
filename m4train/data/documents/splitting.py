"""Documents longer than a pack: cut between items, or not used at all."""

from __future__ import annotations

import numpy as np

from m4train.data.documents.pieces import BORDER_KIND, IMAGE_KIND, PIECE_KINDS, Pieces

_DOCUMENT = PIECE_KINDS.index("document")


def split_pieces(pieces: Pieces, token_budget: int, frame_budget: int) -> list[tuple[int, int]]:
    """Ranges (first, last) of pieces that each fit the budgets, in order; empty if one piece alone does not fit.

    A range ends before its trailing images, so that an image stays with the text after it; ranges without a token to train
    on are left out.
    """
    tokens, frames, kinds = pieces.tokens.tolist(), pieces.frames.tolist(), pieces.kinds.tolist()
    if max(tokens, default=0) > token_budget or max(frames, default=0) > frame_budget:
        return []
    ranges, first = [], 0
    while first < len(tokens):
        last, used_tokens, used_frames = first, 0, 0
        while (
            last < len(tokens)
            and used_tokens + tokens[last] <= token_budget
            and used_frames + frames[last] <= frame_budget
        ):
            used_tokens += tokens[last]
            used_frames += frames[last]
            last += 1
        if last < len(tokens):
            cut = last
            while cut > first and kinds[cut - 1] == IMAGE_KIND:
                cut -= 1
            if _trains(tokens, kinds, first, cut):
                last = cut
        if _trains(tokens, kinds, first, last):
            ranges.append((first, last))
        first = last
    return ranges


def document_ranges(pieces: Pieces) -> list[tuple[int, int]]:
    """Ranges (first, last) of pieces between borders: the documents that a stored one consists of."""
    borders = np.flatnonzero(pieces.kinds == BORDER_KIND).tolist()
    return list(zip([0, *(border + 1 for border in borders)], [*borders, len(pieces.kinds)]))


def piece_range(pieces: Pieces, first: int, last: int) -> Pieces:
    """Pieces `first` to `last`."""
    return Pieces(*(column[first:last] for column in (pieces.tokens, pieces.kinds, pieces.frames)))


def is_document(pieces: Pieces) -> bool:
    """Whether the pieces are those of a document, which may be cut between items, and not of a conversation."""
    return bool((pieces.kinds == _DOCUMENT).any())


def _trains(tokens: list[int], kinds: list[int], first: int, last: int) -> bool:
    """Whether the range holds a document token that something predicts (its very first token has nothing before it)."""
    trained = sum(tokens[piece] for piece in range(first, last) if kinds[piece] == _DOCUMENT)
    return trained > (1 if first < last and kinds[first] == _DOCUMENT else 0)
