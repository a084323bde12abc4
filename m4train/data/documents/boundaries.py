"""Where a sample that is longer than a pack may be cut: in documents after paragraphs and sentences, in conversations after
answers. Found in the token ids when a sample is indexed, and kept with its token counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from m4train.processing.pieces import Piece, TextPiece

SENTENCE, PARAGRAPH = 0, 1  # a place is (ids before it) * 2 + one of these
_SHORTEST = 64  # ids of a text that are worth cutting
_NEWLINE, _STOP, _FULL_STOP, _SPACE, _CLOSES = 1, 2, 4, 8, 16
_ENDS = _NEWLINE | _STOP | _FULL_STOP
_CLOSING = "\"'”’»)]*_"


class Boundaries:
    """Finds the places for one processor; remembers what it has learned about each token id."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._marks = np.full(1 << 10, -1, np.int16)  # by id, -1: not yet looked at

    def places(self, pieces: Sequence[Piece]) -> dict[int, list[int]]:
        """By the number of a piece the places in it, in order; an answer's end is the one behind its last piece."""
        found = {}
        answers = {
            piece.turn: number
            for number, piece in enumerate(pieces)
            if isinstance(piece, TextPiece) and piece.origin == "assistant"
        }
        if len(answers) > 1:
            found = {number: [2 * len(_ids(pieces[number]))] for number in answers.values()}
        for number, piece in enumerate(pieces):
            if isinstance(piece, TextPiece) and piece.origin == "document" and len(piece.ids) >= _SHORTEST:
                places = self._in_text(np.asarray(piece.ids))
                if len(places):
                    found[number] = places
        return found

    def _in_text(self, ids: np.ndarray) -> list[int]:
        marks = self._of(ids)
        begun = np.flatnonzero(marks & _ENDS).tolist()  # few of all ids, so that they are looked at one by one
        known, last = marks.tolist(), len(ids) - 1
        found: dict[int, int] = {}
        for start in begun:
            for end in range(start, min(start + 3, last)):  # up to two brackets or quotation marks of its own behind it
                if end > start and not known[end] & _CLOSES:
                    break
                following = known[end + 1]
                if following & _NEWLINE:  # the paragraph ends behind the line break
                    continue
                stop, full_stop = known[start] & _STOP, known[start] & _FULL_STOP
                if end == start and known[start] & _NEWLINE:
                    found[end] = PARAGRAPH
                elif (stop and following & _SPACE) or (full_stop and not following & _CLOSES):
                    found.setdefault(end, SENTENCE)
        return [(end + 1) * 2 + kind for end, kind in sorted(found.items())]

    def _of(self, ids: np.ndarray) -> np.ndarray:
        most = int(ids.max())
        if most >= len(self._marks):
            grown = np.full(2 * most, -1, np.int16)
            grown[: len(self._marks)] = self._marks
            self._marks = grown
        marks = self._marks[ids]
        if marks.min() >= 0:
            return marks
        for unknown in np.unique(ids[marks < 0]).tolist():
            self._marks[unknown] = _marks_of(self._text(unknown))
        return self._marks[ids]

    def _text(self, token: int) -> str:
        """What a token adds to a text: some decoders leave out a space that a text begins with."""
        try:
            once = self._processor.decode([token])
            return self._processor.decode([token, token])[len(once) :]
        except UnicodeDecodeError:
            return ""


def _marks_of(text: str) -> int:
    said = text.rstrip().rstrip(_CLOSING)
    marks = _NEWLINE if "\n" in text else 0
    marks |= _STOP if said.endswith((".", "!", "?", "…")) else 0
    marks |= _FULL_STOP if said.endswith(("。", "！", "？")) else 0
    marks |= _CLOSES if text and not said else 0
    return marks | (_SPACE if text[:1].isspace() else 0)


def _ids(piece: Piece) -> np.ndarray:
    assert isinstance(piece, TextPiece)
    return piece.ids
