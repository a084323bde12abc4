"""Tar formats of other projects, read in place."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from m4train.data.documents.sample import Sample, json_value, sample_from_dict
from m4train.data.sources.fields import PICTURE_COLUMNS, PICTURES, Reading, Record
from m4train.data.sources.media import words
from m4train.data.sources.records import Composed, checked, compose, has_form, learning
from m4train.data.sources.tar import Ref, TarFormat
from m4train.data.sources.tarfiles import TarMember
from m4train.errors import BadSample
from m4train.processing.images import PICTURE_EXTENSIONS

Named = Mapping[str, TarMember]
Read = Callable[[str], bytes]


def _is_image(suffix: str) -> bool:
    return os.path.splitext(f"_.{suffix}")[1].lower() in PICTURE_EXTENSIONS


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", f"a text is not UTF-8: {error}") from None


def json_of(data: bytes) -> Any:
    try:
        return json_value(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("bad_json", f"not JSON in UTF-8: {error}") from None


def need(named: Named, suffix: str) -> None:
    if suffix not in named:
        raise BadSample("missing_member", f"no member {suffix!r} among {sorted(named)}")


class _Numbered(TarFormat):
    """The formats of the Idefics trainer m4: `K.{i}.image.jpeg`, `K.{i}.text.txt`, i counting both from 0 without a gap, and
    `K.metadata.txt`, a list of them all."""

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        texts: list[Ref] = []
        images: list[Ref] = []
        for suffix in named:
            number, _, kind = suffix.partition(".")
            if number.isdecimal() and kind.startswith(("text.", "image.")):
                (texts if kind.startswith("text.") else images).append(Ref(suffix, int(number)))
        if not texts:
            raise BadSample("missing_member", f"no numbered text among {sorted(named)}")
        _check_numbers([*texts, *images], key)
        if "metadata.txt" in named:
            _check_listed(_text(read("metadata.txt")), key, named)
        return sorted(texts, key=lambda ref: ref.part), sorted(images, key=lambda ref: ref.part)


def _check_numbers(refs: Sequence[Ref], key: str) -> None:
    """Raises BadSample unless the parts are numbered 0, 1, 2 ...: a gap is a lost part, and not every sample lists its parts."""
    numbers = sorted(ref.part for ref in refs)
    for number, found in enumerate(numbers):
        if found < number:
            twice = sorted(ref.suffix for ref in refs if ref.part == found)
            raise BadSample("duplicate_member", f"{key} has two parts numbered {found}: {', '.join(twice)}")
        if found > number:
            raise BadSample("missing_member", f"{key} has no part numbered {number}, but one numbered {numbers[-1]}")


def _check_listed(metadata: str, key: str, named: Named) -> None:
    """Raises BadSample if `K.metadata.txt` lists a member that the shard does not hold."""
    try:
        listed = ast.literal_eval(metadata)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        listed = None
    if not isinstance(listed, (list, tuple)):
        raise BadSample("bad_text", "metadata.txt is not a list of member names")
    lost = [name for name in listed if str(name).removeprefix(key + ".") not in named]
    if lost:
        raise BadSample("missing_member", f"metadata.txt lists {lost[0]!r}, which the shard does not hold")


class M4Documents(_Numbered):
    """Web documents of m4: texts and images numbered in reading order."""

    name = "m4_documents"

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        items: dict[int, dict[str, str]] = {part: {"image": f"{part}"} for part in images}
        items |= {part: {"text": _text(data)} for part, data in texts}
        return checked(sample_from_dict({"items": [items[part] for part in sorted(items)]}), self.reading)


class M4Conversations(_Numbered):
    """Instruction data of m4: the images, then the turns as JSON, in one text or going on in the next."""

    name = "m4_conversations"
    honours = frozenset({"placeholder"})

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        texts, images = super().find(key, named, read)
        if images and images[-1].part > texts[0].part:
            detail = f"image {images[-1].suffix!r} follows {texts[0].suffix!r}, but images must come before all turns"
            raise BadSample("image_order", detail)
        return texts, images

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return self._composed(texts, images).sample

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record:
        return self._composed(texts, images).record

    def _composed(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Composed:
        turns = []
        for part, data in texts:
            more = json_of(data)
            if not isinstance(more, list):
                raise BadSample("bad_json", f"text {part} is a {type(more).__name__}, but must be a list of turns")
            turns += more
        return compose({"texts": turns}, self.reading, [str(part) for part in images])


_BOXES = re.compile(r"\s*(?:\d+(?:[ \t]+-?\d*\.\d+(?:e-?\d+)?){4,}\s*)+")  # a class and where it is, on each line
# What img2dataset writes of each picture that it fetched.
_DOWNLOADED = words("url key status error_message width height original_width original_height exif sha256 md5 alt")


class Pairs(TarFormat):
    """One image and what is said of it: `K.jpg` and `K.txt`, or `K.json`, a record of any form that may name its image (img2dataset,
    LAION and COYO: `caption`); also m4's `K.image.jpeg` and `K.text.txt`, and its `K.question.txt` and `K.answer.txt`. Next to a
    text, `K.json` is what is known about the pair: its `url`, `weight` and the like."""

    name = "pairs"
    settings: Mapping[str, Any] = {"rules": 4}
    honours = frozenset({"fields", "where", "placeholder"})
    _QUESTION, _ANSWER, CAPTION, RECORD = range(4)

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        images = [Ref(suffix) for suffix in named if _is_image(suffix)]
        if len(images) != 1:
            raise BadSample("missing_image", f"one image is expected among {sorted(named)}")
        record = [Ref("json", self.RECORD)] if "json" in named else []
        if record:
            check_own_picture(json_of(read("json")), f"{key}.{images[0].suffix}", self.reading)
        if "question.txt" in named:
            need(named, "answer.txt")
            return [Ref("question.txt", self._QUESTION), Ref("answer.txt", self._ANSWER), *record], images
        text = next((suffix for suffix in ("txt", "text.txt", "caption") if suffix in named), None)
        if text is not None:
            return [Ref(text, self.CAPTION), *record], images
        need(named, "json")
        return record, images

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return self.composed(texts).sample

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record:
        return self.composed(texts).record

    def composed(self, texts: Sequence[tuple[int, bytes]]) -> Composed:
        """The pair of these texts, by their parts, and what of its record was read. Raises BadSample."""
        found = dict(texts)
        content = json_of(found[self.RECORD]) if self.RECORD in found else {}
        if not isinstance(content, dict):
            raise BadSample("bad_json", f"the record is a {type(content).__name__} where an object is expected")
        content = {name: value for name, value in content.items() if not _names_picture(name, value, self.reading)}
        if self._QUESTION in found:
            said = {"question": _text(found[self._QUESTION]), "answer": _text(found[self._ANSWER])}
        elif self.CAPTION in found:
            said = {"caption": _text(found[self.CAPTION]).strip("\ufeff")}
            if _BOXES.fullmatch(said["caption"]):
                raise BadSample(
                    "no_text",
                    "its text is the boxes of a detector and not words: leave such texts out, or put words into them",
                )
        else:
            said = {}
        if not (has_form(said, Reading()) if said else has_form(content, self.reading)):
            raise BadSample("no_text", "nothing is said of the image: its text is empty")
        if said:
            record = Record(content, self.reading)
            record.leave(record.named("caption"), *self.reading.where_fields)
            self.reading.check_where(content)
            composed = compose(said | learning(record), Reading(placeholders=self.reading.placeholders), ["0"])
            composed = replace(composed, record=record)
        else:
            composed = compose(content, self.reading, ["0"])
            if composed.interleaved:
                raise BadSample("bad_json", "its record is a document of several images, but it has one")
        composed.record.leave(*_DOWNLOADED)
        url = content.get("url")
        return replace(composed, sample=replace(composed.sample, source={"url": url} if url else {}))


def _names_picture(name: str, value: Any, reading: Reading) -> bool:
    """Whether a field of a record says which picture comes with it."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    names = {*PICTURE_COLUMNS, *PICTURES, *(reading.fields.get(field, field) for field in PICTURES)}
    return name in names and isinstance(value, str) and _is_image(os.path.basename(value)[-12:])


def check_own_picture(content: Any, picture: str, reading: Reading) -> None:
    """Raises BadSample if a record names another picture than the one that comes with it."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if _names_picture(name, value, reading):
            named = os.path.basename(value[0] if isinstance(value, list) else value)
            if named != os.path.basename(picture):
                detail = f"its record names {named!r} under {name!r}, but {os.path.basename(picture)!r} comes with it"
                raise BadSample("conflicting_images", detail)


class LlavaOneVision(TarFormat):
    """LLaVA-OneVision-1.5: `K.json` with `texts` (role and content) and `name`, and one image `K.jpg` or several `K.{i}_{name}`.

    The images are those of `name`, in its order; without it, all there are, in the order of their numbers. The variant that
    packs several samples into one (`images`, `prompts`, `captions`) is refused.
    """

    name = "llava_onevision"
    honours = frozenset({"fields", "where", "placeholder"})

    def find(self, key: str, named: Named, read: Read) -> tuple[list[Ref], list[Ref]]:
        need(named, "json")
        record = json_of(read("json"))
        if isinstance(record, dict) and "captions" in record and "texts" not in record:
            detail = "the packed variant (`images`, `prompts`, `captions`) is not read: use the set before packing"
            raise BadSample("packed_variant", detail)
        stored = sorted((suffix for suffix in named if _is_image(suffix)), key=_leading_number)
        names = record.get("name") if isinstance(record, dict) else None
        refs = [Ref(suffix, part) for part, suffix in enumerate(_in_order(names, stored) if names else stored)]
        self.compose([(0, read("json"))], range(len(refs)))
        return [Ref("json")], refs

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        return self._composed(texts, images).sample

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record:
        record = self._composed(texts, images).record
        record.leave("name", "media")
        return record

    def _composed(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Composed:
        return compose(json_of(texts[0][1]), self.reading, [str(part) for part in images])


def _in_order(names: Any, stored: Sequence[str]) -> list[str]:
    """The member of each of the `names`: `{name}`, `{i}_{name}`, or the only one, `K.jpg`; the name itself if none is."""
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise BadSample("bad_json", "`name` must be a list of image names")
    if len(names) == len(stored) == 1 and "." not in stored[0]:
        return list(stored)
    candidates = [(name, f"{place}_{name}") for place, name in enumerate(names)]
    return [next((suffix for suffix in some if suffix in stored), some[0]) for some in candidates]


def _leading_number(suffix: str) -> tuple[int, str]:
    number = re.match(r"\d+", os.path.basename(suffix))
    return (int(number[0]) if number else -1), suffix
