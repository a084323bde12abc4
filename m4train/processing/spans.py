"""Rows of ids as spans of text and images, so that truncation cuts the one and not the other."""

from __future__ import annotations

from collections.abc import Sequence

Span = tuple[list[int], bool]  # ids, and whether they are an image


def spans_around_images(ids: list[int], image_id: int) -> list[Span]:
    """A row cut around its images, each of which is one `image_id` between two tokens, with nothing put around it.

    Of images side by side, which share a token, the first has it: the others begin with `image_id`.
    """
    spans: list[Span] = [([], False)]
    done = 0
    for place in (place for place, id_ in enumerate(ids) if id_ == image_id):
        start = max(place - 1, done)
        if start > done:
            spans.append((ids[done:start], False))
        spans.append((ids[start : place + 2], True))
        done = place + 2
    return [*spans, (ids[done:], False), ([], False)]


def truncate(
    spans: Sequence[Span], limit: int | None, side: str, bos: int | None = None, opening: Sequence[int] = ()
) -> list[Span]:
    """The spans that fit in `limit` ids, cut at the end or (`side` "left") at the beginning, what is put around kept.

    The first and the last span are what is put around, and so is a `bos` that the text begins with. Text may be cut; an
    image that would be is dropped, with everything after it. An image that loses the one before it to a cut on the
    left gets the `opening` that they shared.
    """
    if limit is None:
        return list(spans)
    prefix, *body, suffix = spans
    if body and bos is not None and body[0][0][:1] == [bos]:
        prefix, body[0] = ([*prefix[0], bos], False), (body[0][0][1:], body[0][1])
    room = limit - len(prefix[0]) - len(suffix[0])
    opened = list(opening) if side == "left" else []
    kept: list[Span] = []
    for ids, image in body if side == "right" else reversed(body):
        whole = [*opened, *ids] if image and ids[: len(opened)] != opened else ids
        if len(whole) > room:
            part = [] if image or room <= 0 else ids[:room] if side == "right" else ids[-room:]
            if image and kept and kept[-1][1] and kept[-1][0][: len(opened)] != opened:
                kept[-1] = ([*opened, *kept[-1][0]], True)
            kept.append((part, False))
            break
        kept.append((ids, image))
        room -= len(ids)
    return [prefix, *(kept if side == "right" else reversed(kept)), suffix]
