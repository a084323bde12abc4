"""The index of a shard: where every sample is stored, how large its images are, and how many tokens it takes.

Two sidecar files per shard, used by mapping them into memory. `SHARD.index` describes the shard itself; its digest names
this content. `SHARD.FINGERPRINT.tokens` describes the same samples as one processor renders them, piece by piece, so
that a planned length is exact.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m4train.data.documents.pieces import IMAGE_KIND, Pieces
from m4train.data.index.tombstones import TAKEN_DOWN, taken_down
from m4train.data.sources.base import Member
from m4train.data.storage.arrays import read_arrays
from m4train.data.storage.files import is_remote
from m4train.errors import CHOICES, ConfigError, StaleIndexError

VERSION = 6
_NAMED = 5  # keys that are taken down
_CHOSEN = {
    "skipped": "by the options of the source",
    "not_preferred": "as answers that should not be learned",
    "not_learnt": "as they say that they are not learnt",
    "too_long": "as too long",
}


def index_path(shard: str, index_dir: str | None) -> Path:
    """Where the index of a shard is: next to it, or in `index_dir` under a name that is unique to its full path."""
    return Path(_index_of(shard, index_dir))


def _index_of(shard: str, index_dir: str | None) -> str:
    if index_dir is None:
        if is_remote(shard):
            raise ConfigError(
                f"data.index_dir is null, but {shard} is in an object store: name a folder for its index."
            )
        return f"{shard}.index"
    full = shard if is_remote(shard) else os.path.abspath(shard)
    unique = hashlib.blake2b(full.encode(), digest_size=6).hexdigest()
    return os.path.join(index_dir, f"{os.path.basename(shard)}-{unique}.index")


def tokens_path(shard: str, index_dir: str | None, fingerprint: str) -> Path:
    """Where the token counts of a shard are stored for one processor fingerprint."""
    return Path(sidecars(shard, index_dir, fingerprint)[1])


def sidecars(shard: str, index_dir: str | None, fingerprint: str) -> tuple[str, str]:
    """The paths of the index of a shard and of its token counts."""
    index = _index_of(shard, index_dir)
    return index, f"{index.removesuffix('.index')}.{fingerprint[:12]}.tokens"


class ShardIndex:
    """The mapped index of one shard; pickled by path."""

    def __init__(self, shard: str, index_dir: str | None, fingerprint: str) -> None:
        self._made_from = (shard, index_dir, fingerprint)
        self.shard = shard
        self.meta, self._parts = read_arrays(index_path(shard, index_dir))
        self.token_meta, self._tokens = read_arrays(tokens_path(shard, index_dir, fingerprint))
        for meta in (self.meta, self.token_meta):
            if meta.get("version") != VERSION:
                raise StaleIndexError(f"The index of {shard} has another version: run `m4train data index`.")
        if self.token_meta["fingerprint"] != fingerprint or self.token_meta["digest"] != self.meta["digest"]:
            raise StaleIndexError(f"The token counts of {shard} are for other content: run `m4train data index`.")
        self.bad = {int(n): tuple(why) for n, why in [*self.meta["bad"].items(), *self.token_meta["bad"].items()]}
        lengths, frames = self._tokens["lengths"], self._tokens["frames"]
        self.variant_lengths = lengths if lengths.ndim == 2 else lengths[:, None]  # (N, variants), 0 for a bad sample
        self.variant_frames = frames if frames.ndim == 2 else frames[:, None]  # (N, variants)
        self.taken_down = self._take_down()
        self.lengths, self.frames = self.variant_lengths[:, 0], self.variant_frames[:, 0]  # of the first variant

    def _take_down(self) -> list[int]:
        """The samples that are taken down, which it makes bad ones without tokens."""
        why = taken_down(self.shard)
        found = [number for number in range(len(self.variant_lengths)) if self.key(number) in why] if why else []
        if found:
            self.variant_lengths, self.variant_frames = self.variant_lengths.copy(), self.variant_frames.copy()
            self.variant_lengths[found], self.variant_frames[found] = 0, 0
            self.bad |= {number: (TAKEN_DOWN, why[self.key(number)]) for number in found}
        return found

    def __len__(self) -> int:
        return len(self.lengths)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ShardIndex, self._made_from)

    def key(self, sample: int) -> str:
        return sample_key(self._parts, sample)

    def members(self, sample: int) -> tuple[Member, ...]:
        return sample_members(self._parts, sample)

    def content_hash(self, sample: int) -> bytes:
        """A digest of every stored byte of the sample."""
        begin, end = _bounds(self._parts["member_ends"], sample)
        return hashlib.blake2b(self._parts["hashes"][begin:end].tobytes(), digest_size=8).digest()

    def identity(self, sample: int) -> bytes:
        """What tells a sample from others wherever it stands: what it says and shows if it has no name, else its name."""
        if "identities" in self._parts:
            return int(self._parts["identities"][sample]).to_bytes(8, "big")
        return self.key(sample).encode()

    def image_count(self, sample: int) -> int:
        """Images of one sample that are used."""
        return (
            0 if self.bad.get(sample, ("",))[0] == TAKEN_DOWN else int((self.pieces(sample).kinds == IMAGE_KIND).sum())
        )

    def image_counts(self) -> np.ndarray:
        """(N,) images of every sample that are used, in its first variant."""
        ends = self._tokens["piece_ends"].astype(np.int64)
        images = np.concatenate([[0], np.cumsum(self._tokens["piece_kinds"] == IMAGE_KIND)])
        first = np.arange(len(self)) * self.variants
        starts = np.concatenate([[0], ends])[first]
        counts = images[ends[first]] - images[starts]
        counts[self.taken_down] = 0
        return counts

    @property
    def names_files(self) -> bool:
        """Whether samples depend on files outside the shard."""
        return "file_names" in self._parts

    def digest_line(self) -> bytes:
        """The part of this shard in the digest of its source."""
        reading = self.meta.get("settings", {}).get("reading")
        read_by = f" {reading}" if reading else ""
        return f"{self.meta['digest']} {self.token_meta['fingerprint']}{read_by}\n".encode()

    @property
    def unusable(self) -> list[str]:
        """Why samples cannot be used, each once; not those that are left out by choice."""
        return [why for reason, why in self.bad.values() if reason not in CHOICES]

    def said(self) -> list[str]:
        """What is said about this shard whenever it is opened."""
        if not len(self):
            return [f"{self.shard} holds no sample and is passed over"]
        lines = []
        bad = self.unusable
        if bad:
            lines.append(f"{self.shard}: {len(bad)} of {len(self)} samples cannot be used, first: {bad[0]}")
        chosen = Counter(reason for reason, _ in self.bad.values() if reason in CHOICES - {TAKEN_DOWN})
        if chosen:
            said = ", ".join(f"{count} {_CHOSEN.get(reason, reason)}" for reason, count in chosen.items())
            lines.append(f"{self.shard}: of {len(self)} samples are left out by choice: {said}")
        if self.taken_down:
            keys = ", ".join(self.key(number) for number in self.taken_down[:_NAMED])
            lines.append(f"{self.shard}: {len(self.taken_down)} of {len(self)} samples are taken down ({keys} ...)")
        return lines

    def taken_line(self) -> bytes:
        """What of this shard is taken down; empty if nothing is."""
        return f"{self.shard} {self.taken_down}\n".encode() if self.taken_down else b""

    @property
    def images_total(self) -> int:
        """Images of all samples that are used."""
        if self.taken_down:
            return int(self.image_counts().sum())
        return int((self._tokens["piece_kinds"] == IMAGE_KIND).sum()) // self.variants

    @property
    def variants(self) -> int:
        """How many variants of each sample there are to draw from."""
        return self.variant_lengths.shape[1]

    def pieces(self, sample: int, variant: int = 0) -> Pieces:
        begin, end = _bounds(self._tokens["piece_ends"], sample * self.variants + variant)
        columns = (self._tokens[name][begin:end] for name in ("piece_tokens", "piece_kinds", "piece_frames"))
        return Pieces(*(column.astype(np.int32) for column in columns))

    def places(self, sample: int, variant: int = 0) -> dict[int, list[int]]:
        """Where the pieces of a sample may be cut, see Boundaries; nothing in an index that was made before they were kept."""
        if "cut_pieces" not in self._tokens:
            return {}
        begin, end = _bounds(self._tokens["piece_ends"], sample * self.variants + variant)
        pieces = self._tokens["cut_pieces"]
        first, last = np.searchsorted(pieces, (begin, end)).tolist()
        found: dict[int, list[int]] = {}
        for piece, place in zip(pieces[first:last].tolist(), self._tokens["cut_places"][first:last].tolist()):
            found.setdefault(piece - begin, []).append(place)
        return found


def sample_key(parts: Mapping[str, np.ndarray], sample: int) -> str:
    """The key of a sample, from the arrays of `SHARD.index`."""
    begin, end = _bounds(parts["key_ends"], sample)
    return parts["keys"][begin:end].tobytes().decode("utf-8")


def sample_members(parts: Mapping[str, np.ndarray], sample: int) -> tuple[Member, ...]:
    """The members of a sample, from the arrays of `SHARD.index`; none of a bad sample."""
    begin, end = _bounds(parts["member_ends"], sample)
    names = ("offsets", "sizes", "hashes", "widths", "heights", "parts")
    columns = [parts[name][begin:end].tolist() for name in names]
    start = int(parts["starts"][sample])
    return tuple(Member(start + offset, *row) for offset, *row in zip(*columns))


def _bounds(ends: np.ndarray, number: int) -> tuple[int, int]:
    return (int(ends[number - 1]) if number else 0), int(ends[number])
