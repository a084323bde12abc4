"""Packs as the model sees them, on a page that can be read offline: what is trained on, masked, structural, and every frame."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m4train.data.documents.assemble import Document
from m4train.data.documents.pieces import IMAGE_KIND, PIECE_KINDS, Pieces
from m4train.data.loading.collate import Collator
from m4train.data.plan.packing import Unit
from m4train.data.plan.plan import PlannedPack
from m4train.errors import BadSample
from m4train.inspection.pages import render, write
from m4train.processing.protocol import SampleProcessor

_TEMPLATE = PIECE_KINDS.index("template")
_SMALL = 64  # pixels: frames up to this side are stored exactly, larger ones as JPEG
_ORIGINAL = 480  # pixels of the longest side of an original on a page
_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one kind: "trained", "masked" or "structural" text, or an "image" with its frames as data URIs.

    `columns` is how many of the frames are next to each other; what remains after whole rows comes below. `original` is the
    stored image. `ids` are the tokens of a trained span, and `scored` their texts with the loss of each, if it is known.
    """

    kind: str
    tokens: int
    text: str
    frames: tuple[str, ...] = ()
    columns: int = 1
    original: str = ""
    ids: tuple[int, ...] = ()
    scored: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class SegmentView:
    """One planned segment of a pack: tokens `begin` to `end` of it; `problem` says why the sample was dropped."""

    unit: Unit
    source: str
    key: str
    shard: str
    begin: int
    end: int
    spans: list[Span] = field(default_factory=list)
    images: int = 0
    loss_tokens: int = 0
    problem: str = ""
    variant: int = 0  # of the `variants` there are of the sample
    variants: int = 1
    loss: float | None = None  # mean over its loss tokens

    @property
    def tokens(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class PackView:
    """One pack: its segments in order, and the two budgets."""

    number: int
    segments: list[SegmentView]
    capacity: int
    frames: int

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def loss_tokens(self) -> int:
        return sum(segment.loss_tokens for segment in self.segments)


def view_pack(collator: Collator, pack: PlannedPack) -> PackView:
    """Builds a planned pack exactly as training does, keeping what it is made of. A dropped sample takes no tokens."""
    segments: list[SegmentView] = []
    for unit in pack.units:
        located = collator.locate(unit)
        begin = segments[-1].end if segments else 0
        where = (unit, located.source.name, located.key, located.shard.shard, begin)
        try:
            document = collator.document(unit, pack.number)
        except BadSample as error:
            segments.append(SegmentView(*where, begin, problem=f"{error.reason}: {error.detail}"))
            continue
        originals = [image_uri(image) for image in collator.originals(unit, _ORIGINAL)]
        spans = document_spans(document, collator.planned(unit), collator.processor, originals)
        record = document.record
        segments.append(
            SegmentView(
                *where,
                end=begin + record.tokens,
                spans=spans,
                images=record.images,
                loss_tokens=record.loss_tokens,
                variant=located.variant,
                variants=located.shard.variants,
            )
        )
    return PackView(pack.number, segments, collator.data.sequence_length, pack.frames)


def document_spans(
    document: Document, pieces: Pieces, processor: SampleProcessor, originals: Sequence[str] = ()
) -> list[Span]:
    """The tokens of a document in order, as spans of one kind; `pieces` are those it was rendered from, `originals` its images."""
    rendered, begin = document.rendered, 0
    spans: list[Span] = []
    frames, stored = iter(rendered.frames), iter(originals)
    classes = np.where(document.trained, "trained", np.where(rendered.kinds == _TEMPLATE, "structural", "masked"))
    text_from = 0
    for kind, tokens in zip(pieces.kinds.tolist(), pieces.tokens.tolist()):
        if kind == IMAGE_KIND:
            spans += _text_spans(rendered.ids, classes, text_from, begin, processor)
            shown = _image_span(rendered.ids[begin : begin + tokens], next(frames), processor)
            spans.append(replace(shown, original=next(stored, "")))
            text_from = begin + tokens
        begin += tokens
    return [*spans, *_text_spans(rendered.ids, classes, text_from, begin, processor)]


def _text_spans(
    ids: np.ndarray, classes: np.ndarray, begin: int, end: int, processor: SampleProcessor
) -> Iterator[Span]:
    if begin == end:
        return
    changes = np.flatnonzero(classes[begin + 1 : end] != classes[begin : end - 1]) + begin + 1
    borders = [begin, *changes.tolist(), end]
    for first, last in pairwise(borders):
        own = tuple(ids[first:last].tolist()) if classes[first] == "trained" else ()
        yield Span(str(classes[first]), last - first, processor.decode(ids[first:last]), ids=own)


def _image_span(ids: np.ndarray, frames: Sequence[np.ndarray], processor: SampleProcessor) -> Span:
    places = _TILE.findall(processor.decode(ids))
    columns = max((int(column) for _, column in places), default=len(frames))
    return Span("image", len(ids), "", tuple(frame_uri(frame) for frame in frames), columns)


def frame_uri(frame: np.ndarray) -> str:
    """A frame (3, H, W) uint8, before it is normalised, as a data URI."""
    return image_uri(Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0))))


def image_uri(image: Image.Image) -> str:
    """An image as a data URI, exact if it is small."""
    kind, options = ("png", {}) if max(image.size) <= _SMALL else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(
    path: Path, title: str, subtitle: str, packs: Sequence[PackView], neighbours: Sequence[Any] = ()
) -> None:
    """Writes `preview_page` as one HTML file; it needs no network."""
    write(path, preview_page(title, subtitle, packs, neighbours))


def preview_page(title: str, subtitle: str, packs: Sequence[PackView], neighbours: Sequence[Any] = ()) -> str:
    """The packs as a page; `neighbours` are (name, link) of pages around it. Documents whose loss is known are also listed by it."""
    anchors = [f"pack-{pack.number}-{place}" for pack in packs for place in range(len(pack.segments))]
    around = iter(zip(["", *anchors], anchors, [*anchors[1:], ""]))
    shown: list[dict[str, Any]] = []
    places = iter(range(len(anchors)))
    for pack in packs:
        segments = []
        for segment in pack.segments:
            before, anchor, after = next(around)
            scored = [token for span in segment.spans for token in span.scored]
            worst = sorted(scored, key=lambda token: -token[1])[:5]
            about: dict[str, Any] = {
                "tokens": segment.tokens,
                "pack": pack.number,
                "place": next(places),
                "worst": worst,
            }
            segments.append({**vars(segment), **about, "anchor": anchor, "before": before, "after": after})
        whole: dict[str, Any] = {
            "number": pack.number,
            "tokens": pack.tokens,
            "loss_tokens": pack.loss_tokens,
            "frames": pack.frames,
        }
        shown.append({**whole, "capacity": pack.capacity, "shown": segments})
    known = [segment for pack in shown for segment in pack["shown"] if segment["loss"] is not None]
    ranked = sorted(known, key=lambda segment: -segment["loss"])
    return render("preview.html.j2", title=title, subtitle=subtitle, packs=shown, ranked=ranked, neighbours=neighbours)
