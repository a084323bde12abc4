"""What a data format offers: how its shards are scanned for the index, and how one sample is read back by position.

A new format is one file next to this one with a `ShardFormat`; everything after it (index, plan, packing, loader) is the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import xxhash
from PIL import Image

from m4train.data.documents.sample import Sample
from m4train.data.sources.fields import Reading
from m4train.data.storage.files import FileReader, Range
from m4train.errors import BadSample
from m4train.processing.images import decode_image


@dataclass(frozen=True)
class Member:
    """One stored part of a sample: a text (no width), or an image with the size it has when decoded upright.

    `offset`, `size` and `part` mean what the format wants them to: usually a byte range, and which of several things in it.
    """

    offset: int
    size: int
    hash: int  # of its bytes, see content_hash
    width: int = 0
    height: int = 0
    part: int = 0
    frames: int = field(
        default=1, compare=False
    )  # pictures in its file, of which the first is read; not kept in the index

    @property
    def is_image(self) -> bool:
        return self.width > 0


@dataclass(frozen=True)
class ScannedSample:
    """A sample as the scan found it: `members` are its texts and then every image in reading order, or `bad` says why not.
    `files` are local files outside the shard that it depends on, whether they are there or not; `unread` names the fields of
    it that are neither used nor known; `sample` is the sample that these members are read as, if the scan has made it anyway.
    `identity` is 63 bits of what a sample says and shows, wherever and however it is written, of one that has no name.
    """

    key: str
    members: tuple[Member, ...] = ()
    bad: tuple[str, str] | None = None  # reason, detail
    files: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    identity: int = 0
    sample: Sample | None = field(default=None, compare=False)


SEVERAL_FRAMES = "(the first picture of a file that holds several)"  # counted with the fields that are not read


def content_hash(data: bytes) -> int:
    """32 bits that tell stored bytes from changed ones; XXH3 costs less than copying them."""
    return xxhash.xxh3_64_intdigest(data) & 0xFFFFFFFF


class ShardFormat(Protocol):
    """How one kind of shard is read. Instances are picklable and hold no open files."""

    name: str
    settings: Mapping[str, Any]  # what of the source's configuration decides, next to the shard, what its index holds
    image_range: Sequence[float]  # values of black and white in deep pictures; empty: as the file says
    honours: frozenset[str]  # the options of Reading that mean something here
    reading: Reading

    def scan(self, files: FileReader, path: str) -> Iterator[ScannedSample]:
        """Every sample of the shard in stored order, one sequential pass; damage is reported as bad samples."""

    def count(self, files: FileReader, path: str, limit: int) -> int:
        """The number of samples, or any number above `limit` as soon as it is known to be exceeded; reads no payload."""

    def sample(self, files: FileReader, path: str, members: tuple[Member, ...]) -> Sample:
        """The text of one sample. Raises BadSample."""

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        """The decoded images numbered `wanted`, upright RGB. Raises BadSample."""

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        """The images numbered `wanted` as image files, with their stored bytes wherever they are stored as files.
        Raises BadSample."""

    def ranges(self, path: str, members: tuple[Member, ...], wanted: Sequence[int]) -> list[Range]:
        """What `sample` and `images` will read of their files, as far as that is known before."""

    def keep(self, window: int, pool: int) -> None:
        """Prepares for samples drawn within `window` blocks and packed from a `pool`."""

    def blocks(self, files: FileReader, path: str) -> list[int] | None:
        """Samples in each stretch that is read whole, if single samples cannot be read; None if they can."""


class StoredFiles:
    """The part of formats whose images are stored as files: `images` are their `stored_images`, decoded."""

    image_range: Sequence[float] = ()

    def stored_images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> list[bytes]:
        raise NotImplementedError

    def images(
        self, files: FileReader, path: str, members: tuple[Member, ...], wanted: Sequence[int]
    ) -> dict[int, Image.Image]:
        """The images numbered `wanted`, see `ShardFormat.images`."""
        stored = self.stored_images(files, path, members, wanted)
        return {number: self._decoded(data, number) for number, data in zip(wanted, stored)}

    def _decoded(self, data: bytes, number: int) -> Image.Image:
        try:
            return decode_image(data, image_range=self.image_range)
        except BadSample as error:
            raise BadSample(error.reason, f"image {number}: {error.detail}") from None
