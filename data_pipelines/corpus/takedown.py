"""`takedown`: samples of a URL, a domain or an image are taken down, by tombstones next to the shards; or cut out of them as well."""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from datatrove.data import Document

from data_pipelines.corpus.stored import StoredSample, StoredShards
from data_pipelines.frame.step import Step
from data_pipelines.frame.store import aside
from m4train.data.index.build import build_structure
from m4train.data.index.shard_index import index_path
from m4train.data.index.tombstones import TOMBSTONES, Tombstone, bury, taken_down
from m4train.data.sources.base import ShardFormat
from m4train.data.sources.tar import TarFormat, key_and_suffix
from m4train.data.sources.tarfiles import TarDamage, walk_tar
from m4train.data.storage.files import FileReader, is_remote
from m4train.errors import BadSample, ConfigError, DataError


class Takedown(Step):
    """Takes down the samples of `shards` that come from one of `urls` (of a page, or of an image) or of `domains` and what is below
    them, that hold an image with one of these SHA-256 sums (`images`), or that have one of these `keys`. `compact` then writes the shards without all samples
    that are taken down, by this or before."""

    name = "takedown"

    def __init__(
        self,
        shards: str,
        options: dict[str, Any] | None = None,
        urls: list[str] | None = None,
        domains: list[str] | None = None,
        images: list[str] | None = None,
        keys: list[str] | None = None,
        compact: bool = False,
    ) -> None:
        super().__init__()
        self.urls, self.domains, self.images = set(urls or ()), _domains(domains or []), _sums(images or [])
        self.keys = {str(key) for key in keys or ()}
        if not (self.urls or self.domains or self.images or self.keys or compact):
            raise ConfigError("takedown names nothing: set urls, domains, images or keys, or compact=true.")
        self.compact = compact
        self.stored = StoredShards.of(shards, options or {}, "takedown.shards")
        remote = next((path for path in self.stored.paths if is_remote(path)), None)
        if remote:
            raise ConfigError(
                f"takedown.shards names {remote} in an object store: run it on a local copy, and copy {TOMBSTONES} next to them."
            )
        if compact and not isinstance(self.stored.form, TarFormat):
            raise ConfigError(
                f"takedown.compact=true needs tars, but {self.stored.paths[0]} is {self.stored.form.name}: convert them first."
            )

    def process(self, documents: Iterable[Document], rank: int, world_size: int) -> Iterator[Document]:
        by_folder: dict[str, list[Tombstone]] = {}
        for stored in self.stored.samples(rank, world_size):
            self.count("samples")
            why = self._why(stored)
            if why is not None:
                folder, name = os.path.split(stored.shard)
                stone = Tombstone(name, stored.key, why, datetime.now(UTC).date().isoformat())
                by_folder.setdefault(folder, []).append(stone)
                self.count(why.partition(" ")[0])
        for folder, stones in by_folder.items():
            self.count("taken down", bury(folder or ".", stones))
        for path in self.stored.paths[rank::world_size] if self.compact else ():
            self.count("cut out", compacted(path, self.stored.form))
        yield from ()

    def _why(self, stored: StoredSample) -> str | None:
        """What names this sample; a bad one cannot be trained on, and is left to itself."""
        if stored.key in self.keys:
            return f"key {stored.key}"
        if not (self.urls or self.domains or self.images):
            return None
        try:
            sample = stored.sample()
            urls = [str(sample.source.get("url") or "")]
            urls += [str(item.get("source") or "") for item in sample.image_items()]
            found = next((f"url {url}" for url in urls if url in self.urls), None)
            found = found or next((f"domain {name}" for url in urls if (name := self._domain(url))), None)
            if found or not self.images:
                return found
            sums = (hashlib.sha256(data).hexdigest() for data in stored.images())
            return next((f"image {name}" for name in sums if name in self.images), None)
        except BadSample as error:
            self.count(f"unreadable {error.reason}")
            return None

    def _domain(self, url: str) -> str | None:
        try:
            host = (urlsplit(url).hostname or "").rstrip(".")
        except ValueError:
            return None
        parts = host.split(".")
        return next((name for n in range(len(parts)) if (name := ".".join(parts[n:])) in self.domains), None)


def _domains(given: list[str]) -> set[str]:
    for name in given:
        if not name or "/" in name or ":" in name:
            raise ConfigError(
                f"takedown.domains has {name!r}: name a domain, such as example.org, without scheme and path."
            )
    return {name.lower().strip(".") for name in given}


def _sums(given: list[str]) -> set[str]:
    for name in given:
        if len(name) != 64 or set(name.lower()) - set("0123456789abcdef"):
            raise ConfigError(
                f"takedown.images has {name!r}: name the SHA-256 of an image file, 64 hexadecimal digits."
            )
    return {name.lower() for name in given}


def compacted(path: str, form: ShardFormat) -> int:
    """Writes a tar again without the members of samples that are taken down; returns how many samples went.

    All other members keep their bytes. Raises DataError for a packed tar, or a damaged one, of which more would be lost.
    """
    gone = taken_down(path)
    if not gone:
        return 0
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
        damage = next((entry.detail for entry in walk_tar(FileReader(), path) if isinstance(entry, TarDamage)), None)
    except tarfile.TarError as error:
        damage = str(error)
    if damage is not None:
        raise DataError(f"{path} cannot be compacted ({damage}): it is packed or damaged; unpack or repair it first.")
    keys = [(key_and_suffix(member.name) or (None, ""))[0] for member in members]
    found = {key for key in keys if key in gone}
    if found:
        with open(path, "rb") as source, aside(Path(path)) as target:
            for member, key in zip(members, keys):
                if key not in found:
                    source.seek(member.offset)
                    size = -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    _copy(source, target, member.offset_data - member.offset + size)
            blocks = 2 if (target.tell() + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE else 3  # as ShardWriter ends
            target.write(bytes(blocks * tarfile.BLOCKSIZE))
        if index_path(path, None).exists():
            build_structure(path, form)
    return len(found)


def _copy(source: Any, target: Any, size: int) -> None:
    while size:
        part = source.read(min(size, 1 << 20))
        if not part:
            raise DataError(f"{source.name} ends within a member: repair it before it is compacted.")
        target.write(part)
        size -= len(part)
