"""Documents and conversations as pieces: the same ids as encoding the whole string, with what each part is."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from m4train.errors import BadSample
from m4train.processing.chat import ChatTemplate, Part, content_items
from m4train.processing.pieces import ImagePiece, Piece, TextPiece
from m4train.processing.tokenizer import Tokenizer


def encode_document(tokenizer: Tokenizer, items: list[dict]) -> list[Piece]:
    """Pieces of an interleaved document: what the tokenizer puts first, one piece per item, and eos.

    Consecutive texts are encoded as one string and cut where the items meet. Raises BadSample for an item that is neither
    {"text": ...} nor {"image": ...}.
    """
    prefix, _ = tokenizer.affixes
    pieces: list[Piece] = [TextPiece(_ids(prefix), "template")] if prefix else []
    run: list[Part] = []
    images = 0
    for number, item in enumerate(items):
        if isinstance(item.get("text"), str):
            run.append(Part(item["text"], "document", number, literal=True))
        elif "image" in item:
            pieces += _encode_run(tokenizer, run)
            pieces.append(ImagePiece(images))
            images, run = images + 1, []
        else:
            raise BadSample("bad_item", f"Item {number} of the document is neither text nor image: {str(item)[:80]}.")
    pieces += _encode_run(tokenizer, run)
    if tokenizer.eos_token_id is not None:
        pieces.append(TextPiece(_ids([tokenizer.eos_token_id]), "document"))
    return pieces


def encode_messages(tokenizer: Tokenizer, template: ChatTemplate, messages: list[dict], image: str) -> list[Piece]:
    """Pieces of a conversation as `template` renders it; `image` is the placeholder it writes for an image.

    Raises BadSample where the template refuses or changes the messages, and ConfigError where it cannot be used at all.
    """
    specials = tokenizer.special_pattern
    parts = template.split(messages, specials.search)
    pieces: list[Piece] = []
    prefix, _ = tokenizer.affixes
    starts_with_bos = tokenizer.bos_token and parts and parts[0].text.startswith(tokenizer.bos_token)
    if prefix and not starts_with_bos:
        pieces.append(TextPiece(_ids(prefix), "template"))
    run: list[Part] = []
    images = 0
    for part in _split_at_specials(parts, specials):
        is_token = not part.literal and specials.fullmatch(part.text) is not None
        if is_token or part.cut:
            pieces += _encode_run(tokenizer, run)
            run = []
        if is_token and part.text == image:
            pieces.append(ImagePiece(images))
            images += 1
        elif is_token:
            pieces.append(TextPiece(_ids([tokenizer.added_tokens[part.text]]), part.origin, part.turn))
        else:
            run.append(part)
    pieces += _encode_run(tokenizer, run)
    expected = sum(item["type"] == "image" for message in messages for item in content_items(message))
    if images != expected:
        raise BadSample("image_count", f"The chat template places {images} images where the messages hold {expected}.")
    return _merge(pieces)


def _split_at_specials(parts: list[Part], specials: re.Pattern) -> Iterator[Part]:
    """Parts of the template cut around the special tokens in them; parts that are data stay whole."""
    for part in parts:
        if part.literal:
            yield part
            continue
        cut, position = part.cut, 0
        for match in specials.finditer(part.text):
            for text in (part.text[position : match.start()], match.group()):
                if text:
                    yield Part(text, part.origin, part.turn, cut=cut)
                    cut = False
            position = match.end()
        if position < len(part.text):
            yield Part(part.text[position:], part.origin, part.turn, cut=cut)


def _encode_run(tokenizer: Tokenizer, parts: list[Part]) -> list[Piece]:
    """Encodes consecutive text as one string; a token belongs to the part that holds its last character."""
    text = "".join(part.text for part in parts)
    if not text:
        return []
    ids, ends = tokenizer.encode_plain(text)
    pieces: list[Piece] = []
    start = border = 0
    for part in parts:
        border += len(part.text)
        stop = len(ids) if border == len(text) else int(np.searchsorted(ends, border, side="right"))
        if stop > start:
            pieces.append(TextPiece(ids[start:stop], part.origin, part.turn))
        start = max(start, stop)
    return pieces


def _merge(pieces: list[Piece]) -> list[Piece]:
    """Joins neighbouring text of one origin and turn."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if (
            isinstance(piece, TextPiece)
            and isinstance(last, TextPiece)
            and (piece.origin, piece.turn) == (last.origin, last.turn)
        ):
            merged[-1] = TextPiece(np.concatenate([last.ids, piece.ids]), piece.origin, piece.turn)
        else:
            merged.append(piece)
    return merged


def _ids(values: list[int]) -> np.ndarray:
    return np.asarray(values, np.int64)
