"""A folder of pictures, each with a text or record of the same name next to it: `a.jpg` and `a.txt`, `a.json` or both, as
img2dataset writes them, in any depth of folders."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m4train.data.documents.sample import Sample
from m4train.data.sources.base import Member, ScannedSample, StoredFiles, content_hash
from m4train.data.sources.csv_records import BYTE_ORDER_MARK
from m4train.data.sources.fields import Reading
from m4train.data.sources.record_files import is_picture, walk_folder
from m4train.data.sources.records import Composed, image_member, unchanged
from m4train.data.sources.tar_formats import Pairs, check_own_picture, json_of
from m4train.data.storage.files import FileReader, Range
from m4train.errors import BadSample

# What tools write about a dataset, next to it.
ABOUT = re.compile(r"(dataset_infos?|dataset_dict|state|.*_stats|package|.*\.config)\.json", re.IGNORECASE)
SAID = (".txt", ".caption", ".json")  # what is said of a picture, in a file of its name


class PictureFolder(StoredFiles):
    """Each picture and its text are a document. A member's `offset` names its file: it is a hash of the path in the folder."""

    name = "picture_folder"
    settings: Mapping[str, Any] = {"rules": 3}
    honours = Pairs.honours

    def __init__(self, reading: Reading = Reading()) -> None:  # noqa: B008 (frozen)
        self.reading = reading
        self._pairs = Pairs(reading)
        self._names: dict[str, dict[int, str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (PictureFolder, (self.reading,), {"image_range": self.image_range, "settings": self.settings})

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        for key, (pictures, texts) in _samples(path).items():
            named = tuple(os.path.join(path, name) for name in (*pictures, *texts))
            folder = os.path.dirname(os.path.join(path, key))
            try:
                members, unread = self._members(files, path, pictures, texts)
                yield ScannedSample(key, members, files=(*named, folder), unread=unread)
            except BadSample as error:
                yield ScannedSample(key, bad=(error.reason, error.detail), files=(*named, folder))

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return len(_samples(path))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        texts = [(member.part, self._read(files, path, member)) for member in members if not member.is_image]
        return self._composed(texts).sample

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        pictures = [member for member in members if member.is_image]
        return [self._read(files, path, pictures[number]) for number in wanted]

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        return []

    def keep(self, window: int, pool: int) -> None:
        return  # samples are read one by one

    def blocks(self, files: FileReader, path: str) -> None:
        return None

    def _members(
        self, files: FileReader, path: str, pictures: Sequence[str], texts: Sequence[str]
    ) -> tuple[tuple[Member, ...], tuple[str, ...]]:
        """The members of a sample, its texts first, and the fields of its record that are not read. Raises BadSample."""
        if len(pictures) != 1:
            found = f"{len(pictures)} pictures: {', '.join(pictures)}" if pictures else "no picture"
            advice = "keep one for each text" if pictures else "add one of the same name, or remove the text"
            if any(
                name.lower().endswith(".txt") and b"," in files.read(os.path.join(path, name), 0, 200) for name in texts
            ):
                advice += " (or name it in path, with format=csv, if it is a table of pictures)"
            raise BadSample(
                "missing_image", f"there {'are' if pictures else 'is'} {found} next to {', '.join(texts)}: {advice}"
            )
        parts = [(_part(name), name) for name in sorted(texts, key=_part)]
        if not parts or len(dict(parts)) < len(parts):
            found = f"{len(parts)} texts" if parts else "no text"
            raise BadSample(
                "no_text",
                f"there {'are' if parts else 'is'} {found} next to {pictures[0]}: write one of the same name, ending in .txt",
            )
        read = [(part, files.whole(os.path.join(path, name))) for part, name in parts]
        for part, data in read:
            if part == Pairs.RECORD:
                check_own_picture(json_of(data), pictures[0], self.reading)
        unread = self._composed(read).record.unread(blind=False)
        members = [
            Member(_number_of(name), len(data), content_hash(data), part=part)
            for (_, name), (part, data) in zip(parts, read)
        ]
        data = files.whole(os.path.join(path, pictures[0]))
        return (*members, image_member(data, 0, _number_of(pictures[0]), len(data), pictures[0])), unread

    def _composed(self, texts: Sequence[tuple[int, bytes]]) -> Composed:
        """The pair of these texts, as `Pairs` reads them, without the blanks around a text. Raises BadSample."""
        return self._pairs.composed(
            [
                (part, data if part == Pairs.RECORD else data.removeprefix(BYTE_ORDER_MARK).strip())
                for part, data in texts
            ]
        )

    def _read(self, files: FileReader, path: str, member: Member) -> bytes:
        """The file of a member. Raises BadSample if it is gone or not the one indexed."""
        names = self._names.get(path, {})
        if member.offset not in names:
            found = [name for pictures, texts in _samples(path).values() for name in (*pictures, *texts)]
            self._names[path] = names = {_number_of(name): name for name in found}
        advice = "restore it, or run `m4train data index` to index what there is now"
        try:
            data = files.whole(os.path.join(path, names[member.offset]))
        except (KeyError, FileNotFoundError):
            raise BadSample(
                "missing_image", f"a file of {path} was there when it was indexed and is gone: {advice}"
            ) from None
        return unchanged(data, member, names[member.offset])


def _samples(path: str) -> dict[str, tuple[list[str], list[str]]]:
    """The pictures and the texts of every sample, by their paths in the folder without an extension, in order."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    alone: list[str] = []  # JSON files: those of no picture may be about something else
    for folder, _, names in walk_folder(path):
        for name in names:
            relative = os.path.relpath(os.path.join(folder, name), path)
            kind = 0 if is_picture(name) else 1 if os.path.splitext(name)[1].lower() in SAID else None
            if kind is None:
                continue
            if name.lower().endswith(".json"):
                alone.append(relative)
            else:
                found.setdefault(os.path.splitext(relative)[0], ([], []))[kind].append(relative)
    with_records = {os.path.dirname(name) for name in alone if os.path.splitext(name)[0] in found}
    for relative in alone:
        stem = os.path.splitext(relative)[0]
        if stem in found or (
            os.path.dirname(relative) in with_records and not ABOUT.fullmatch(os.path.basename(relative))
        ):
            found.setdefault(stem, ([], []))[1].append(relative)
    return dict(sorted(found.items()))


def _part(name: str) -> int:
    """Which part of a pair a file is that says something of a picture."""
    return Pairs.RECORD if name.lower().endswith(".json") else Pairs.CAPTION


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")
