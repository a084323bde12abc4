"""Documents and conversations as pieces: the same ids as encoding the whole string, with what each span of text is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from m4train.errors import BadSample
from m4train.processing.chat import ChatTemplate, TextSpan, content_items
from m4train.processing.pieces import ImagePiece, Piece, TextPiece
from m4train.processing.tokenizer import Place, Tokenizer


@dataclass(frozen=True)
class Framing:
    """What a processor writes around text and images.

    `prefix`: ids before every sample (bos, usually). `opening`: ids before an image that does not follow another one;
    they do not belong to the ids of the image. `image`: the placeholder that chat templates write for an image;
    `edge`: the token that the expansion of an image, opened, begins and ends with.
    `space_after_image`: whether a word glued to an image is encoded as if a space came before it.
    """

    prefix: list[int]
    opening: list[int]
    image: str
    edge: str
    space_after_image: bool = False


def encode_document(tokenizer: Tokenizer, items: list[dict], framing: Framing) -> list[Piece]:
    """Pieces of an interleaved document: what comes first, one piece per item, and eos.

    Consecutive texts are encoded as one string and cut where the items meet. Raises BadSample for an item that is neither
    {"text": ...} nor {"image": ...}.
    """
    builder = _Builder(tokenizer, framing, framing.prefix)
    for number, item in enumerate(items):
        if isinstance(item.get("text"), str):
            builder.text(TextSpan(item["text"], "document", number, literal=True))
        elif item.get("image") is not None:
            builder.image()
        else:
            raise BadSample("bad_item", f"Item {number} of the document is neither text nor image: {str(item)[:80]}.")
    if tokenizer.eos_token is not None:
        builder.token(tokenizer.eos_token, "document", -1)
    return builder.finish()


def encode_messages(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: list[dict],
    framing: Framing,
    prompt: bool = False,
    **variables: Any,
) -> list[Piece]:
    """Pieces of a conversation as `template` renders it, with the given variables; a `prompt` asks for an answer.

    Raises BadSample if the template refuses or changes the messages, and ConfigError if it cannot be used at all.
    """
    specials = tokenizer.special_pattern
    spans = template.split(messages, specials.search, prompt, **variables)
    beginning = spans[0].text if spans and not spans[0].literal else ""
    writes_bos = bool(tokenizer.bos_token) and beginning.startswith(tokenizer.bos_token or "")
    builder = _Builder(tokenizer, framing, [] if writes_bos else framing.prefix)
    for span in _split_at_specials(spans, specials):
        if span.literal or specials.fullmatch(span.text) is None:
            builder.text(span)
        elif span.text == framing.image:
            builder.image()
        else:
            builder.token(span.text, span.origin, span.turn)
    pieces = builder.finish()
    expected = sum(item["type"] == "image" for message in messages for item in content_items(message))
    if builder.images != expected:
        raise BadSample(
            "image_count", f"The chat template places {builder.images} images, but the messages hold {expected}."
        )
    return _merge(pieces)


class _Builder:
    """Gathers pieces in reading order; text between two tokens or images is encoded as one string."""

    def __init__(self, tokenizer: Tokenizer, framing: Framing, prefix: list[int]) -> None:
        self.tokenizer = tokenizer
        self.framing = framing
        self.pieces: list[Piece] = [_text(prefix, "template")] if prefix else []
        self.images = 0
        self._spans: list[TextSpan] = []
        self._place: Place = "start"
        self._before: str | None = None  # the token before the text being gathered

    def text(self, span: TextSpan) -> None:
        self._spans.append(span)

    def token(self, token: str, origin: str, turn: int) -> None:
        self._flush(token)
        self.pieces.append(_text([self.tokenizer.added_tokens[token]], origin, turn))

    def image(self) -> None:
        self._flush(self.framing.edge)
        follows = bool(self.pieces) and isinstance(self.pieces[-1], ImagePiece)
        if self.framing.opening and not follows:
            self.pieces.append(_text(self.framing.opening, "template"))
        self.pieces.append(ImagePiece(self.images))
        self.images += 1

    def finish(self) -> list[Piece]:
        self._flush()
        return self.pieces

    def _flush(self, after: str | None = None) -> None:
        """Encodes the text gathered since the last token or image; `after` is the token that comes next."""
        spans = _trimmed(self._spans, self.tokenizer, self._before, after)
        text = "".join(span.text for span in spans)
        after_image = bool(self.pieces) and isinstance(self.pieces[-1], ImagePiece)
        if after_image and self.framing.space_after_image and text and not (text[0].isspace() or text[0] == "<"):
            spans[0] = replace(spans[0], text=" " + spans[0].text)
        if text:
            self.pieces += _encode_spans(self.tokenizer, spans, self._place)
        self._spans, self._place, self._before = [], "after_token", after


def _trimmed(spans: list[TextSpan], tokenizer: Tokenizer, before: str | None, after: str | None) -> list[TextSpan]:
    """The spans without the white space at their ends that neighbouring tokens swallow, and without empty spans."""
    spans = [span for span in spans if span.text]
    while spans and (first := tokenizer.trim(spans[0].text, before, None)) != spans[0].text:
        spans = [replace(spans[0], text=first), *spans[1:]] if first else spans[1:]
    while spans and (last := tokenizer.trim(spans[-1].text, None, after)) != spans[-1].text:
        spans = [*spans[:-1], replace(spans[-1], text=last)] if last else spans[:-1]
    return spans


def _split_at_specials(spans: list[TextSpan], specials: re.Pattern) -> Iterator[TextSpan]:
    """Spans of the template cut around the special tokens in them; spans that are data stay whole."""
    for span in spans:
        if span.literal:
            yield span
            continue
        cut, position = span.cut, 0
        for match in specials.finditer(span.text):
            for text in (span.text[position : match.start()], match.group()):
                if text:
                    yield TextSpan(text, span.origin, span.turn, cut=cut)
                    cut = False
            position = match.end()
        if position < len(span.text):
            yield TextSpan(span.text[position:], span.origin, span.turn, cut=cut)


def _encode_spans(tokenizer: Tokenizer, spans: list[TextSpan], place: Place) -> list[Piece]:
    """Encodes consecutive text as one string; a token belongs to the span that holds its last character.

    If a prompt ends inside, the ids before are those of the prompt alone, so that training and inference see the same.
    """
    if len(spans) == 1:
        return (
            [TextPiece(ids, spans[0].origin, spans[0].turn)]
            if len(ids := tokenizer.plain_ids(spans[0].text, place))
            else []
        )
    text = "".join(span.text for span in spans)
    cut = next((number for number, span in enumerate(spans) if span.cut), 0)
    ids, ends = tokenizer.encode_plain(text, place)
    if cut:
        prompt = "".join(span.text for span in spans[:cut])
        head, head_ends = tokenizer.encode_plain(prompt, place)
        if not np.array_equal(ids[: len(head)], head):  # a token would reach over the end of the prompt
            tail, tail_ends = tokenizer.encode_plain(text[len(prompt) :], "inside")
            ids, ends = np.concatenate([head, tail]), np.concatenate([head_ends, tail_ends + len(prompt)])
    pieces: list[Piece] = []
    start = border = 0
    for span in spans:
        border += len(span.text)
        stop = len(ids) if border == len(text) else int(np.searchsorted(ends, border, side="right"))
        if stop > start:
            pieces.append(TextPiece(ids[start:stop], span.origin, span.turn))
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


def _text(ids: list[int], origin: str, turn: int = -1) -> TextPiece:
    return TextPiece(np.asarray(ids, np.int64), origin, turn)
