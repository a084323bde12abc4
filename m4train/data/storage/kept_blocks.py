"""Which blocks (row groups) a reader keeps, when samples are read in blocks: the real ones and those of a prediction alike."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class KeptBlocks(Generic[T]):
    """The blocks used last.

    Packing holds up to twice `pool` samples back, so while the blocks of one `window` are drawn, samples of the window
    before are still to be read: two windows are kept, and of small blocks as many as packing may reach back to.
    """

    window: int = 1
    pool: int = 0
    _blocks: OrderedDict[Hashable, tuple[T, int]] = field(default_factory=OrderedDict)
    _samples: int = 0

    def __contains__(self, block: Hashable) -> bool:
        return block in self._blocks

    def get(self, block: Hashable) -> T | None:
        """What is kept of a block, which then is the one used last; None if it is to be read."""
        if block not in self._blocks:
            return None
        self._blocks.move_to_end(block)
        return self._blocks[block][0]

    def add(self, block: Hashable, value: T, samples: int) -> None:
        """Keeps a block that was read, and lets go of the oldest."""
        self._blocks[block] = (value, samples)
        self._samples += samples
        while len(self._blocks) > 2 * self.window:
            oldest = next(iter(self._blocks.values()))[1]
            if self._samples - oldest < 4 * self.pool:
                return
            self._blocks.popitem(last=False)
            self._samples -= oldest
