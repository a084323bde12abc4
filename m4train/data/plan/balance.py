"""Sharing the packs of a step among ranks so that none waits long for another."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def assign(costs: Sequence[float], ranks: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Pack numbers of each micro-batch of each rank: result[rank][micro_batch].

    The most expensive pack first, each to the group with the least so far that has room: first to ranks, of which none
    takes more than its even share, rounded up; then within each rank to its micro-batches. Every rank has the same number
    of micro-batches, some of them empty if packs do not divide. A rank's micro-batches go from costly to cheap, so
    that ranks that wait for each other within a step work on similar ones.
    """
    share = -(-len(costs) // ranks)
    steps = -(-share // micro_batch_size)
    result = []
    for packs in _spread(list(range(len(costs))), costs, ranks, share):
        groups = _spread(packs, costs, steps, micro_batch_size)
        groups.sort(key=lambda group: -sum(costs[pack] for pack in group))
        result.append([sorted(group) for group in groups])
    return result


def imbalance(costs: Sequence[float], assignment: Sequence[Sequence[Sequence[int]]]) -> float:
    """How much longer the slowest rank takes than the mean, as a fraction."""
    loads = [sum(costs[pack] for group in groups for pack in group) for groups in assignment]
    return max(loads) * len(loads) / sum(loads) - 1.0 if sum(loads) else 0.0


def _spread(packs: list[int], costs: Sequence[float], groups: int, room: int) -> list[list[int]]:
    result: list[list[int]] = [[] for _ in range(groups)]
    heap = [(0.0, group) for group in range(groups)]
    for pack in sorted(packs, key=lambda pack: (-costs[pack], pack)):
        load, group = heapq.heappop(heap)
        result[group].append(pack)
        if len(result[group]) < room:
            heapq.heappush(heap, (load + costs[pack], group))
    return result
