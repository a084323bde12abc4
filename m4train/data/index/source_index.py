"""The indexes of a source's shards as one sequence of samples."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from m4train.data.index.catalogue import MappedShards, Stored, taken_digest
from m4train.data.index.shard_index import ShardIndex
from m4train.data.sources.fields import SPLIT


class SourceIndex:
    """The samples of `shards` one after the other.

    What is asked of every sample comes from the catalogue, if the shards have one, and otherwise from their indexes.
    """

    def __init__(self, shards: Sequence[ShardIndex]) -> None:
        self.shards = shards
        found = self._catalogue
        self._ends = np.cumsum([len(shard) for shard in shards], dtype=np.int64) if found is None else found[1]["ends"]

    @property
    def _catalogue(self) -> Stored | None:
        return self.shards.catalogue if isinstance(self.shards, MappedShards) else None

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def shard_number(self, sample: int) -> int:
        """Which of the shards holds a sample."""
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        return int(np.searchsorted(self._ends, sample, side="right"))

    def locate(self, sample: int) -> tuple[ShardIndex, int]:
        """The shard that holds a sample, and its number there."""
        shard = self.shard_number(sample)
        return self.shards[shard], sample - (int(self._ends[shard - 1]) if shard else 0)

    @property
    def ends(self) -> np.ndarray:
        """(shards,) the sample number at which each shard ends."""
        return self._ends

    @property
    def variants(self) -> int:
        """How many variants of each sample there are to draw from."""
        if self._catalogue is not None:
            return self._catalogue[1]["lengths"].shape[1]
        return self.shards[0].variants

    def size(self, sample: int, variant: int = 0) -> tuple[int, int]:
        """Tokens and frames of a variant of a sample; no tokens if it cannot be used."""
        if self._catalogue is not None:
            arrays = self._catalogue[1]
            return int(arrays["lengths"][sample, variant]), int(arrays["frames"][sample, variant])
        shard, number = self.locate(sample)
        return int(shard.variant_lengths[number, variant]), int(shard.variant_frames[number, variant])

    def image_count(self, sample: int) -> int:
        """Images of a sample that are used."""
        if self._catalogue is not None:
            return int(self._catalogue[1]["images"][sample])
        shard, number = self.locate(sample)
        return shard.image_count(number)

    @property
    def images_total(self) -> int:
        """Images of all samples that are used."""
        if self._catalogue is not None:
            return int(self._catalogue[1]["images"].sum(dtype=np.int64))
        return sum(shard.images_total for shard in self.shards)

    @property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of the first variant of every sample, 0 for a bad one."""
        if self._catalogue is not None:
            return self._catalogue[1]["lengths"][:, 0]
        return np.concatenate([shard.lengths for shard in self.shards] or [np.zeros(0, np.int64)])

    @property
    def frames(self) -> np.ndarray:
        """(N,) frames of the first variant of every sample."""
        if self._catalogue is not None:
            return self._catalogue[1]["frames"][:, 0]
        return np.concatenate([shard.frames for shard in self.shards] or [np.zeros(0, np.int64)])

    def digest(self) -> str:
        """Names the content and its token counts: two sources with equal digests give the same plan."""
        if self._catalogue is not None:
            return self._catalogue[0]["digest"]
        digest = hashlib.blake2b(digest_size=8)
        for shard in self.shards:
            digest.update(shard.digest_line())
        return digest.hexdigest()

    def taken_down(self) -> str:
        """Names what of the samples is taken down; empty if nothing is. No part of `digest`: states of plans stay valid."""
        if self._catalogue is not None:
            return self._catalogue[0]["taken"]
        return taken_digest(b"".join(shard.taken_line() for shard in self.shards))

    def block_ends(self) -> np.ndarray | None:
        """(blocks,) the sample number at which each stretch that is read whole ends; None if samples are read one by one."""
        if self._catalogue is not None:
            return self._catalogue[1]["block_ends"] if self._catalogue[0]["read_whole"] else None
        if not any(shard.meta["blocks"] for shard in self.shards):
            return None
        return np.cumsum([size for shard in self.shards for size in shard.meta["blocks"] or [len(shard)]])

    @property
    def unread(self) -> dict[str, int]:
        """In how many samples each field was met that is not read, and which splits they say they are of, if several; those that
        most have first."""
        counts: Counter[str] = Counter(self._catalogue[0]["unread"] if self._catalogue is not None else {})
        for shard in self.shards if self._catalogue is None else ():
            counts.update(shard.meta.get("unread", {}))
        splits = [name for name in counts if name.startswith(SPLIT)]
        return {name: count for name, count in counts.most_common() if name not in splits or len(splits) > 1}

    @property
    def bad_count(self) -> int:
        """Samples that cannot be used."""
        if self._catalogue is not None:
            return int(self._catalogue[1]["bad"].sum())
        return sum(len(shard.bad) for shard in self.shards)
