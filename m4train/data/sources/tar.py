"""Canonical shards: tar files of `KEY.json` and the images it names, read by byte range."""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from m4train.data.sample import Sample, parse_sample
from m4train.data.sources.base import FileReader, Member, ScannedSample
from m4train.data.sources.tarfiles import TarDamage, TarMember, walk_tar
from m4train.errors import BadSample
from m4train.processing.images import read_image_info

_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # as webdataset splits: at the first dot of the file's name
_MAX_GAP = 1 << 16  # bytes between members that are cheaper to read than to skip


class TarFormat:
    """One sample is the run of members that share a key, as in webdataset."""

    name = "tar"

    def scan(self, path: str) -> Iterator[ScannedSample]:
        """Every sample, with the crc of each member and the size of each image; one pass over the shard."""
        seen: set[str] = set()
        with open(path, "rb") as file:
            for key, group in groupby(walk_tar(path), key=_group):
                entries = list(group)
                if key is None:
                    for entry in entries:
                        if isinstance(entry, TarDamage):
                            yield ScannedSample(f"@{entry.offset}", bad=("damaged_shard", entry.detail))
                        else:
                            yield ScannedSample(
                                f"@{entry.offset}", bad=("bad_name", f"member {entry.name!r} has no key and type")
                            )
                    continue
                found = _scan_sample(file, key, [entry for entry in entries if isinstance(entry, TarMember)])
                if key in seen:
                    found = ScannedSample(key, bad=("duplicate_key", f"key {key!r} occurs earlier in the same shard"))
                seen.add(key)
                yield found

    def count(self, path: str, limit: int) -> int:
        """Keys in the headers; stops soon after `limit`."""
        total = 0
        for _ in groupby(walk_tar(path), key=_group):
            total += 1
            if total > limit:
                break
        return total

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        return parse_sample(_checked(files.read(path, members[0].offset, members[0].size), members[0], "the JSON"))

    def images(self, files: FileReader, path: str, members: tuple[Member, ...], wanted: range) -> dict[int, bytes]:
        """One read for all where they lie together, which is how shards are written."""
        chosen = [members[1 + number] for number in wanted]
        if not chosen:
            return {}
        first = min(member.offset for member in chosen)
        span = max(member.offset + member.size for member in chosen) - first
        if span <= sum(member.size for member in chosen) + _MAX_GAP:
            data = memoryview(files.read(path, first, span))
            parts = [bytes(data[m.offset - first : m.offset - first + m.size]) for m in chosen]
        else:
            parts = [files.read(path, m.offset, m.size) for m in chosen]
        return {n: _checked(part, m, f"image {n}") for n, m, part in zip(wanted, chosen, parts)}


def _group(entry: TarMember | TarDamage) -> str | None:
    match = _NAME.match(entry.name) if isinstance(entry, TarMember) else None
    return match[1] if match else None


def _checked(data: bytes, member: Member, what: str) -> bytes:
    if len(data) != member.size:
        raise BadSample(
            "truncated", f"{what} ends after {len(data)} of {member.size} bytes: the shard was cut after indexing"
        )
    if zlib.crc32(data) != member.crc:
        raise BadSample("damaged", f"{what} has other bytes than when the shard was indexed")
    return data


def _scan_sample(file: io.BufferedReader, key: str, members: list[TarMember]) -> ScannedSample:
    """Resolves the images that the JSON names to members."""
    named = {}
    for member in members:
        suffix = member.name[len(key) + 1 :]
        if suffix in named:
            return ScannedSample(key, bad=("duplicate_member", f"member {member.name!r} occurs twice"))
        named[suffix] = member
    if "json" not in named:
        dotted = next((suffix for suffix in named if suffix.endswith(".json")), None)
        if dotted is not None:
            detail = f"{key}.{dotted} has a dot in its key, so readers take {key!r} for the key"
            return ScannedSample(key, bad=("dot_in_key", detail))
        return ScannedSample(key, bad=("no_json", f"members {sorted(named)} but no {key}.json"))
    text, raw = _member(file, named["json"])
    try:
        items = parse_sample(raw, key).image_items()
        missing = [item["image"] for item in items if item["image"] not in named]
        if missing:
            raise BadSample("missing_image", f"the JSON names {missing[0]!r}, but the shard holds {sorted(named)}")
        pictures = [_image_member(file, item, named[item["image"]]) for item in items]
    except BadSample as error:
        return ScannedSample(key, bad=(error.reason, error.detail))
    return ScannedSample(key, (text, *pictures))


def _member(file: io.BufferedReader, member: TarMember) -> tuple[Member, bytes]:
    data = os.pread(file.fileno(), member.size, member.offset)
    return Member(member.offset, member.size, zlib.crc32(data)), data


def _image_member(file: io.BufferedReader, item: dict[str, Any], member: TarMember) -> Member:
    name = item["image"]
    found, data = _member(file, member)
    if item.get("crc32", found.crc) != found.crc:
        raise BadSample("damaged", f"image {name!r} does not fit the checksum in the JSON: bytes were changed or moved")
    try:
        info = read_image_info(data)
    except BadSample as error:
        raise BadSample(error.reason, f"image {name!r}: {error.detail}") from None
    return Member(found.offset, found.size, found.crc, info.width, info.height)
