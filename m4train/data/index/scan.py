"""What the index files of a shard hold, found in one pass over it."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from m4train.data.documents.boundaries import Boundaries
from m4train.data.documents.pieces import PIECE_KINDS, Pieces
from m4train.data.documents.rendering import Renderer
from m4train.data.documents.sample import Sample
from m4train.data.index.outside import outside_arrays, outside_stamp
from m4train.data.index.shard_index import VERSION, sample_key, sample_members
from m4train.data.sources.base import SEVERAL_FRAMES, Member, ScannedSample, ShardFormat
from m4train.data.storage.arrays import smallest
from m4train.data.storage.files import FileReader, stamp
from m4train.errors import BadSample, DataError
from m4train.processing.pieces import Piece

_MEMBER_TYPES = {"offsets": np.int64, "sizes": np.int64, "hashes": np.uint32}
_MEMBER_TYPES |= dict.fromkeys(("widths", "heights", "parts"), np.int64)
_AT_ONCE = 256  # samples whose texts are asked of an object store together
_NOTHING = Pieces(np.empty(0, np.int32), np.empty(0, np.uint8), np.empty(0, np.int32))

Stored = tuple[dict[str, Any], dict[str, np.ndarray]]  # meta and arrays of one file


def scan_shard(
    shard: str, shard_format: ShardFormat, renderer: Renderer | None, files: FileReader
) -> tuple[Stored, Stored | None]:
    """The structure of a shard and, for a renderer, its token counts, from one pass. Raises DataError if it changes meanwhile."""
    found = stamp(shard)
    structure, counts = _Structure(shard), None if renderer is None else _Counts(renderer)
    for sample in shard_format.scan(files, shard):
        structure.add(sample)
        if counts is not None:
            counts.add(files, shard, shard_format, sample.key, sample.members, sample.sample)
    if stamp(shard) != found:
        raise DataError(f"{shard} changed while it was indexed: wait until it is written, then start again.")
    meta, parts = structure.stored()
    meta |= {"format": shard_format.name, "stamp": found, "blocks": shard_format.blocks(files, shard)}
    meta |= {"settings": dict(shard_format.settings)} if shard_format.settings else {}
    return (meta, parts), None if counts is None else counts.stored(meta["digest"])


def count_shard(shard: str, shard_format: ShardFormat, renderer: Renderer, structure: Stored) -> Stored:
    """The token counts of a shard whose structure is known; reads its texts only."""
    meta, parts = structure
    files, counts = FileReader(), _Counts(renderer)
    total = len(parts["member_ends"])
    for first in range(0, total, _AT_ONCE):
        batch = [(n, sample_members(parts, n)) for n in range(first, min(first + _AT_ONCE, total))]
        files.expect(part for _, members in batch if members for part in shard_format.ranges(shard, members, []))
        for number, members in batch:
            counts.add(files, shard, shard_format, sample_key(parts, number), members)
    return counts.stored(meta["digest"])


class _Structure:
    """Keys and members of the samples of a shard. A bad sample has no members. Numbers are held as machine words: a file may hold
    millions of samples."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self._keys = bytearray()
        self._key_ends, self._starts, self._member_ends = array("q"), array("q"), array("q")
        self._identities = array("q")
        self._rows = array("q")  # of each member the values of _MEMBER_TYPES
        self._bad: dict[str, tuple[str, str]] = {}
        self._outside: dict[str, tuple[int, int]] = {}  # stamps of the files outside the shard
        self._unread: Counter[str] = Counter()

    def add(self, sample: ScannedSample) -> None:
        self._unread.update(sample.unread)
        if any(member.frames > 1 for member in sample.members):
            self._unread[SEVERAL_FRAMES] += 1
        if sample.bad is not None:
            self._bad[str(len(self._key_ends))] = sample.bad
        self._keys += sample.key.encode("utf-8")
        self._key_ends.append(len(self._keys))
        self._identities.append(sample.identity)
        start = min((member.offset for member in sample.members), default=0)
        self._starts.append(start)
        for m in sample.members:
            self._rows.extend((m.offset - start, m.size, m.hash, m.width, m.height, m.part))
        self._member_ends.append(len(self._rows) // len(_MEMBER_TYPES))
        for path in sample.files:
            if path not in self._outside:
                self._outside[path] = outside_stamp(path)

    def stored(self) -> Stored:
        columns = np.array(self._rows, np.int64).reshape(-1, len(_MEMBER_TYPES)).T
        arrays = {name: column.astype(kind) for (name, kind), column in zip(_MEMBER_TYPES.items(), columns)}
        arrays |= {"keys": np.frombuffer(bytes(self._keys), np.uint8), "starts": np.array(self._starts, np.int64)}
        arrays |= {"key_ends": np.array(self._key_ends, np.int64), "member_ends": np.array(self._member_ends, np.int64)}
        if any(self._identities):
            arrays["identities"] = np.array(self._identities, np.int64)
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(arrays):
            digest.update(arrays[name].tobytes())
        if self._outside:  # no part of the digest: who copies a dataset has the same one
            arrays |= outside_arrays(self._shard, self._outside)
        meta = {"version": VERSION, "bad": self._bad, "digest": digest.hexdigest()}
        return meta | ({"unread": dict(self._unread)} if self._unread else {}), smallest(arrays)


class _Counts:
    """The pieces of every variant of the samples of a shard."""

    def __init__(self, renderer: Renderer) -> None:
        self._renderer = renderer
        self._boundaries = Boundaries(renderer.processor)
        self._tokens, self._kinds, self._frames = array("i"), bytearray(), array("i")  # of every piece
        self._sums = array("q")  # of every variant: tokens, frames, and where its pieces end
        self._places = array("q")  # number of a piece, and a place where it may be cut
        self._bad: dict[str, tuple[str, str]] = {}
        self._samples = 0

    def add(
        self,
        files: FileReader,
        shard: str,
        shard_format: ShardFormat,
        key: str,
        members: tuple[Member, ...],
        sample: Sample | None = None,
    ) -> None:
        """One sample: the one given, or what its members are read as."""
        found = [_NOTHING] * self._renderer.variants
        if members:
            sizes = [(member.width, member.height) for member in members if member.is_image]
            try:
                sample = sample or shard_format.sample(files, shard, members)
                prepared = [self._renderer.prepare(sample, key, sizes, n) for n in range(self._renderer.variants)]
                found = [each.planned for each in prepared]
                self._add_places([each.pieces for each in prepared])
            except BadSample as error:
                self._bad[str(self._samples)] = (error.reason, error.detail)
        self._samples += 1
        for pieces in found:
            self._tokens.frombytes(pieces.tokens.astype(np.int32).tobytes())
            self._kinds += pieces.kinds.astype(np.uint8).tobytes()
            self._frames.frombytes(pieces.frames.astype(np.int32).tobytes())
            self._sums.extend((int(pieces.tokens.sum()), int(pieces.frames.sum()), len(self._kinds)))

    def _add_places(self, variants: Sequence[Sequence[Piece]]) -> None:
        start = len(self._kinds)
        for pieces in variants:
            for number, places in sorted(self._boundaries.places(pieces).items()):
                for place in places:
                    self._places.extend((start + number, place))
            start += len(pieces)

    def stored(self, digest: str) -> Stored:
        shape = (self._samples, self._renderer.variants)
        lengths, frames, ends = np.array(self._sums, np.int64).reshape(-1, 3).T
        arrays: dict[str, np.ndarray] = {
            "piece_tokens": np.array(self._tokens, np.int64),
            "piece_kinds": np.frombuffer(bytes(self._kinds), np.uint8),
            "piece_frames": np.array(self._frames, np.int64),
            "lengths": lengths.reshape(shape),
            "frames": frames.reshape(shape),
            "piece_ends": ends,
        }
        if self._places:
            arrays["cut_pieces"], arrays["cut_places"] = np.array(self._places, np.int64).reshape(-1, 2).T
        meta = {"version": VERSION, "fingerprint": self._renderer.fingerprint(), "digest": digest}
        return meta | {"kinds": PIECE_KINDS, "bad": self._bad}, smallest(arrays)
