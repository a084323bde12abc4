"""Files of records, whatever they are written in: JSON, CSV. Their images are in files, in object stores or base64.

An image is a path, from the file's folder or the source's image_folder, the URL of an object store, or base64, plain or as a
data URL. Images on web pages are refused: fetch them first.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from m4train.data.documents.sample import Sample
from m4train.data.sources.base import Member, ScannedSample, StoredFiles, content_hash
from m4train.data.sources.fields import RECORD_OPTIONS, Reading
from m4train.data.sources.pictures import Pictures
from m4train.data.sources.records import Composed, compose, found_images, identity, kept_images, unchanged
from m4train.data.sources.tarfiles import is_junk
from m4train.data.storage.files import FileReader, Range, is_remote
from m4train.errors import BadSample
from m4train.processing.images import PICTURE_EXTENSIONS


def is_picture(name: str) -> bool:
    """Whether a file is a picture by its extension."""
    return os.path.splitext(name)[1].lower() in PICTURE_EXTENSIONS and not is_junk(name)


def walk_folder(folder: str) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk in the order of names, also behind links to folders, each folder once, without what is hidden or junk."""
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(place) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or is_junk(f"{name}/x")))
        yield place, folders, sorted(name for name in names if not (name.startswith(".") or is_junk(name)))


def is_metadata(path: str) -> bool:
    """Whether a file of records describes the pictures next to it."""
    return os.path.basename(path).lower().startswith("metadata.")


def _described(folder: str) -> Iterator[str]:
    """The pictures that the metadata of a folder should describe: not those below it that have metadata of their own."""
    for place, folders, names in walk_folder(folder):
        if place != folder and any(map(is_metadata, names)):
            folders.clear()
            continue
        yield from (os.path.join(place, name) for name in names if is_picture(name))


def _other_encoding(start: bytes) -> str | None:
    """The encoding of wide characters that a file begins in, with or without a mark of its byte order; None for any other."""
    if start.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "UTF-32"
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if len(start) == 4 and (start[1] == start[3] == 0 or start[0] == start[2] == 0) and any(start):
        return "UTF-16LE" if start[1] == 0 else "UTF-16BE"
    return None


class RecordFile(StoredFiles):
    """Files of records, each a stretch of bytes. A format says which stretches they are, and what each holds."""

    name = ""
    settings: Mapping[str, Any] = {"rules": 5}
    pictures = Pictures()
    honours = RECORD_OPTIONS

    def __init__(self, reading: Reading = Reading()) -> None:  # noqa: B008 (frozen)
        self.reading = reading

    def records(self, files: FileReader, path: str) -> Iterator[tuple[int, bytes | BadSample]]:
        """Byte offset and bytes of every record, or what is wrong with the file from there on."""
        raise NotImplementedError

    def parse(self, files: FileReader, path: str, raw: bytes) -> Any:
        """What the bytes of a record hold. Raises BadSample."""
        raise NotImplementedError

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        if not is_metadata(path) or is_remote(path) or self.pictures.folder is not None:
            yield from self._scan(files, path)
            return
        named: set[str] = set()
        for sample in self._scan(files, path):
            named.update(os.path.normpath(each) for each in sample.files)
            yield sample
        for picture in _described(os.path.dirname(path) or "."):
            if os.path.normpath(picture) not in named:
                key = os.path.relpath(picture, os.path.dirname(path) or ".")
                detail = f"no line of {os.path.basename(path)} names this picture: add one, or remove the picture"
                yield ScannedSample(key, bad=("no_text", detail), files=(picture,))

    def _scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        for number, (offset, raw) in enumerate(self._records(files, path)):
            key = str(number)
            named: tuple[str, ...] = ()
            try:
                if isinstance(raw, BadSample):
                    raise raw
                composed = compose(self.parse(files, path, raw), self.reading)
                named = self.pictures.files_of(path, [str(picture) for picture in composed.pictures])
                images, lost = found_images(
                    composed, self.reading, lambda name, n: self.pictures.find(files, path, str(name), n)
                )
                text = Member(offset, len(raw), content_hash(raw))
                sample = None if lost else composed.sample
                yield ScannedSample(
                    key,
                    (text, *images),
                    None,
                    named,
                    composed.unread() + lost,
                    identity(composed.sample, images),
                    sample,
                )
            except BadSample as error:
                yield ScannedSample(key, bad=(error.reason, error.detail), files=named)

    def _records(self, files: FileReader, path: str) -> Iterator[tuple[int, bytes | BadSample]]:
        """`records`, of a file in UTF-8; of any other what is wrong with it."""
        with files.open(path) as file:
            encoding = _other_encoding(file.read(4))
        if encoding is None:
            yield from self.records(files, path)
            return
        detail = f"the file is written in {encoding}: save it as UTF-8, as with `iconv -f {encoding} -t UTF-8`"
        yield 0, BadSample("bad_text", detail)

    def count(self, files: FileReader, path: str, limit: int) -> int:
        return sum(1 for _ in islice(self._records(files, path), limit + 1))

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        return self._composed(files, path, members).sample

    def _composed(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Composed:
        text = members[0]
        raw = unchanged(files.read(path, text.offset, text.size), text, f"the record at byte {text.offset}")
        return compose(self.parse(files, path, raw), self.reading, kept=kept_images(members, self.reading))

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        if not wanted:
            return []
        composed = self._composed(files, path, members)
        names = [str(composed.pictures[int(composed.sample.images[number])]) for number in wanted]
        return self.pictures.read(files, path, names, [members[1 + number] for number in wanted])

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        """The records: they say where their images are."""
        return [(path, members[0].offset, members[0].size)]

    def keep(self, window: int, pool: int) -> None:
        return  # samples are read one by one

    def blocks(self, files: FileReader, path: str) -> None:
        return None
