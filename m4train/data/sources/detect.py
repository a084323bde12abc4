"""`format: auto`: what the shards of a source are taken for, and why."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from m4train.data.sources.fields import Reading
from m4train.data.sources.records import has_form
from m4train.data.sources.tar import key_and_suffix
from m4train.data.sources.tarfiles import TarMember, walk_tar
from m4train.data.storage.files import FileReader
from m4train.errors import ConfigError
from m4train.processing.images import PICTURE_EXTENSIONS

FORMATS_BY_EXTENSION = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".jsonlines": "json",
    ".csv": "csv", ".tsv": "csv", ".parquet": "parquet", ".tar": None, ".tgz": None,
}  # fmt: skip
_WAYS_OUT = {  # of files that are not read
    ".arrow": "write them as parquet, with datasets.load_from_disk(FOLDER).to_parquet(FILE)",
    ".zip": "unpack them first, with unzip", ".7z": "unpack them first, with 7z x", ".rar": "unpack them first, with unrar x",
    ".bz2": "unpack them first, with bunzip2", ".xz": "unpack them first, with unxz",
    ".xlsx": "save them as CSV in UTF-8", ".xls": "save them as CSV in UTF-8", ".pdf": "render their pages to pictures first",
    ".txt": "set format=csv if they are tables", ".yaml": "write them as JSON lines", ".yml": "write them as JSON lines",
}  # fmt: skip
PACKED = (".gz", ".zst")
_LOOKED_AT = 2000  # members of a tar


def extension(path: str) -> str:
    """The extension of a shard in lower case, without that of its compression."""
    name = os.path.basename(path).lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def is_shard(path: str) -> bool:
    """Whether a file is of a kind that shards are of."""
    return extension(path) in FORMATS_BY_EXTENSION


def way_out(paths: Iterable[str]) -> str | None:
    """What to do about the first of some files that are not read; None if that is not known."""
    kinds = (os.path.splitext(path.lower())[1] for path in paths)
    return next((_WAYS_OUT[kind] for kind in kinds if kind in _WAYS_OUT), None)


def detect(files: FileReader, shards: Sequence[str], key: str) -> tuple[str, str]:
    """The format of the shards of the source called `key`, and what it was told by. Raises ConfigError if it cannot be told."""
    kinds = {extension(shard) for shard in shards} if not os.path.isdir(shards[0]) else {""}
    if len(kinds) > 1:
        raise ConfigError(
            f"{key}.format is auto, but its shards are of several kinds ({', '.join(sorted(kinds))}): make a source of each."
        )
    [kind] = kinds
    if os.path.isdir(shards[0]):
        return (
            "picture_folder",
            f"{shards[0]} is a folder of pictures, with a text or record of the same name next to each",
        )
    if kind not in FORMATS_BY_EXTENSION:
        raise ConfigError(
            f"{key}.format is auto, but nothing is known of files like {shards[0]}: {way_out(shards) or 'name the format'}."
        )
    named = FORMATS_BY_EXTENSION[kind]
    if named is not None:
        return named, f"its files end in {kind}"
    for shard in shards:
        sample = _first_sample(files, shard)
        if sample:
            found = _tar_format(files, shard, sample)
            if found is not None:
                return found[
                    0
                ], f"the first sample in {os.path.basename(shard)} holds {', '.join(sorted(sample))}{found[1]}"
            raise ConfigError(
                f"{key}.format is auto, but the first sample in {shard} holds {', '.join(sorted(sample))}, which is of no format "
                "that is known: name the format."
            )
    return "canonical", "its shards are empty"


def _first_sample(files: FileReader, shard: str) -> dict[str, TarMember]:
    """The members of the first sample of a tar, by their suffixes."""
    first, found = None, {}
    for entry in islice(walk_tar(files, shard), _LOOKED_AT):
        named = key_and_suffix(entry.name) if isinstance(entry, TarMember) else None
        if named is None or not isinstance(entry, TarMember):
            continue
        if first is not None and named[0] != first:
            break
        first = named[0]
        found[named[1]] = entry
    return found


def _tar_format(files: FileReader, shard: str, sample: Mapping[str, TarMember]) -> tuple[str, str] | None:
    numbered = [suffix for suffix in sample if suffix.partition(".")[0].isdecimal()]
    texts = sorted(suffix for suffix in numbered if ".text." in f".{suffix.partition('.')[2]}")
    if texts:
        turns = isinstance(_json(files, shard, sample[texts[0]]), list)
        return ("m4_conversations", ", and turns in its text") if turns else ("m4_documents", "")
    pictures = [suffix for suffix in sample if os.path.splitext(f"_.{suffix}")[1].lower() in PICTURE_EXTENSIONS]
    record = _json(files, shard, sample["json"]) if "json" in sample else None
    if isinstance(record, dict):
        has = lambda *names: all(isinstance(record.get(name), list) for name in names)
        named = [f'"{suffix}"' for suffix in pictures]
        nameless = len(named) == 1 and has("messages") and named[0] not in json.dumps(record)
        if nameless:
            return "pairs", ", with `messages` that name no member"
        if has("items") or has("messages"):
            return "canonical", f", with `{'items' if has('items') else 'messages'}`"
        if has("text_list", "image_info"):
            return "mmc4", ", with `text_list` and `image_info`"
        if has("images", "texts") and any(suffix.lower() in ("tif", "tiff") for suffix in sample):
            return "mint1t", ", with `images` and `texts`"
        if has("images", "texts"):
            return "energon", ", with `images` and `texts`"
        if has("texts"):
            return "llava_onevision", ", with `texts`"
    if len(pictures) == 1 and (
        has_form(record, Reading()) or any(suffix.endswith(("txt", "caption")) for suffix in sample)
    ):
        return "pairs", ""
    return None


def _json(files: FileReader, shard: str, member: TarMember) -> Any:
    try:
        return json.loads(files.read(shard, member.offset, member.size))
    except (ValueError, RecursionError):
        return None
