"""Records with images and text, as parquet rows and JSON objects hold them: conversations, question-answer pairs, and
documents of parallel lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from m4train.data.documents.sample import Sample
from m4train.data.sources.base import Member, content_hash
from m4train.data.sources.dialogues import dialogue, question_answer_pairs
from m4train.data.sources.tar_layouts import interleaved
from m4train.errors import BadSample
from m4train.processing.images import read_image_info

IMAGE_COLUMNS = ("images", "image")
TEXT_COLUMNS = ("texts", "messages", "conversations")
OTHER_COLUMNS = ("system", "url", "general_metadata")


def record_sample(record: Any, places: Sequence[str | None] | None = None) -> Sample:
    """The sample of a record: `texts` with `user` and `assistant` (The Cauldron, FineVision, Docmatix), `texts` next to
    `images` (OBELICS), or turns with a role (LLaVA, ShareGPT, OpenAI, LLaVA-OneVision).

    `places` are the names of its images, null if its column of images has none; if not given, the record names them.
    Raises BadSample.
    """
    if not isinstance(record, dict):
        raise BadSample("bad_json", f"a {type(record).__name__} where an object is expected")
    if places is None:
        places = image_column(record)
        if not all(place is None or isinstance(place, str) for place in places):
            raise BadSample("bad_json", "`images` must be a list of paths or data URLs")
    texts = record.get("texts")
    names = [place for place in places if place is not None]
    if not texts or not isinstance(texts, list):
        return dialogue(record, names)
    kinds = [text for text in texts if isinstance(text, dict)]
    if not kinds:
        return replace(interleaved({"images": list(places), "texts": texts}), source=_origin(record))
    return question_answer_pairs(texts, names, record.get("system")) if "user" in kinds[0] else dialogue(record, names)


def _origin(record: dict[str, Any]) -> dict[str, Any]:
    """Where a web document comes from: its URL and, in OBELICS, its place in a WARC file."""
    try:
        general = json.loads(record.get("general_metadata") or "{}")
    except ValueError as error:
        raise BadSample("bad_json", f"`general_metadata` is not JSON: {error}") from None
    names = ("url", "warc_filename", "warc_record_offset", "warc_record_length")
    return {name: general[name] for name in names if name in general} or {"url": record.get("url")}


def image_column(record: dict[str, Any]) -> list[Any]:
    """What a record has under `images` or `image`, as a list."""
    value: Any = next((record[name] for name in IMAGE_COLUMNS if record.get(name) is not None), [])
    return value if isinstance(value, list) else [value]


def text_hash(record: dict[str, Any]) -> int:
    """Tells a record's text from changed text."""
    text = {name: record[name] for name in (*TEXT_COLUMNS, "system") if record.get(name) is not None}
    return content_hash(json.dumps(text, default=str, sort_keys=True).encode())


def image_member(data: bytes, number: int, offset: int = 0, size: int = 0) -> Member:
    """The member of image `number` of a record. Raises BadSample if it is not an image."""
    try:
        info = read_image_info(data)
    except BadSample as error:
        raise BadSample(error.reason, f"image {number}: {error.detail}") from None
    return Member(offset, size, content_hash(data), info.width, info.height, number)


def unchanged(data: bytes, member: Member, what: str) -> bytes:
    """`data`, if it is what was indexed. Raises BadSample otherwise."""
    if content_hash(data) != member.hash:
        raise BadSample("damaged", f"{what} has other bytes than when it was indexed")
    return data
