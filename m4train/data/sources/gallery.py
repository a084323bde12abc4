"""The pictures of a record: gathered from its fields, numbered, and put where its texts have places for them.

What is numbered is whatever the record holds of a picture: a path, a URL, base64, or bytes. The items of the sample name their
picture by its number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from itertools import islice
from types import NoneType
from typing import Any

from m4train.data.sources.fields import PICTURE_COLUMNS, PICTURES, Record
from m4train.data.sources.media import is_empty, looks_like_media, speaks_of_media, written
from m4train.data.sources.placeholders import Place, Placeholders
from m4train.errors import BadSample, described
from m4train.processing.images import PICTURE_EXTENSIONS

_PLACEHOLDER = re.compile(r"[^\w\s].*[^\w\s]")  # as a name that a record gives a picture: in signs of some kind
NUMBERED = re.compile(r"image_?(\d{1,3})")
_CONTENTS = ("bytes", "base64", "data", "path", "url", "image_url", "uri", "file", "filename", "image")
_ABOUT = ("type", "media_type", "mime_type", "width", "height", "detail", "format", "alt", "crc32", "text")

Item = dict[str, Any]


class Own:
    """A picture that an item of a content brings itself."""

    def __init__(self, value: Any) -> None:
        self.value = value


def picture_of(value: Any, record: Record, path: str) -> Any:
    """A picture as text or bytes, None if there is none, from what a field or an item holds of it. Raises BadSample."""
    if isinstance(value, dict):
        if is_empty(value):
            return None
        part = record.part(value, path)
        part.leave(*_ABOUT)
        found = part.first(*_CONTENTS)
        part.read.update(_CONTENTS)  # the bytes and the path of one picture are one
        if found is None:
            raise BadSample("bad_json", f"`{path}` is {described(value)}, but without a picture")
        return picture_of(found, part, "url") if isinstance(found, dict) else picture_of(found, part, path)
    if is_empty(value):
        return None
    if not isinstance(value, (str, bytes)):
        raise BadSample("bad_json", f"`{path}` must be a path, a data URL or bytes, but is a {type(value).__name__}")
    return value


def listed_pictures(record: Record) -> tuple[list[Any], tuple[str, ...]]:
    """The pictures under `image`, `images`, `image_1` ..., None for each that is missing, and the placeholders by which the
    record names them, if it does. Raises BadSample if fields that are filled differ."""
    found: list[tuple[str, list[Any]]] = []
    names: tuple[str, ...] = ()
    for name in (*PICTURES, *_by_another_name(record)):
        value = _listed(record.get(name))
        if isinstance(value, dict) and value and all(_PLACEHOLDER.fullmatch(str(key)) for key in value):
            names, value = tuple(map(str, value)), list(value.values())
        values = value if isinstance(value, list) else [] if is_empty(value) else [value]
        if all(isinstance(each, str) and not each.strip() for each in values):
            values = []  # as tables and programs write that there is none
        pictures = [picture_of(each, record, record.named(name)) for each in values]
        if any(picture is not None for picture in pictures) or (pictures and not found):
            found.append((record.named(name), pictures))
    numbered = _numbered(record)
    if numbered:
        if found and not _NUMBERED_FIRST.intersection(name for name, _ in numbered):
            found[-1] = (found[-1][0], [*found[-1][1], *(value for _, value in numbered)])
        else:
            found.append((numbered[0][0], [value for _, value in numbered]))
    filled = [each for each in found if any(picture is not None for picture in each[1])]
    for name, pictures in filled[1:]:
        if pictures != filled[0][1]:
            raise BadSample(
                "conflicting_images",
                f"`{filled[0][0]}` and `{name}` hold different pictures: say which one counts with fields={{image: ...}}",
            )
    return (filled or found or [("", [])])[0][1], names


_NUMBERED_FIRST = frozenset(("image_0", "image_1", "image0", "image1"))


def _by_another_name(record: Record) -> tuple[str, ...]:
    """The field that holds the picture of a record without `image` and `images`: by its name, and its value too."""
    if record.path or any(record.reading.fields.get(name) or record.holds(name) for name in PICTURES):
        return ()
    found = (name for name in PICTURE_COLUMNS if record.holds(name) and not record.reading.ignores(name, name))
    return tuple(islice((name for name in found if _is_one(name, _listed(record.content[name]))), 1))


def _is_one(name: str, value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(is_empty(each) or _is_one(name, each) for each in value)
    if isinstance(value, str) and not value.startswith("data:image/"):
        plain = value.strip().partition("?")[0]
        named = os.path.splitext(plain)[1].lower() in PICTURE_EXTENSIONS
        return named or (speaks_of_media(name) and ("://" in value or looks_like_media(value)))
    return isinstance(value, (str, bytes)) or (isinstance(value, dict) and bool({"bytes", "path"} & set(value)))


def _listed(value: Any) -> Any:
    """Pictures that are written as a list or an object, in JSON or as Python writes it; anything else, such as a path with
    brackets, as it is."""
    found = written(value)
    parts = found if isinstance(found, list) else list(found.values()) if isinstance(found, dict) else None
    return (
        value if parts is None or not all(isinstance(each, (str, dict, bytes, NoneType)) for each in parts) else found
    )


def _numbered(record: Record) -> list[tuple[str, Any]]:
    """The fields `image_1`, `image_2` ... in order, up to the last that is filled."""
    found = {}
    for name, value in record.content.items():
        match = NUMBERED.fullmatch(str(name))
        if match is not None:
            record.read.add(name)
            found[int(match[1])] = (name, picture_of(value, record, name))
    ordered = [found[number] for number in sorted(found)]
    while ordered and ordered[-1][1] is None:
        ordered.pop()
    return ordered


def _named(place: Place) -> Place | Own:
    return place if place.name is None else Own(place.name or None)


class Gallery:
    """Numbers the pictures of one record: `listed` are those that places in its texts stand for."""

    def __init__(self, listed: Sequence[Any], placeholders: Placeholders, names: tuple[str, ...] = ()) -> None:
        self.listed = list(listed)
        self.pictures: list[Any] = list(listed)
        self._placeholders, self._names = placeholders, names

    def parts(self, text: str, in_turns: bool = True) -> list[Item]:
        """The items of a text, with an open place wherever it has a placeholder."""
        split = self._placeholders.split(text, in_turns, self._names)
        return [{"image": _named(part)} if isinstance(part, Place) else {"text": part} for part in split]

    def fits(self, texts: Sequence[str]) -> bool:
        """Whether texts in which `<image>` is not understood as a rule have as many places as there are pictures."""
        split = [self._placeholders.split(text, True, self._names) for text in texts]
        places = [part for parts in split for part in parts if isinstance(part, Place)]
        return bool(places) and len(places) == len(self.listed)

    def fill(self, contents: Sequence[list[Item]], first: list[Item]) -> None:
        """Puts the pictures where the contents have places for them, or, where there is none, before the items of `first`.
        Raises BadSample if their numbers differ, or one of them is missing."""
        places = [item for content in contents for item in content if "image" in item]
        owned = [item for item in places if isinstance(item["image"], Own)]
        if self.listed and not places:
            first[:0] = [{"image": Place(number)} for number in range(len(self.listed))]
            places = first[: len(self.listed)]
        elif owned and len(owned) == len(places) and self.listed == [item["image"].value for item in owned]:
            self.listed = self.pictures = []  # the same pictures again are not further ones
        self._number(places, owned)
        for item in places:
            if isinstance(item["image"], Own):
                self.pictures.append(item["image"].value)
                item["image"] = len(self.pictures) - 1
            if self.pictures[item["image"]] is None:
                number = f"{item['image']} of {len(self.pictures)}"
                raise BadSample(
                    "missing_image",
                    f"image {number} is null or empty in the record: name it, or set missing_images=drop_sample to do without the sample",
                )
            item["image"] = str(item["image"])

    def _number(self, places: Sequence[Item], owned: Sequence[Item]) -> None:
        """Turns open places into numbers. Raises BadSample if they and the pictures do not match."""
        numbers = [item["image"].number for item in places if isinstance(item["image"], Place)]
        given = [number for number in numbers if number is not None]
        if given and len(given) < len(numbers):
            raise BadSample("image_count", "some places for images are numbered and others are not: number all or none")
        outside = [number for number in given if not 0 <= number < len(self.listed)]
        if outside:
            raise BadSample(
                "image_count", f"a place is for image {outside[0] + 1} of {len(self.listed)}, which is none"
            )
        used = len(set(given)) if given else len(numbers)
        if used != len(self.listed):
            found = f"{used} places for images but {len(self.listed)} images"
            found += f", next to {len(owned)} that name their own" if owned else ""
            raise BadSample(
                "image_count", f"{found}: give one for each, or say with placeholder=... what stands for one"
            )
        following = iter(range(len(self.listed)))
        for item in places:
            if isinstance(item["image"], Place):
                item["image"] = next(following) if item["image"].number is None else item["image"].number
