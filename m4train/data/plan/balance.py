"""Sharing the packs of a step among ranks so that none waits long for another."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_EXCHANGES, _PARTNERS = 4, 8  # exchanges for each rank at most; fastest ranks that the slowest one is compared with
_WORTH = 1e-4  # share of its time by which an exchange makes the slowest rank faster at least


def assign(costs: Sequence[float], ranks: int, micro_batch_size: int) -> list[list[list[int]]]:
    """Pack numbers of each micro-batch of each rank: result[rank][micro_batch].

    The most expensive pack first, each to the group with the least so far that has room: first to ranks, of which none
    takes more than its even share, rounded up, and the slowest rank then exchanges packs with others as long as that helps; then
    within each rank to its micro-batches. Every rank has the same number of micro-batches, some of them empty if packs do not divide. A rank's micro-batches go from costly to cheap, so
    that ranks that wait for each other within a step work on similar ones.
    """
    return assign_by_kind([costs], [0] * ranks, micro_batch_size)


def assign_by_kind(
    costs: Sequence[Sequence[float]], kinds: Sequence[int], micro_batch_size: int
) -> list[list[list[int]]]:
    """The same for ranks on devices of several kinds: costs[kind][pack] on each, and the kind of each rank."""
    share = -(-len(costs[0]) // len(kinds))
    steps = -(-share // micro_batch_size)
    result = []
    for rank, packs in enumerate(_evened(_spread(list(range(len(costs[0]))), costs, kinds, share), costs, kinds)):
        own = costs[kinds[rank]]
        groups = _spread(packs, [own], [0] * steps, micro_batch_size)
        groups.sort(key=lambda group: -sum(own[pack] for pack in group))
        result.append([sorted(group) for group in groups])
    return result


def imbalance(costs: Sequence[float], assignment: Sequence[Sequence[Sequence[int]]]) -> float:
    """How much longer the slowest rank takes than the mean, as a fraction."""
    loads = [sum(costs[pack] for group in groups for pack in group) for groups in assignment]
    return max(loads) * len(loads) / sum(loads) - 1.0 if sum(loads) else 0.0


def _spread(packs: list[int], costs: Sequence[Sequence[float]], kinds: Sequence[int], room: int) -> list[list[int]]:
    """The packs of each group, of which kinds[group] is the kind; a pack goes where the group then has the least."""
    result: list[list[int]] = [[] for _ in kinds]
    heaps = [[(0.0, group) for group, of in enumerate(kinds) if of == kind] for kind in range(len(costs))]
    for pack in sorted(packs, key=lambda pack: (-sum(each[pack] for each in costs), pack)):
        least = min((heap[0][0] + costs[kind][pack], kind) for kind, heap in enumerate(heaps) if heap)
        load, group = heapq.heappop(heaps[least[1]])
        result[group].append(pack)
        if len(result[group]) < room:
            heapq.heappush(heaps[least[1]], (load + costs[least[1]][pack], group))
    return result


def _evened(groups: list[list[int]], costs: Sequence[Sequence[float]], kinds: Sequence[int]) -> list[list[int]]:
    """The groups after exchanges of two packs, each the best between the slowest group and one of the fastest few."""
    loads = [sum(costs[kind][pack] for pack in group) for kind, group in zip(kinds, groups, strict=True)]
    for _ in range(_EXCHANGES * len(groups)):
        slow = max(range(len(groups)), key=lambda group: (loads[group], -group))
        best, found = loads[slow] * (1 - _WORTH), None
        for fast in heapq.nsmallest(_PARTNERS, range(len(groups)), key=lambda group: (loads[group], group)):
            own, other = costs[kinds[slow]], costs[kinds[fast]]
            for out in groups[slow] if fast != slow else ():
                for into in groups[fast]:
                    after = max(loads[slow] - own[out] + own[into], loads[fast] - other[into] + other[out])
                    if after < best:
                        best, found = after, (fast, out, into)
        if found is None:
            break
        fast, out, into = found
        groups[slow][groups[slow].index(out)], groups[fast][groups[fast].index(into)] = into, out
        for group in (slow, fast):
            loads[group] = sum(costs[kinds[group]][pack] for pack in groups[group])
    return groups
