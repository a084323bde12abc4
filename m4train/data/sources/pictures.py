"""Pictures that a record names: files in the folder of its shard or in the source's image_folder, URLs of object stores, and
pictures as base64."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from m4train.data.sources.base import Member
from m4train.data.sources.records import image_member, unchanged
from m4train.data.storage.files import FileReader, is_remote
from m4train.errors import BadSample, ConfigError
from m4train.processing.images import read_image_info
from m4train.processing.inputs import from_base64

IN_FILE, IN_RECORD = 0, 1  # where a picture is stored, as its member's offset
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(//)?", re.IGNORECASE)
_WEB = ("http", "https", "ftp", "ftps")
_LONGEST_NAME = 255  # characters of a file name
_SHOWN = 200  # characters of a name in a message


@dataclass(frozen=True)
class Pictures:
    """Finds what records name. `folder`: the root of relative paths; if not given, the folder of their shard."""

    folder: str | None = None

    def place(self, shard: str, name: str) -> str | None:
        """The path or URL of the file that a name means; None if the name can only be the picture itself.

        Raises BadSample for a page of the web: pictures are fetched before training.
        """
        scheme = _SCHEME.match(name)
        kind = scheme[1].lower() if scheme else ""
        if kind == "data" or (len(name) > _LONGEST_NAME and "." not in name):
            return None
        if scheme and scheme[2] and kind in _WEB:
            detail = f"{name[:_SHOWN]} is a URL: fetch the images before training, and name the files in its place"
            raise BadSample("remote_image", detail)
        if kind == "file":
            name = unquote(re.sub(r"^file:(//(localhost)?(?=/))?", "", name, flags=re.IGNORECASE))
        elif scheme and scheme[2]:
            return name
        root = self.folder if self.folder is not None else os.path.dirname(shard)
        return _as_stored(os.path.join(os.path.expanduser(root), name))

    def files_of(self, shard: str, names: Sequence[str]) -> tuple[str, ...]:
        """The local files that names mean, whether they are there or not."""
        found = []
        for name in names:
            try:
                place = self.place(shard, name)
            except BadSample:
                continue
            if place is not None and not is_remote(place):
                found.append(place)
        return tuple(found)

    def find(self, files: FileReader, shard: str, name: str, number: int) -> Member:
        """The member of image `number` of a record, by its name. Raises BadSample."""
        try:
            data, offset = self.stored(files, shard, name)
        except BadSample as error:
            raise BadSample(error.reason, f"image {number}: {error.detail}") from None
        what = self.called(shard, name, number) if offset == IN_FILE else ""
        return image_member(data, number, offset, len(data) if offset == IN_FILE else 0, what)

    def called(self, shard: str, name: str, number: int) -> str:
        """What image `number` of a record is called in messages: with its file, if it is in one."""
        place = self.place(shard, name)
        return str(number) if place is None else f"{number} ({place[:1000]})"

    def read(self, files: FileReader, shard: str, names: Sequence[str], members: Sequence[Member]) -> list[bytes]:
        """The stored bytes of these pictures of one record. Raises BadSample if one is gone or not the one indexed."""
        found = []
        for name, member in zip(names, members):
            place = self.place(shard, name) if member.offset == IN_FILE else None
            what = f"image {member.part} ({place or name[:80]})"
            try:
                data = from_base64(name) if place is None else files.whole(place)
            except FileNotFoundError:
                raise BadSample("missing_image", f"{what} was there when it was indexed and is gone: {_MEND}") from None
            if place is not None and len(data) != member.size:
                raise BadSample("damaged", f"{what} has {len(data)} bytes, but had {member.size} when indexed: {_MEND}")
            found.append(unchanged(data, member, what))
        return found

    def stored(self, files: FileReader, shard: str, name: str) -> tuple[bytes, int]:
        """The bytes of a picture, and where they are stored. Raises BadSample."""
        place = self.place(shard, name)
        if place is None:
            return from_base64(name), IN_RECORD
        try:
            return files.whole(place), IN_FILE
        except FileNotFoundError:
            coded = _short_base64(name)
            if coded is None:
                raise BadSample("missing_image", f"no file {place[:1000]}: {_advice(name, self.folder)}") from None
            return coded, IN_RECORD
        except (ConfigError, ValueError) as error:
            if not is_remote(place):
                raise
            raise BadSample("remote_image", f"{name[:_SHOWN]} cannot be opened: {error}") from None


def _as_stored(path: str) -> str:
    """A local path as its file is called if that is written otherwise: with the slashes of Windows, or with accents as macOS
    or others write them."""
    if is_remote(path) or (path.isascii() and "\\" not in path) or os.path.exists(path):
        return path
    slashes = path.replace("\\", "/")
    others = (unicodedata.normalize(form, each) for each in (path, slashes) for form in ("NFC", "NFD"))
    return next((each for each in (slashes, *others) if os.path.exists(each)), path)


def _advice(name: str, folder: str | None) -> str:
    if os.path.isabs(name):
        return "put it there, or correct the name"
    known = "image_folder, where relative names begin," if folder is not None else "the name"
    return f"put it there, or correct {known}" + (
        "" if folder is not None else ", or set image_folder to where relative names begin"
    )


_MEND = "restore it, or run `m4train data index` to index what there is now"


def _short_base64(name: str) -> bytes | None:
    """The image that a name is in base64, for the smallest ones are no longer than a path; None if it is not base64."""
    try:
        data = from_base64(name)
        read_image_info(data)
    except BadSample:
        return None
    return data
