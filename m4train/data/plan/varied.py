"""Planned packs that differ as much as those of a run do."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

from m4train.data.plan.plan import Plan, PlannedPack

_GROUPS = 12
_STEPS, _PACKS = 16, 512  # the packs of at most so many steps, or so many packs, are chosen from


def varied_packs(plan: Plan, state: dict[str, Any] | None, size: int) -> list[tuple[PlannedPack, ...]]:
    """Groups of `size` packs out of the first steps after `state`: with the most and the fewest frames, with the longest and the shortest
    segments."""
    packs: list[PlannedPack] = []
    for step in islice(plan.steps(state), _STEPS):
        packs += step.packs
        if len(packs) >= _PACKS:
            break
    number = min(_GROUPS // 4 * size, len(packs))
    by_frames = sorted(packs, key=lambda pack: (pack.frames, pack.number))
    by_squared = sorted(packs, key=lambda pack: (pack.squared, pack.number))
    chosen = [group for order in (by_frames, by_squared) for group in (order[:number], order[len(order) - number :])]
    return [tuple(group[start : start + size]) for group in chosen for start in range(0, len(group), size)]


def shape_of(packs: Sequence[PlannedPack]) -> tuple[int, int, int, int]:
    """What a micro-batch is timed by: packs, tokens, squared tokens summed over segments, frames."""
    sums = (sum(getattr(pack, name) for pack in packs) for name in ("tokens", "squared", "frames"))
    return (len(packs), *sums)
