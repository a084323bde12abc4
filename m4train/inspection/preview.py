"""Packs as the model sees them, on a page that can be read offline: what is trained on, masked, structural, and every frame."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader
from PIL import Image

import m4train
from m4train.data.documents.assemble import Document
from m4train.data.documents.pieces import IMAGE_KIND, PIECE_KINDS, Pieces
from m4train.data.loading.collate import Collator
from m4train.data.plan.packing import Unit
from m4train.data.plan.plan import PlannedPack
from m4train.errors import BadSample
from m4train.processing.protocol import SampleProcessor

_TEMPLATE = PIECE_KINDS.index("template")
_SMALL = 64  # pixels: frames up to this side are stored exactly, larger ones as JPEG
_TILE = re.compile(r"<row_(\d+)_col_(\d+)>")


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of one kind: "trained", "masked" or "structural" text, or an "image" with its frames as data URIs.

    `columns` is how many of the frames are next to each other; what remains after whole rows comes below.
    """

    kind: str
    tokens: int
    text: str
    frames: tuple[str, ...] = ()
    columns: int = 1


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
        spans = document_spans(document, collator.planned(unit), collator.processor)
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


def document_spans(document: Document, pieces: Pieces, processor: SampleProcessor) -> list[Span]:
    """The tokens of a document in order, as spans of one kind; `pieces` are those it was rendered from."""
    rendered, begin = document.rendered, 0
    spans: list[Span] = []
    frames = iter(rendered.frames)
    classes = np.where(document.trained, "trained", np.where(rendered.kinds == _TEMPLATE, "structural", "masked"))
    text_from = 0
    for kind, tokens in zip(pieces.kinds.tolist(), pieces.tokens.tolist()):
        if kind == IMAGE_KIND:
            spans += _text_spans(rendered.ids, classes, text_from, begin, processor)
            spans.append(_image_span(rendered.ids[begin : begin + tokens], next(frames), processor))
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
        yield Span(str(classes[first]), last - first, processor.decode(ids[first:last]))


def _image_span(ids: np.ndarray, frames: Sequence[np.ndarray], processor: SampleProcessor) -> Span:
    places = _TILE.findall(processor.decode(ids))
    columns = max((int(column) for _, column in places), default=len(frames))
    return Span("image", len(ids), "", tuple(frame_uri(frame) for frame in frames), columns)


def frame_uri(frame: np.ndarray) -> str:
    """A frame (3, H, W) uint8, before it is normalised, as a data URI."""
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    kind, options = ("png", {}) if max(image.size) <= _SMALL else ("jpeg", {"quality": 85})
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_page(path: Path, title: str, subtitle: str, packs: Sequence[PackView]) -> None:
    """Writes one HTML file with the packs; it needs no network and no script."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    template = environment.get_template("preview.html.j2")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(template.render(title=title, subtitle=subtitle, packs=packs, version=m4train.__version__))
