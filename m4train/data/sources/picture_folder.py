"""A folder of pictures, each with a text of the same name next to it: `a.jpg` and `a.txt`, in any depth of folders."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from m4train.data.documents.sample import Sample, sample_from_dict
from m4train.data.sources.base import Member, ScannedSample, StoredFiles, content_hash
from m4train.data.sources.fields import Reading
from m4train.data.sources.records import image_member, unchanged
from m4train.data.sources.tarfiles import is_junk
from m4train.data.storage.files import FileReader, Range
from m4train.errors import BadSample
from m4train.processing.images import PICTURE_EXTENSIONS

_TEXTS = (".txt", ".caption")


class PictureFolder(StoredFiles):
    """Each picture and its text are a document. A member's `offset` names its file: it is a hash of the path in the folder."""

    name = "picture_folder"
    settings: Mapping[str, Any] = {}
    honours: frozenset[str] = frozenset()

    def __init__(self, reading: Reading = Reading()) -> None:  # noqa: B008 (frozen)
        self.reading = reading
        self._names: dict[str, dict[int, str]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (PictureFolder, (self.reading,), {"image_range": self.image_range, "settings": self.settings})

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        for key, (pictures, texts) in _samples(path).items():
            named = tuple(os.path.join(path, name) for name in (*pictures, *texts))
            folder = os.path.dirname(os.path.join(path, key))
            try:
                yield ScannedSample(key, self._members(files, path, pictures, texts), files=(*named, folder))
            except BadSample as error:
                yield ScannedSample(key, bad=(error.reason, error.detail), files=(*named, folder))

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return len(_samples(path))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        return _document(self._read(files, path, members[0]))

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        return [self._read(files, path, members[1 + number]) for number in wanted]

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        return []

    def keep(self, window: int, pool: int) -> None:
        return  # samples are read one by one

    def blocks(self, files: FileReader, path: str) -> None:
        return None

    def _members(
        self, files: FileReader, path: str, pictures: Sequence[str], texts: Sequence[str]
    ) -> tuple[Member, ...]:
        if len(pictures) != 1:
            found = f"{len(pictures)} pictures: {', '.join(pictures)}" if pictures else "no picture"
            raise BadSample("missing_image", f"there is {found} next to {', '.join(texts)}")
        if len(texts) != 1:
            found = f"{len(texts)} texts" if texts else "no text"
            raise BadSample(
                "no_text", f"there is {found} next to {pictures[0]}: write one of the same name, ending in .txt"
            )
        data, text = (files.whole(os.path.join(path, name)) for name in (pictures[0], texts[0]))
        _document(text)
        image = image_member(data, 0, _number_of(pictures[0]), len(data))
        return Member(_number_of(texts[0]), len(text), content_hash(text)), image

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


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its extension."""
    return os.path.splitext(name)[1].lower() in PICTURE_EXTENSIONS


def _samples(path: str) -> dict[str, tuple[list[str], list[str]]]:
    """The pictures and the texts of every sample, by their paths in the folder without an extension, in order."""
    found: dict[str, tuple[list[str], list[str]]] = {}
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            relative = os.path.relpath(os.path.join(folder, name), path)
            kind = 0 if is_picture(name) else 1 if os.path.splitext(name)[1].lower() in _TEXTS else None
            if kind is not None and not is_junk(relative) and not name.startswith("."):
                found.setdefault(os.path.splitext(relative)[0], ([], []))[kind].append(relative)
    return dict(sorted(found.items()))


def _document(text: bytes) -> Sample:
    try:
        said = text.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadSample("bad_text", f"the text is not UTF-8: {error}") from None
    if not said:
        raise BadSample("no_text", "the text is empty")
    return sample_from_dict({"items": [{"image": "0"}, {"text": said}]})


def _number_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=7).digest(), "little")
