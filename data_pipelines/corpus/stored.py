"""The samples of shards of any format that training reads, without an index and without a processor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m4train.config import SourceConfig
from m4train.data.documents.sample import Sample
from m4train.data.shards import expand_shards
from m4train.data.sources.base import Member, ShardFormat
from m4train.data.sources.registry import format_of, shard_format
from m4train.data.storage.files import FileReader, is_remote, stamps
from m4train.errors import BadSample

_READ_AHEAD = 8 << 20


@dataclass
class StoredShards:
    """Shards named by a path, a glob or a folder, in one format (`auto`: looked at). Raises DataError if there are none."""

    config: SourceConfig
    paths: list[str]
    form: ShardFormat

    @classmethod
    def of(cls, path: str, options: dict[str, Any], key: str) -> StoredShards:
        paths = expand_shards(path)
        config = format_of(SourceConfig(path=path, **options), paths, key)
        return cls(config, paths, shard_format(config, key))

    def inputs(self) -> list[tuple[str, int]]:
        """Names and sizes; of a folder of pictures those of its files."""
        files = []
        for path in self.paths:
            if not is_remote(path) and os.path.isdir(path):
                files += [str(each) for each in sorted(Path(path).rglob("*")) if each.is_file()]
            else:
                files.append(path)
        return [(path, int(found[0])) for path, found in stamps(files).items()]

    def samples(self, rank: int, world_size: int) -> Iterator[StoredSample]:
        """The samples of every `world_size`-th shard."""
        files = FileReader(read_ahead=_READ_AHEAD)
        for path in self.paths[rank::world_size]:
            for found in self.form.scan(files, path):
                yield StoredSample(path, found.key, self.form, files, found.members, found.bad)


@dataclass
class StoredSample:
    """One sample where it is stored."""

    shard: str
    key: str
    form: ShardFormat
    files: FileReader
    members: Sequence[Member]
    bad: tuple[str, str] | None

    def sample(self) -> Sample:
        """Its text. Raises BadSample."""
        if self.bad is not None:
            raise BadSample(*self.bad)
        return self.form.sample(self.files, self.shard, tuple(self.members))

    def images(self) -> list[bytes]:
        """Its images as files, in reading order. Raises BadSample."""
        wanted = range(sum(member.is_image for member in self.members))
        return self.form.stored_images(self.files, self.shard, tuple(self.members), wanted)
