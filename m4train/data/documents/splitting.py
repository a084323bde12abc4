"""Samples longer than a pack: documents cut between items, or inside a text that is longer than a pack; conversations without
their last turns; or not used at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from m4train.config import DataConfig
from m4train.data.documents.boundaries import PARAGRAPH
from m4train.data.documents.pieces import BORDER_KIND, IMAGE_KIND, PIECE_KINDS, Pieces
from m4train.processing.pieces import Piece, TextPiece

_DOCUMENT, _ASSISTANT, _TEMPLATE = (PIECE_KINDS.index(kind) for kind in ("document", "assistant", "template"))
_ASKS = (PIECE_KINDS.index("user"), PIECE_KINDS.index("system"))

Places = Mapping[int, Sequence[int]]  # see boundaries.Boundaries.places


class Fragment(NamedTuple):
    """Ids `begin` to `end` of piece number `piece`; an image is always whole."""

    piece: int
    begin: int
    end: int


@dataclass(frozen=True)
class Division:
    """What a sample is packed as: `ranges` (first, last) of its `pieces`, and `lost`, the parts that fit no pack.

    `pieces` are those of the sample, or, if `fragments` are given, these parts of them.
    """

    pieces: Pieces
    ranges: list[tuple[int, int]]
    lost: list[tuple[int, int]]
    fragments: list[Fragment] | None = None

    def cut(self, rendered: list[Piece]) -> list[Piece]:
        """The rendered pieces of the sample, cut alike."""
        if self.fragments is None:
            return rendered
        return [_part(rendered[piece], begin, end) for piece, begin, end in self.fragments]


def divide(pieces: Pieces, places: Places, data: DataConfig) -> Division:
    """How a sample is packed within the budgets of `data`, that has these `places` where it may be cut."""
    fragments: list[Fragment] = []
    sizes = pieces.tokens.tolist()
    for first, last in document_ranges(pieces):
        fragments += [Fragment(first - 1, 0, 0)] if first else []  # the border
        if data.long_documents == "split" and is_document(piece_range(pieces, first, last)):
            fragments += _fragments(pieces, first, last, places, data.sequence_length)
        else:
            fragments += [Fragment(number, 0, sizes[number]) for number in range(first, last)]
    cut = len(fragments) > len(sizes)
    if cut:
        numbers = np.array([fragment.piece for fragment in fragments])
        tokens = np.array([fragment.end - fragment.begin for fragment in fragments], pieces.tokens.dtype)
        pieces = Pieces(tokens, pieces.kinds[numbers], pieces.frames[numbers])
    ranges, lost = [], []
    for first, last in document_ranges(pieces):
        found = _ranges(
            piece_range(pieces, first, last), {n - first: places[n] for n in places} if not cut else {}, data
        )
        ranges += [(first + a, first + b) for a, b in found]
        lost += [] if found else [(first, last)]
    return Division(pieces, ranges, lost, fragments if cut else None)


def _ranges(part: Pieces, places: Places, data: DataConfig) -> list[tuple[int, int]]:
    """The ranges of pieces that one document or conversation is packed as; none if it cannot be."""
    budgets = data.sequence_length, data.images_per_pack
    if part.tokens.sum() <= budgets[0] and part.frames.sum() <= budgets[1]:
        return [(0, len(part.tokens))]
    if is_document(part):
        return split_pieces(part, *budgets) if data.long_documents == "split" else []
    return _truncated(part, places, *budgets) if data.long_conversations == "truncate" else []


def _fragments(pieces: Pieces, first: int, last: int, places: Places, budget: int) -> list[Fragment]:
    """The pieces of one document, with texts that are longer than a pack cut where they fill it: after a paragraph, else after
    a sentence, else after any id."""
    fragments: list[Fragment] = []
    used = tail = 0  # ids of the run that is being filled, and of the images at its end, which go with what follows
    for number in range(first, last):
        size, kind = int(pieces.tokens[number]), pieces.kinds[number]
        if size <= budget or kind != _DOCUMENT:
            used = used + size if used + size <= budget else size + (tail if size + tail <= budget else 0)
            tail = tail + size if kind == IMAGE_KIND else 0
            fragments.append(Fragment(number, 0, size))
            continue
        room, begin = (budget - used if 2 * used <= budget else budget - tail), 0
        room = room if room > 0 else budget
        while size - begin > room:
            end = _last_place(places.get(number, ()), begin, room)
            fragments.append(Fragment(number, begin, end))
            begin, room = end, budget
        fragments.append(Fragment(number, begin, size))
        used, tail = size - begin, 0
    return fragments


def _last_place(places: Sequence[int], begin: int, room: int) -> int:
    """Where to cut so that at most `room` ids follow `begin`, and at least half of them if there is such a place."""
    within = [place for place in places if begin + room / 2 < place // 2 <= begin + room]
    paragraphs = [place for place in within if place % 2 == PARAGRAPH]
    return (paragraphs or within or [2 * (begin + room)])[-1] // 2


def _truncated(part: Pieces, places: Places, token_budget: int, frame_budget: int) -> list[tuple[int, int]]:
    """The turns that a conversation keeps: as many as fit, up to the end of an answer; none if not even the first answer
    does."""
    tokens, frames = np.cumsum(part.tokens), np.cumsum(part.frames)
    kinds = part.kinds.tolist()
    for number in range(len(kinds) - 1, -1, -1):
        if kinds[number] != _ASSISTANT or tokens[number] > token_budget or frames[number] > frame_budget:
            continue
        if number in places or (not places and _asked_next(kinds, number)):
            return [(0, number + 1)]
    return []


def _asked_next(kinds: list[int], number: int) -> bool:
    """Whether what follows an assistant's piece is somebody else's turn; of an image it is not known whose it is."""
    following = next((kind for kind in kinds[number + 1 :] if kind != _TEMPLATE), None)
    return following is None or following in _ASKS


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
    """Whether the pieces are those of a document, which may be cut anywhere, and not of a conversation."""
    return bool((pieces.kinds == _DOCUMENT).any())


def _part(piece: Piece, begin: int, end: int) -> Piece:
    return replace(piece, ids=piece.ids[begin:end]) if isinstance(piece, TextPiece) else piece


def _trains(tokens: list[int], kinds: list[int], first: int, last: int) -> bool:
    """Whether the range holds a document token that something predicts (its very first token has nothing before it)."""
    trained = sum(tokens[piece] for piece in range(first, last) if kinds[piece] == _DOCUMENT)
    return trained > (1 if first < last and kinds[first] == _DOCUMENT else 0)
