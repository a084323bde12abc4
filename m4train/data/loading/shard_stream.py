"""The samples of shards that webdataset opens (`pipe:`, URLs, files), as one reader meets them."""

from __future__ import annotations

import hashlib
import logging
import random
import subprocess
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from m4train.data.documents.build import Size, StoredSample, decode_wanted
from m4train.data.index.tombstones import TAKEN_DOWN, taken_down
from m4train.data.loading.quarantine import QuarantineEntry
from m4train.data.sources.base import SEVERAL_FRAMES
from m4train.data.sources.tar import TarFormat, suffix_of
from m4train.data.sources.tarfiles import TarMember, is_junk
from m4train.data.storage import files as storage
from m4train.errors import BadSample, DataError

_LOG = logging.getLogger(__name__)
_SHUFFLE_BUFFER = 1000
_MOST_IN_VAIN = 100_000  # samples in a row that could not be used, if a round through the shards is longer
_CLOSING = 10.0  # seconds a command may take to end when nobody reads it any more
_HUNG_UP = (0, -13, 141)  # exit statuses of a command that did its work, or whose reader went away


@dataclass(frozen=True)
class Streamed:
    """One sample, and how often its reader had been through all shards before."""

    key: str
    url: str
    cycle: int
    stored: StoredSample


class ShardStream:
    """Every sample of `urls` again and again: the shards in another order each time, the samples mixed in a buffer.

    `position` counts the rounds through all shards, the shards of the last one as its fraction; reading begins at
    `position`. What cannot be read is added to `bad`, which whoever iterates empties. Iterating raises DataError if a
    shard keeps failing to open, or if a whole round holds nothing that can be used.
    """

    def __init__(
        self, name: str, urls: Sequence[str], tar_format: TarFormat, seed: str, shuffle: bool, position: float = 0.0
    ) -> None:
        self.bad: list[QuarantineEntry] = []
        self.position = position
        self._name, self._urls, self._format = name, list(urls), tar_format
        self._seed, self._shuffle = seed, shuffle
        self._in_vain = 0
        self._most_in_vain = _MOST_IN_VAIN
        self._why = ""
        self._told: set[str] = set()

    def leave_out(self, key: str, url: str, reason: str, detail: str) -> None:
        """Adds a sample to `bad`. Raises DataError if as many in a row were bad as a round through the shards has."""
        self._note(key, url, reason, detail)
        self._in_vain += 1
        if self._in_vain >= self._most_in_vain:
            raise DataError(self._nothing(f"none of {self._in_vain} samples in a row"))

    def used(self) -> None:
        """Says that a sample could be used."""
        self._in_vain, self._why = 0, ""

    def _note(self, key: str, url: str, reason: str, detail: str) -> None:
        self.bad.append(QuarantineEntry(0, -1, self._name, key, url, reason, detail))
        self._why = self._why or f"the first, {key} in {url}: {reason}, {detail}"

    def _nothing(self, what: str) -> str:
        return (
            f"Of the streamed source {self._name!r} {what} can be used ({self._why or 'its shards are empty'}): look at its "
            f"shards, or correct data.sources.{self._name}.format."
        )

    def __iter__(self) -> Iterator[Streamed]:
        import webdataset

        stages: list[Any] = [self._stored]
        if self._shuffle:
            rng = self._random(f"samples {self.position}")
            stages.append(webdataset.shuffle(_SHUFFLE_BUFFER, rng=rng))
        for cycle, stored in webdataset.DataPipeline(*stages):
            key, url = stored["__key__"], stored["__url__"]
            why = taken_down(url.removeprefix("file:")).get(key) if not url.startswith("pipe:") else None
            if why is not None:
                self.leave_out(key, url, TAKEN_DOWN, why)
                continue
            try:
                yield Streamed(key, url, cycle, streamed_sample(self._format, stored, self._told))
            except BadSample as error:
                self.leave_out(key, url, error.reason, error.detail)

    def _stored(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The samples as webdataset gives them, shard after shard."""
        cycle, count = int(self.position), len(self._urls)
        first = round((self.position - cycle) * count)
        while True:
            order = list(self._urls)
            if self._shuffle:
                self._random(f"shards {cycle}").shuffle(order)
            given = 0
            for place in range(first, count):
                self.position = cycle + place / count
                for stored in self._shard(order[place]):
                    given += 1
                    yield cycle, stored
            if not first:
                if not given:
                    raise DataError(self._nothing("no sample"))
                self._most_in_vain = min(_MOST_IN_VAIN, given + (_SHUFFLE_BUFFER if self._shuffle else 0))
            cycle, first = cycle + 1, 0

    def _shard(self, url: str) -> Iterator[dict[str, Any]]:
        """The samples of one shard; after a failure of the storage it is read again, and what was given is passed over."""
        given, pause = 0, storage.FIRST_PAUSE
        for attempt in range(1, storage.READ_ATTEMPTS + 1):
            try:
                for number, stored in enumerate(_opened(url)):
                    if number >= given:
                        given += 1
                        yield stored
                return
            except (tarfile.TarError, ValueError) as error:
                where = f"after {given} samples: {error}"
                self._note(f"@{given}", url, "damaged_shard", where)
                return
            except OSError as error:
                if attempt == storage.READ_ATTEMPTS:
                    raise DataError(
                        f"Reading the stream {url} of source {self._name!r} failed {attempt} times ({error}): check the "
                        "storage or the command; the run continues from its last checkpoint when started again."
                    ) from error
            time.sleep(pause)
            pause *= 2

    def _random(self, purpose: str) -> random.Random:
        return random.Random(hashlib.blake2b(f"{self._seed} {self._name} {purpose}".encode(), digest_size=8).digest())


def streamed_sample(tar_format: TarFormat, stored: dict[str, Any], told: set[str] | None = None) -> StoredSample:
    """A sample of webdataset (`__key__`, and bytes by suffix) as `tar_format` reads it. Raises BadSample.

    `told` are the fields of which it was said that they are not read; others are said now, and added."""
    key = stored["__key__"]
    members = {suffix_of(suffix): data for suffix, data in stored.items() if not suffix.startswith("__")}
    named = {suffix: TarMember(f"{key}.{suffix}", 0, len(data)) for suffix, data in members.items()}
    texts, images, unread = tar_format.resolve(key, named, members.__getitem__)
    if any(tar_format.frames(members[ref.suffix], ref.part) > 1 for ref in images):
        unread += (SEVERAL_FRAMES,)
    if told is not None and not told.issuperset(unread):
        _LOG.warning("fields not read, in %s for the first time: %s", key, ", ".join(sorted(set(unread) - told)))
        told.update(unread)
    sample = tar_format.compose([(ref.part, members[ref.suffix]) for ref in texts], [ref.part for ref in images])
    sizes = [tar_format.picture_size(members[ref.suffix], ref.part) for ref in images]

    def decode(wanted: Sequence[int], least: Mapping[int, Size]) -> dict[int, Image.Image]:
        held = {number: (members[images[number].suffix], images[number].part) for number in wanted}
        whole = lambda: {number: tar_format.picture(*where) for number, where in held.items()}
        return decode_wanted(wanted, sizes, least, whole, lambda: [tar_format.file_of(*held[n]) for n in wanted])

    return StoredSample(sample, sizes, decode)


def _opened(url: str) -> Iterator[dict[str, Any]]:
    """The samples of one tar stream. Raises OSError if it, or the command that makes it, fails."""
    import webdataset

    stream = webdataset.gopen(url)
    damage: Exception | None = None
    try:
        members = webdataset.tariterators.tar_file_expander(
            [{"url": url, "stream": stream}], select_files=lambda name: not is_junk(name)
        )
        yield from webdataset.tariterators.group_by_keys(members, lcase=False)
    except (tarfile.TarError, OSError) as error:
        damage = error
    finally:
        process: subprocess.Popen | None = getattr(stream, "proc", None)
        (stream if process is None else stream.stream).close()
        status = 0 if process is None else process.wait(_CLOSING)
    if status not in _HUNG_UP:
        raise OSError(f"its command ended with exit status {status}")
    if damage is not None:
        raise damage
