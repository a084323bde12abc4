"""A part of a source's samples as a sequence of its own, such as those that are held out."""

from __future__ import annotations

import hashlib

import numpy as np

from m4train.data.index.shard_index import ShardIndex
from m4train.data.index.source_index import SourceIndex


def draws(index: SourceIndex) -> np.ndarray:
    """(N,) float64, a number from 0 to below 1 for each sample, by a hash of its key alone, or of what it says and shows if its
    key is but its number in a file. Those below a share are held out, so that samples which join a source later, wherever they
    stand, move none of the others."""
    samples = ((shard, number) for shard in index.shards for number in range(len(shard)))
    return np.fromiter((_draw(shard.identity(number)) for shard, number in samples), np.float64, len(index))


def _draw(name: bytes) -> float:
    """A number from 0 to below 1 that belongs to a name."""
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big") / 2.0**64


class PartIndex(SourceIndex):
    """The samples `numbers` (P,), in ascending order, of `whole`."""

    def __init__(self, whole: SourceIndex, numbers: np.ndarray) -> None:
        super().__init__(whole.shards)
        self._whole, self._numbers = whole, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def shard_number(self, sample: int) -> int:
        return self._whole.shard_number(self._number(sample))

    def locate(self, sample: int) -> tuple[ShardIndex, int]:
        return self._whole.locate(self._number(sample))

    def _number(self, sample: int) -> int:
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        return int(self._numbers[sample])

    @property
    def ends(self) -> np.ndarray:
        """(shards,) the sample number at which each shard ends."""
        return np.searchsorted(self._numbers, self._whole.ends)

    def size(self, sample: int, variant: int = 0) -> tuple[int, int]:
        return self._whole.size(self._number(sample), variant)

    def image_count(self, sample: int) -> int:
        return self._whole.image_count(self._number(sample))

    @property
    def images_total(self) -> int:
        return sum(self._whole.image_count(int(number)) for number in self._numbers)

    @property
    def lengths(self) -> np.ndarray:
        """(P,) tokens of the first variant of every sample, 0 for a bad one."""
        return self._whole.lengths[self._numbers]

    @property
    def frames(self) -> np.ndarray:
        """(P,) frames of the first variant of every sample."""
        return self._whole.frames[self._numbers]

    def digest(self) -> str:
        own = hashlib.blake2b(self._numbers.astype("<i8").tobytes(), digest_size=8).hexdigest()
        return f"{self._whole.digest()}-{own}"

    def block_ends(self) -> np.ndarray | None:
        """(blocks,) the sample number at which each stretch that is read whole ends; None if samples are read one by one."""
        whole = self._whole.block_ends()
        return None if whole is None else np.searchsorted(self._numbers, whole)

    @property
    def bad_count(self) -> int:
        return int((self.lengths == 0).sum())
