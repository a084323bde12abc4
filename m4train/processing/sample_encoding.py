"""Documents and conversations as pieces: the same ids as encoding the whole string, with what each part is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from m4train.errors import BadSample
from m4train.processing.chat import ChatTemplate, Part, content_items
from m4train.processing.pieces import ImagePiece, Piece, TextPiece
from m4train.processing.tokenizer import Tokenizer


@dataclass(frozen=True)
class Framing:
    """What a processor writes around text and images.

    `prefix`: ids before every sample (bos, usually). `opening`: ids before an image that does not follow another one;
    they are no part of the ids of the image. `image`: the placeholder that chat templates write for an image.
    `space_after_image`: whether a word glued to an image is encoded as if a space came before it.
    """

    prefix: list[int]
    opening: list[int]
    image: str
    space_after_image: bool = False


def encode_document(tokenizer: Tokenizer, items: list[dict], framing: Framing) -> list[Piece]:
    """Pieces of an interleaved document: what comes first, one piece per item, and eos.

    Consecutive texts are encoded as one string and cut where the items meet. Raises BadSample for an item that is neither
    {"text": ...} nor {"image": ...}.
    """
    pieces: list[Piece] = [_template(framing.prefix)] if framing.prefix else []
    run: list[Part] = []
    images = 0
    for number, item in enumerate(items):
        if isinstance(item.get("text"), str):
            run.append(Part(item["text"], "document", number, literal=True))
        elif "image" in item:
            pieces += _encode_run(tokenizer, _spaced(run, pieces, framing))
            pieces += _image(images, pieces, framing)
            images, run = images + 1, []
        else:
            raise BadSample("bad_item", f"Item {number} of the document is neither text nor image: {str(item)[:80]}.")
    pieces += _encode_run(tokenizer, _spaced(run, pieces, framing))
    if tokenizer.eos_token_id is not None:
        pieces.append(TextPiece(np.asarray([tokenizer.eos_token_id], np.int64), "document"))
    return pieces


def encode_messages(
    tokenizer: Tokenizer, template: ChatTemplate, messages: list[dict], framing: Framing
) -> list[Piece]:
    """Pieces of a conversation as `template` renders it.

    Raises BadSample where the template refuses or changes the messages, and ConfigError where it cannot be used at all.
    """
    specials = tokenizer.special_pattern
    parts = template.split(messages, specials.search)
    starts_with_bos = tokenizer.bos_token and parts and parts[0].text.startswith(tokenizer.bos_token)
    pieces: list[Piece] = [_template(framing.prefix)] if framing.prefix and not starts_with_bos else []
    run: list[Part] = []
    images = 0
    for part in _split_at_specials(parts, specials):
        if part.literal or specials.fullmatch(part.text) is None:
            run.append(part)
            continue
        pieces += _encode_run(tokenizer, _spaced(run, pieces, framing))
        run = []
        if part.text == framing.image:
            pieces += _image(images, pieces, framing)
            images += 1
        else:
            pieces.append(TextPiece(np.asarray([tokenizer.added_tokens[part.text]], np.int64), part.origin, part.turn))
    pieces += _encode_run(tokenizer, _spaced(run, pieces, framing))
    expected = sum(item["type"] == "image" for message in messages for item in content_items(message))
    if images != expected:
        raise BadSample("image_count", f"The chat template places {images} images where the messages hold {expected}.")
    return _merge(pieces)


def _template(ids: list[int]) -> TextPiece:
    return TextPiece(np.asarray(ids, np.int64), "template")


def _image(number: int, before: list[Piece], framing: Framing) -> list[Piece]:
    """The piece of an image, opened where it does not follow another image."""
    follows = bool(before) and isinstance(before[-1], ImagePiece)
    return [ImagePiece(number)] if follows or not framing.opening else [_template(framing.opening), ImagePiece(number)]


def _spaced(run: list[Part], before: list[Piece], framing: Framing) -> list[Part]:
    """The run with a space before a word that is glued to an image, where the framing asks for it."""
    text = "".join(part.text for part in run)
    glued = bool(before) and isinstance(before[-1], ImagePiece) and text[:1] not in ("", "<") and not text[0].isspace()
    return [replace(run[0], text=" " + run[0].text), *run[1:]] if glued and framing.space_after_image else run


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
    cut = next((number for number, part in enumerate(parts) if part.cut), 0)
    ids, ends = tokenizer.encode_plain(text)
    if cut:
        head, head_ends = tokenizer.encode_plain("".join(part.text for part in parts[:cut]))
        if not np.array_equal(ids[: len(head)], head):  # a token reaches over the end of the prompt
            border = sum(len(part.text) for part in parts[:cut])
            tail, tail_ends = tokenizer.encode_plain(text[border:], continued=True)
            ids, ends = np.concatenate([head, tail]), np.concatenate([head_ends, tail_ends + border])
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
