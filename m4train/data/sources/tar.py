"""Samples in tar files: the canonical format, and what all tar formats share.

A format says which members of a sample are its texts and which its images, in reading order, and turns the texts into a
canonical sample. Scanning, byte ranges, checksums and damage are the same for all.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from PIL import Image

from m4train.data.documents.sample import Sample, parse_sample, shared_json
from m4train.data.sources.base import Member, ScannedSample, content_hash
from m4train.data.sources.fields import Reading, Record
from m4train.data.sources.media import looks_like_media, speaks_of_media
from m4train.data.sources.records import PLACEHOLDER, checked, learning, marked
from m4train.data.sources.tarfiles import TarDamage, TarMember, walk_tar
from m4train.data.storage.files import FileReader, Range
from m4train.errors import BadSample
from m4train.processing.images import decode_image, frames_in, read_image_info

_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # as webdataset splits: at the first dot of the file's name
_MAX_GAP = 1 << 16  # bytes between members that are cheaper to read than to skip


@dataclass(frozen=True)
class Ref:
    """A member by its suffix, the `part` to remember with it, and the crc32 it should have, if that is known."""

    suffix: str
    part: int = 0
    crc32: int | None = None


def suffix_of(name: str) -> str:
    """A suffix as formats look for it: that of a text in lower case, and that of an image as the text names it."""
    stem, dot, kind = name.rpartition(".")
    return f"{stem}{dot}{kind.lower()}" if kind.lower() in ("json", "txt") else name


def key_and_suffix(name: str) -> tuple[str, str] | None:
    """The key of a member's sample and what follows it, as webdataset splits them; None for a name without both."""
    match = _NAME.match(name)
    return (match[1], suffix_of(match[2])) if match else None


class TarFormat:
    """One sample is the consecutive members that share a key, as in webdataset. Formats fill in the first four methods."""

    name = ""
    settings: Mapping[str, Any] = {
        "rules": 3
    }  # raised when the same bytes are read as something else, so that indexes made before are renewed
    image_range: Sequence[float] = ()
    honours: frozenset[str] = (
        frozenset()
    )  # options of Reading that mean something here, with ignore_fields, and placeholder=literal
    known: tuple[str, ...] = ()  # members that the format leaves, by their suffix
    proves_itself = (
        False  # whether a sample says what members it has and what is in them: else damage next to it may be in it
    )

    def __init__(self, reading: Reading = Reading()) -> None:  # noqa: B008 (frozen)
        self.reading = reading

    def find(
        self, key: str, named: Mapping[str, TarMember], read: Callable[[str], bytes]
    ) -> tuple[list[Ref], list[Ref]]:
        """The texts and the images, each in reading order, of a sample with these suffixes. Raises BadSample."""
        raise NotImplementedError

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        """The sample from (part, bytes) of its texts and the parts of its images. Raises BadSample."""
        raise NotImplementedError

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record | None:
        """What of the texts was read, where they are JSON. Raises BadSample."""
        return None

    def picture_size(self, data: bytes, part: int) -> tuple[int, int]:
        """Upright width and height of image `part` in a member's bytes. Raises BadSample."""
        info = read_image_info(data)
        return info.width, info.height

    def frames(self, data: bytes, part: int) -> int:
        """How many pictures the file of image `part` holds, of which one is read."""
        return frames_in(data)

    def picture(self, data: bytes, part: int) -> Image.Image:
        """Image `part` of a member's bytes, decoded. Raises BadSample."""
        return decode_image(data, image_range=self.image_range)

    def file_of(self, data: bytes, part: int) -> bytes:
        """Image `part` of a member's bytes, as an image file. Raises BadSample."""
        return data

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        """Every sample, with the hash of each member and the size of each image; one pass over the shard."""
        seen: set[str] = set()
        for key, entries, torn in _by_key(walk_tar(files, path)):
            if key is None:
                yield from (_stray(entry) for entry in entries)
                continue
            members = [entry for entry in entries if isinstance(entry, TarMember)]
            found = self._scan_sample(files, path, key, members, torn)
            if key in seen:
                found = ScannedSample(key, bad=("duplicate_key", f"key {key!r} occurs earlier in the same shard"))
            seen.add(key)
            yield found

    def count(self, files: FileReader, path: str, limit: int) -> int:
        """Keys in the headers; stops soon after `limit`."""
        total = 0
        for _ in groupby(walk_tar(files, path), key=_group):
            total += 1
            if total > limit:
                break
        return total

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        texts = [member for member in members if not member.is_image]
        read = [
            (
                m.part,
                _checked(files.read(path, m.offset, m.size), m, "the text" if len(texts) == 1 else f"text {m.part}"),
            )
            for m in texts
        ]
        return self.compose(read, [member.part for member in members if member.is_image])

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        pictures = [member for member in members if member.is_image]
        stored = self._holders(files, path, members, wanted)
        return {number: self.picture(data, pictures[number].part) for number, data in zip(wanted, stored)}

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        pictures = [member for member in members if member.is_image]
        stored = self._holders(files, path, members, wanted)
        return [self.file_of(data, pictures[number].part) for number, data in zip(wanted, stored)]

    def _holders(self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[bytes]:
        """The members that hold the images numbered `wanted`: one read if they are next to each other, as they are written."""
        pictures = [member for member in members if member.is_image]
        chosen = [pictures[number] for number in wanted]
        if not chosen:
            return []
        first = min(member.offset for member in chosen)
        span = max(member.offset + member.size for member in chosen) - first
        if span <= sum(member.size for member in chosen) + _MAX_GAP:
            data = memoryview(files.read(path, first, span))
            parts = [bytes(data[m.offset - first : m.offset - first + m.size]) for m in chosen]
        else:
            parts = [files.read(path, m.offset, m.size) for m in chosen]
        return [_checked(part, member, f"image {number}") for number, member, part in zip(wanted, chosen, parts)]

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        pictures = [member for member in members if member.is_image]
        read = [member for member in members if not member.is_image] + [pictures[number] for number in wanted]
        return [(path, member.offset, member.size) for member in read]

    def keep(self, window: int, pool: int) -> None:
        return  # samples are read one by one

    def blocks(self, files: FileReader, path: str) -> None:
        return None

    def _scan_sample(
        self, files: FileReader, path: str, key: str, members: list[TarMember], torn: bool
    ) -> ScannedSample:
        """The sample of these members; `torn`: there is damage next to them."""
        named: dict[str, TarMember] = {}
        for member in members:
            suffix = suffix_of(member.name[len(key) + 1 :])
            if suffix in named:
                return ScannedSample(key, bad=("duplicate_member", f"member {member.name!r} occurs twice"))
            named[suffix] = member

        def read(suffix: str) -> bytes:
            return files.read(path, named[suffix].offset, named[suffix].size)

        try:
            texts, images, unread = self.resolve(key, named, read)
            if torn and not self.proves_itself:
                detail = f"the shard is damaged next to {sorted(named)}, so that members or bytes of them may be lost"
                raise BadSample("damaged_shard", detail)
            found = [_text(named[ref.suffix], ref, read(ref.suffix)) for ref in texts]
            found += [self._image(named[ref.suffix], ref, read(ref.suffix)) for ref in images]
            return ScannedSample(key, tuple(found), unread=unread)
        except BadSample as error:
            return ScannedSample(key, bad=(error.reason, error.detail))

    def resolve(
        self, key: str, named: Mapping[str, TarMember], read: Callable[[str], bytes]
    ) -> tuple[list[Ref], list[Ref], tuple[str, ...]]:
        """As `find`, with all members there, their checksums right, and the fields and members that are not read.
        Raises BadSample, naming the member at fault."""
        last = ""
        met: set[str] = set()

        def noted(suffix: str) -> bytes:
            nonlocal last
            last = suffix
            met.add(suffix)
            return read(suffix)

        try:
            texts, images = self.find(key, named, noted)
        except BadSample as error:
            raise BadSample(error.reason, f"{key}.{last}: {error.detail}" if last else error.detail) from None
        for ref in (*texts, *images):
            if ref.suffix not in named:
                detail = f"the text names {ref.suffix!r}, but the shard holds {sorted(named)}"
                raise BadSample("missing_image", detail)
            if ref.crc32 is not None and zlib.crc32(read(ref.suffix)) != ref.crc32:
                detail = f"image {ref.suffix!r} does not fit the checksum in the JSON: bytes were changed or moved"
                raise BadSample("damaged", detail)
        met.update(ref.suffix for ref in (*texts, *images))
        stored = [(ref.part, read(ref.suffix)) for ref in texts], [ref.part for ref in images]
        try:
            unread = self._unread_members([suffix for suffix in named if suffix not in met], blind=not images)
            return texts, images, unread + self._unread_fields(f"{key}.{texts[-1].suffix}", *stored)
        except BadSample:
            self.compose(*stored)  # what else is wrong is said first
            raise

    def _unread_fields(self, name: str, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> tuple[str, ...]:
        """The fields of the texts that nothing reads; `name` is that of their member. Raises BadSample."""
        record = self.record(texts, images)
        try:
            return () if record is None else record.unread(blind=not images)
        except BadSample as error:
            raise BadSample(error.reason, f"{name}: {error.detail}") from None

    def _unread_members(self, suffixes: Sequence[str], blind: bool) -> tuple[str, ...]:
        """The members that nothing reads. Raises BadSample `unread_media` if one is a picture, a video or a sound."""
        unread = []
        for suffix in suffixes:
            if suffix in self.known or self.reading.ignores(suffix, suffix):
                continue
            kind = suffix.rpartition(".")[2]
            if looks_like_media(f"x.{kind}") or speaks_of_media(suffix.partition(".")[0], blind):
                raise BadSample(
                    "unread_media",
                    f"member {suffix!r} is not read: name it in the text, or leave it with ignore_fields=['{suffix}']",
                )
            unread.append(f"member {kind}")
        return tuple(dict.fromkeys(unread))

    def _image(self, member: TarMember, ref: Ref, data: bytes) -> Member:
        try:
            width, height = self.picture_size(data, ref.part)
        except BadSample as error:
            raise BadSample(error.reason, f"image {ref.suffix!r}: {error.detail}") from None
        return Member(
            member.offset, member.size, content_hash(data), width, height, ref.part, self.frames(data, ref.part)
        )


class CanonicalTar(TarFormat):
    """`KEY.json` and the images it names."""

    name = "canonical"
    settings: Mapping[str, Any] = {}
    honours = frozenset({"where"})
    proves_itself = True

    def find(
        self, key: str, named: Mapping[str, TarMember], read: Callable[[str], bytes]
    ) -> tuple[list[Ref], list[Ref]]:
        if "json" not in named:
            dotted = next((suffix for suffix in named if suffix.endswith(".json")), None)
            if dotted is not None:
                raise BadSample(
                    "dot_in_key", f"{key}.{dotted} has a dot in its key, so readers take {key!r} for the key"
                )
            raise BadSample("no_json", f"members {sorted(named)} but no {key}.json")
        items = parse_sample(read("json"), key).image_items()
        return [Ref("json")], [Ref(item["image"], crc32=item.get("crc32")) for item in items]

    def compose(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Sample:
        raw = texts[0][1]
        sample, content = parse_sample(raw), shared_json(raw)
        self.reading.check_where(content)
        learning(Record(content, self.reading))
        return checked(sample, marked(content, self.reading))

    def record(self, texts: Sequence[tuple[int, bytes]], images: Sequence[int]) -> Record:
        content = shared_json(texts[0][1])
        record = Record(content, self.reading)
        record.leave(
            "items", "messages", "references", "checksum", "kind", "v", PLACEHOLDER, *self.reading.where_fields
        )
        lists = [("items[]", content.get("items") or [])]
        for message in content.get("messages") or []:
            part = record.part(message, "messages[]")
            part.leave("role", "content")
            part.weight("a turn")
            lists.append(("messages[].content[]", message["content"]))
        for path, items in lists:
            for item in items if isinstance(items, list) else []:
                part = record.part(item, path)
                part.leave("text", "image", "width", "height", "alt", "crc32", "type", "source")
                part.weight("an item")
        learning(record)
        return record


def _group(entry: TarMember | TarDamage) -> str | None:
    match = _NAME.match(entry.name) if isinstance(entry, TarMember) else None
    return match[1] if match else None


def _by_key(
    entries: Iterable[TarMember | TarDamage],
) -> Iterator[tuple[str | None, list[TarMember | TarDamage], bool]]:
    """Consecutive members that share a key (None: of what has none), and whether there is damage directly before or after it."""
    held: tuple[str | None, list[TarMember | TarDamage]] | None = None
    before = now = False
    for key, group in groupby(entries, key=_group):
        found = list(group)
        behind = any(isinstance(entry, TarDamage) for entry in found)
        if held is not None:
            yield *held, before or behind
        held, before, now = (key, found), now, behind
    if held is not None:
        yield *held, before


def _stray(entry: TarMember | TarDamage) -> ScannedSample:
    if isinstance(entry, TarDamage):
        return ScannedSample(f"@{entry.offset}", bad=("damaged_shard", entry.detail))
    return ScannedSample(f"@{entry.offset}", bad=("bad_name", f"member {entry.name!r} has no key and type"))


def _text(member: TarMember, ref: Ref, data: bytes) -> Member:
    return Member(member.offset, member.size, content_hash(data), part=ref.part)


def _checked(data: bytes, member: Member, what: str) -> bytes:
    if len(data) != member.size:
        raise BadSample(
            "truncated", f"{what} ends after {len(data)} of {member.size} bytes: the shard was cut after indexing"
        )
    if content_hash(data) != member.hash:
        raise BadSample("damaged", f"{what} has other bytes than when the shard was indexed")
    return data
