"""Online best fit: documents go into the fullest open pack that still has room for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """One segment to be packed: pieces `first` to `last` of a sample (0 and -1 for all), and what it takes."""

    source: int
    sample: int
    epoch: int
    first: int
    last: int
    tokens: int
    frames: int


class OpenPack:
    """A pack being filled."""

    __slots__ = ("frames", "tokens", "units")

    def __init__(self, units: Sequence[Unit] = ()) -> None:
        self.units = list(units)
        self.tokens = sum(unit.tokens for unit in units)
        self.frames = sum(unit.frames for unit in units)

    def add(self, unit: Unit) -> None:
        self.units.append(unit)
        self.tokens += unit.tokens
        self.frames += unit.frames


class Packer:
    """Packs units under a budget of `tokens` and of `frames`, choosing among at most `open_packs` packs.

    Closes a pack when it is exactly full, or, where a unit fits nowhere and no more may be opened, the fullest one.
    Which pack a unit goes to depends only on the units before it.
    """

    def __init__(self, tokens: int, frames: int, open_packs: int) -> None:
        self.tokens = tokens
        self.frames = frames
        self.limit = open_packs
        self.open: list[OpenPack] = []

    def add(self, unit: Unit) -> list[list[Unit]]:
        """Places one unit (which must fit an empty pack); returns the packs this closes."""
        best, room_tokens, room_frames = None, self.tokens - unit.tokens, self.frames - unit.frames
        for pack in self.open:
            if (
                pack.tokens <= room_tokens
                and pack.frames <= room_frames
                and (best is None or pack.tokens > best.tokens)
            ):
                best = pack
        closed = []
        if best is None:
            if len(self.open) >= self.limit:
                fullest = max(self.open, key=self._fill)
                self.open.remove(fullest)
                closed.append(fullest.units)
            best = OpenPack()
            self.open.append(best)
        best.add(unit)
        if best.tokens == self.tokens:
            self.open.remove(best)
            closed.append(best.units)
        return closed

    def flush(self) -> list[list[Unit]]:
        """Closes all packs, fullest first."""
        closed = [pack.units for pack in sorted(self.open, key=self._fill, reverse=True)]
        self.open = []
        return closed

    def _fill(self, pack: OpenPack) -> float:
        return max(pack.tokens / self.tokens, pack.frames / self.frames)

    def state(self) -> list[list[list[int]]]:
        """The units of every open pack, as JSON."""
        return [[list(unit) for unit in pack.units] for pack in self.open]

    def load_state(self, state: Sequence[Sequence[Sequence[int]]]) -> None:
        self.open = [OpenPack([Unit(*unit) for unit in units]) for units in state]
