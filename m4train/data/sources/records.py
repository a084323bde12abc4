"""Records with images and text, as parquet rows, JSON objects and some tar files hold them: which form a record has, the sample
it is, and what of it was not read."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import xxhash

from m4train.data.documents.learning import refused
from m4train.data.documents.sample import Sample, sample_from_dict
from m4train.data.sources.answers import answered, asked_often, caption_pairs, with_chosen, with_context
from m4train.data.sources.base import Member, content_hash
from m4train.data.sources.dialogues import NAME_IN_TEXT, parsed, placed, question_answer_pairs, turns, with_system
from m4train.data.sources.fields import (
    CAPTIONS,
    PICTURE_COLUMNS,
    PICTURES,
    QUESTIONS,
    TITLE,
    TURNS,
    Reading,
    Record,
    asking,
)
from m4train.data.sources.gallery import NUMBERED, Gallery, listed_pictures, picture_of
from m4train.data.sources.media import is_empty, looks_like_media, says_nothing
from m4train.data.sources.placeholders import LITERAL, Placeholders, stray, what_to_do
from m4train.errors import BadSample, described
from m4train.processing.images import frames_in, read_image_info

_BAD_LABELS = ("false", "rejected", "undesirable", "dispreferred")
# Elsewhere these may be the name of a class.
_BAD_NEXT_TO_A_COMPLETION = (*_BAD_LABELS, "no", "0", "-1", "bad", "negative", "wrong", "incorrect", "dislike")
PLACEHOLDER = "placeholder"  # in a canonical sample: literal, or it is not there
MISSING = ("missing_image", "remote_image")  # reasons why an image is not there
_ABOUT = ("source", "url", "general_metadata", "label")  # what is read of a record that is neither text nor picture


@dataclass(frozen=True)
class Composed:
    """A record as a sample whose images are named by their numbers in `pictures`: what the record holds of each, text or
    bytes. `text` is what else was read."""

    sample: Sample
    pictures: list[Any]
    text: dict[str, Any]
    record: Record
    interleaved: bool  # a document that can do without one of its images

    def unread(self) -> tuple[str, ...]:
        """The fields that were not read. Raises BadSample `unread_media` if one of them holds a picture, video or sound."""
        return self.record.unread(blind=not self.sample.images)


def compose(
    content: Any, reading: Reading, stored: Sequence[str] | None = None, kept: Collection[int] | None = None
) -> Composed:
    """The sample of a record, whatever its form. Raises BadSample.

    `stored`: the images come with the record, under these names, and it names none itself. `kept`: the numbers of the
    pictures that were there when the record was indexed, if missing ones may be left out of documents.
    """
    try:
        return _composed(content, reading, stored, kept)
    except BadSample as error:
        raise by_choice(error, reading) from None


def by_choice(error: BadSample, reading: Reading) -> BadSample:
    """What is wrong with a sample: if an image is missing and that is no reason to stop, that it is left out by choice."""
    if reading.missing_images == "drop_sample" and error.reason in MISSING:
        return BadSample("skipped", f"missing_images=drop_sample leaves it out: {error.detail}")
    return error


def _composed(content: Any, reading: Reading, stored: Sequence[str] | None, kept: Collection[int] | None) -> Composed:
    if not isinstance(content, dict):
        raise BadSample("bad_json", f"a {type(content).__name__} where an object is expected")
    record = Record(content, reading)
    record.leave(*reading.where_fields)
    reading.check_where(content)
    if "label" not in reading.fields.values() and _not_preferred(content):
        raise BadSample(
            "not_preferred", f"its `label` is {described(content['label'])}: an answer that should not be learned"
        )
    form = _form(record)
    if form == "documents":
        data, pictures = interleaved(record, kept)
        sample = sample_from_dict(data | {"source": _origin(record)} | learning(record))
    else:
        listed, names = (list(stored), ()) if stored is not None else listed_pictures(record)
        gallery = Gallery(listed, reading.placeholders, names)
        source = content.get(record.named("source"))  # one of the known fields, which may be left as well
        about = {"source": {"dataset": source} if source and isinstance(source, str) else {}}
        sample = sample_from_dict(about | _FORMS[form](record, gallery) | learning(record))
        pictures = gallery.pictures
    text = {name: value for name, value in content.items() if name in record.read and value is not None}
    text = {name: value for name, value in text.items() if name not in _ABOUT and not _is_picture(name, reading)}
    return Composed(checked(sample, reading), pictures, text, record, form == "documents")


def learning(record: Record) -> dict[str, float]:
    """How much a record is learnt, as the `weight` of its sample. Raises BadSample `not_preferred` and `not_learnt` for one that
    is left out."""
    for name, poor in refused(record.about_learning()):
        record.read.add(name)
        if poor:
            raise BadSample(
                "not_preferred",
                f"its {name!r} is {described(record.content[name])}: an answer that should not be learned",
            )
    weight = record.weight("a record")
    if weight == 0:
        raise BadSample(
            "not_learnt",
            f"it says that it is not learnt: {', '.join(f'{n!r} is {described(v)}' for n, v in record.about_learning().items())}",
        )
    return {} if weight == 1 else {"weight": weight}


def _not_preferred(content: dict[str, Any]) -> bool:
    """Whether a record says that its answer is a bad one. A number may be the number of a class, except next to a completion."""
    label, completed = content.get("label"), "completion" in content
    if isinstance(label, (int, float)) and not isinstance(label, bool):
        return completed and label <= 0
    if isinstance(label, str):
        return label.strip().lower() in (_BAD_NEXT_TO_A_COMPLETION if completed else _BAD_LABELS)
    return label is False


def _is_picture(name: str, reading: Reading) -> bool:
    named = {reading.fields.get(field, field) for field in PICTURES} | set(PICTURE_COLUMNS)
    return NUMBERED.fullmatch(name) is not None or name in named


def checked(sample: Sample, reading: Reading) -> Sample:
    """The sample, if it may be learned from. Raises BadSample `stray_placeholder` and `empty_answer`."""
    for message in sample.messages or ():
        said = "".join(item.get("text", "") for item in message["content"])
        if message["role"] == "assistant" and message.get("weight", 1) > 0 and not said.strip():
            raise BadSample(
                "empty_answer",
                "an answer says nothing, so that only its end would be learned: write it, or give it the weight 0",
            )
        if message["role"] == "assistant" and message.get("weight", 1) > 0 and says_nothing(said):
            raise BadSample(
                "empty_answer", f"an answer is {said.strip()!r}, which programs write for one that is missing"
            )
    if not reading.placeholders.literal and (found := shaped_like_media(sample)) is not None:
        raise found
    return sample


def shaped_like_media(sample: Sample) -> BadSample | None:
    """What in the texts of a sample is shaped like a place for a picture, or is the name of one that it does not have; None if
    nothing is."""
    for item in sample.all_items():
        found = stray(item.get("text", ""))
        if found is not None:
            return BadSample("stray_placeholder", f"a text holds {found!r}, which {what_to_do(found, item['text'])}")
    if sample.images:
        return None
    for message in sample.messages or [{"role": "user", "content": sample.items}]:
        for item in message["content"] if message["role"] == "user" else ():
            if looks_like_media(item.get("text", "")):
                return BadSample("unread_media", NAME_IN_TEXT.format(item["text"].strip()[:120]))
    return None


def marked_literal(content: dict[str, Any]) -> dict[str, Any]:
    """The canonical JSON of a sample whose images are all named, with the mark that its texts are text and stand for none, if they hold
    something that would else be taken for one."""
    return content if shaped_like_media(sample_from_dict(content)) is None else content | {PLACEHOLDER: LITERAL}


def marked(content: Mapping[str, Any], reading: Reading) -> Reading:
    """How a canonical sample is read: its texts as nothing but text if it says so. Raises BadSample for another mark."""
    said = content.get(PLACEHOLDER)
    if said is None:
        return reading
    if said != LITERAL:
        raise BadSample("bad_json", f"{PLACEHOLDER!r} is {said!r}, but in a canonical sample can only be {LITERAL!r}")
    return replace(reading, placeholders=Placeholders((LITERAL,)))


def _form(record: Record) -> str:
    """Which of _FORMS a record has."""
    found = next((name for name in TURNS if record.offers(name)), None)
    if (
        found is None
        and isinstance(record.content.get(record.named("texts")), list)
        and record.content.get(record.named("images"))
        and not any(isinstance(text, dict) for text in record.content[record.named("texts")])
    ):
        found = "texts"  # a document that is nothing but images
    if found == "texts":
        texts = parsed(record.content[record.named("texts")], "texts")
        kinds = [text for text in texts if isinstance(text, dict)] if isinstance(texts, list) else []
        if not kinds:
            return "documents"
        return "exchanges" if record.named("user") in kinds[0] or "user" in kinds[0] else "turns"
    if found is not None:
        return "turns"
    if any(record.offers(name) for name in asking()):
        return "answers"
    if record.offers(QUESTIONS) and record.offers("answers"):
        return "questions"
    caption = next((name for name in CAPTIONS if record.offers(name)), None)
    if caption == "text" and record.offers("question_id"):
        raise BadSample(
            "empty_answer",
            "it has a `question_id`, so that its `text` is a question, but no answer: leave it with "
            "ignore_fields=[question_id] if the text is a caption",
        )
    if caption is not None or (record.holds(TITLE) and _has_pictures(record) and not record.offers("answers")):
        return "captions"
    raise BadSample("bad_json", _unknown(record))


def _unknown(record: Record) -> str:
    """What is said of a record that has none of the forms."""
    names = ", ".join(f"`{name}`" for name in (*TURNS, *asking(), QUESTIONS, *CAPTIONS))
    holds = " ".join(", ".join(sorted(map(str, record.content))).split())[:500] or "nothing"
    tables = (
        str(name)
        for name, value in record.content.items()
        if isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, dict) for each in value)
        and name not in PICTURES
    )
    table = next(tables, None)
    way_out = "say which is which, as fields={question: ..., answer: ...} or {caption: ...}"
    if table is not None:
        way_out = f"if the samples are those listed under {table!r}, write each on a line of its own, with its picture and text"
    return f"it holds nothing under {names}, but {holds}: {way_out}"


def _has_pictures(record: Record) -> bool:
    names = {str(name) for name, value in record.content.items() if not is_empty(value)}
    listed = {record.named(name) for name in PICTURES} | set(PICTURE_COLUMNS)
    return bool(names & listed) or any(NUMBERED.fullmatch(name) for name in names)


def has_form(content: Any, reading: Reading) -> bool:
    """Whether a record has a form that is known, whatever else may be wrong with it."""
    try:
        return isinstance(content, dict) and bool(_form(Record(content, reading)))
    except BadSample:
        return False


def _turns(record: Record, gallery: Gallery) -> dict[str, Any]:
    name = next(name for name in TURNS if record.offers(name))
    messages = with_chosen(with_context(turns(record, name, gallery), record), record, gallery)
    return {"messages": placed(with_system(messages, record, gallery), gallery)}


def _exchanges(record: Record, gallery: Gallery) -> dict[str, Any]:
    messages, dataset = question_answer_pairs(record, "texts", gallery)
    data = {"messages": placed(with_system(with_context(messages, record), record, gallery), gallery)}
    return data | ({"source": {"dataset": dataset}} if dataset else {})


def _questions(record: Record, gallery: Gallery) -> dict[str, Any]:
    return {"messages": placed(with_system(asked_often(record, gallery), record, gallery), gallery)}


def _answers(record: Record, gallery: Gallery) -> dict[str, Any]:
    return {"messages": placed(with_system(answered(record, gallery), record, gallery), gallery)}


_FORMS: dict[str, Callable[[Record, Gallery], dict[str, Any]]] = {
    "turns": _turns,
    "exchanges": _exchanges,
    "answers": _answers,
    "questions": _questions,
    "captions": caption_pairs,
}


def interleaved(record: Record, kept: Collection[int] | None = None) -> tuple[dict[str, Any], list[Any]]:
    """A document of parallel lists `images` and `texts`, of which exactly one has something at each place, and its pictures.

    Raises BadSample, also for a place that holds nothing, unless missing images may be left out.
    """
    texts = parsed(record.get("texts"), "texts")
    name = "image" if record.holds("image") and not record.holds("images") else "images"
    images = record.get(name)
    images = [] if images is None else images if isinstance(images, list) else [images]
    if not isinstance(texts, list):
        raise BadSample("bad_json", "`texts` must be a list")
    if not is_empty(images) and record.holds("image") and record.holds("images"):
        raise BadSample("conflicting_images", "`images` and `image` are both filled")
    if is_empty(images) and not images:
        images = [None] * len(texts)
    if len(images) != len(texts):
        raise BadSample("image_count", f"`images` has {len(images)} places but `texts` {len(texts)}")
    missing = record.reading.missing_images
    items: list[dict[str, Any]] = []
    pictures: list[Any] = []
    for place, (image, text) in enumerate(zip(images, texts)):
        empty = is_empty(image)
        if text is not None and not isinstance(text, str):
            raise BadSample("bad_json", f"`texts`[{place}] is a {type(text).__name__}, but must be a string or null")
        if empty == (text is None):
            if empty and missing == "drop_image":
                continue
            if empty and missing == "drop_sample":
                raise BadSample("missing_image", f"the image at place {place} is missing")
            found = "neither text nor image" if empty else "both text and image"
            raise BadSample("bad_json", f"place {place} holds {found}")
        if empty:
            items.append({"text": text})
            continue
        if kept is None or len(pictures) in kept:
            items.append({"image": str(len(pictures))})
        pictures.append(picture_of(image, record, name))
    record.leave("metadata", "image_metadata")  # OBELICS and MINT-1T: what is said there of each image
    if not items:
        raise BadSample("no_text", "nothing is left of the document without its missing images")
    return {"items": items}, pictures


def _origin(record: Record) -> dict[str, Any]:
    """Where a web document comes from: its URL and, in OBELICS, its place in a WARC file."""
    general = parsed(record.get("general_metadata") or "{}", "general_metadata")
    names = ("url", "warc_filename", "warc_record_offset", "warc_record_length")
    found = {name: general[name] for name in names if name in general} if isinstance(general, dict) else {}
    return found or {"url": record.get("url")}


def found_images(
    composed: Composed, reading: Reading, find: Callable[[Any, int], Member]
) -> tuple[list[Member], tuple[str, ...]]:
    """The members of the images of a sample, as `find` makes them of a picture and its number; and, if missing ones may be
    left out of documents, a word if that was done. Raises BadSample."""
    members, lost = [], False
    for name in composed.sample.images:
        number = int(name)
        try:
            members.append(find(composed.pictures[number], number))
        except BadSample as error:
            lost = reading.missing_images == "drop_image" and composed.interleaved
            if not lost or error.reason not in MISSING:
                raise by_choice(error, reading) from None
    return members, ("(an image that is missing)",) if lost else ()


def kept_images(members: Sequence[Member], reading: Reading) -> Collection[int] | None:
    """The numbers of the pictures that an indexed sample has, if it may have lost some; None if it has all."""
    return {member.part for member in members if member.is_image} if reading.missing_images == "drop_image" else None


def text_hash(text: dict[str, Any]) -> int:
    """Tells the text of a record from changed text."""
    return content_hash(json.dumps(text, default=str, sort_keys=True).encode())


def identity(sample: Sample, images: Sequence[Member]) -> int:
    """63 bits of what a sample says and shows: its roles, texts and the bytes of its images, but not how its file is written,
    what its images are called, or what else is said about it."""
    spoken = [
        (message["role"], message["content"]) for message in sample.messages or [{"role": "", "content": sample.items}]
    ]
    texts = [[role, [item.get("text") for item in items]] for role, items in spoken]
    said = json.dumps([texts, [image.hash for image in images]]).encode()
    return xxhash.xxh3_64_intdigest(said) >> 1


def image_member(data: bytes, number: int, offset: int = 0, size: int = 0, what: str = "") -> Member:
    """The member of image `number` of a record, called `what` in messages. Raises BadSample if it is not an image."""
    try:
        info = read_image_info(data)
    except BadSample as error:
        raise BadSample(error.reason, f"image {what or number}: {error.detail}") from None
    return Member(offset, size, content_hash(data), info.width, info.height, number, frames_in(data))


def unchanged(data: bytes, member: Member, what: str) -> bytes:
    """`data`, if it is what was indexed. Raises BadSample otherwise."""
    if content_hash(data) != member.hash:
        raise BadSample("damaged", f"{what} has other bytes than when it was indexed")
    return data
