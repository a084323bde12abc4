"""How fast each pair of nodes exchanges data, which pairs are slow, and which nodes that speaks against."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

_MEGABYTES = 16  # sent both ways between each pair of nodes
_SLOW = 0.25  # of the usual speed of a pair: a link or a card that needs a look
_TRIES = 3  # the fastest counts: what else a machine does makes a pair look slow, and nothing makes one look fast

Speeds = dict[tuple[str, str], float]  # GiB/s between two nodes, both ways together


def pair_speeds(processes: Any, node: str) -> Speeds:
    """Measures all pairs of the nodes that the processes of a group run on; every process calls it, with its own node's name,
    and gets all speeds. In each round every node is in one pair at most; pairs that look slow are measured again, alone."""
    nodes = _gather(node)
    first = {name: rank for rank, name in reversed(list(enumerate(nodes)))}
    names = sorted(first)
    speeds: Speeds = {}
    for pairs in rounds(len(names)):
        speeds |= _exchanged(processes, first, [(names[one], names[other]) for one, other in pairs])
    for pair in slow_pairs(speeds):
        speeds[pair] = max(speeds[pair], _exchanged(processes, first, [pair])[pair])
    return speeds


def _exchanged(processes: Any, first: dict[str, int], pairs: list[tuple[str, str]]) -> Speeds:
    """The speeds of pairs that share no node, of which the first ranks exchange a block at the same time."""
    import torch
    import torch.distributed as dist

    block, mine = torch.ones(_MEGABYTES * 2**18, device=processes.device), {}
    for pair in pairs:
        one, other = (first[name] for name in pair)
        if processes.rank not in (one, other):
            continue
        seconds = []
        for _ in range(1 + _TRIES):  # connections are made by the first
            began = time.perf_counter()
            if processes.rank == one:
                dist.send(block, other)
                dist.recv(block, other)
            else:
                dist.recv(block, one)
                dist.send(block, one)
            float(block[-1])  # waits for the device
            seconds.append(time.perf_counter() - began)
        if processes.rank == one:
            mine[pair] = 2 * _MEGABYTES / 1024 / max(min(seconds[1:]), 1e-9)
    return {pair: speed for found in _gather(mine) for pair, speed in found.items()}


def _gather(value: Any) -> list[Any]:
    import torch.distributed as dist

    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """All pairs of `count` numbers, in rounds in which each occurs once at most: a tournament on a circle."""
    circle: list[int | None] = [*range(count), *([None] if count % 2 else [])]
    found = []
    for _ in range(len(circle) - 1):
        facing = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in facing if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return found


def slow_pairs(speeds: Speeds) -> list[tuple[str, str]]:
    """Those far below what is usual, which is the middle of what each node reaches with its best partner."""
    best: dict[str, float] = {}
    for pair, speed in speeds.items():
        for name in pair:
            best[name] = max(speed, best.get(name, 0.0))
    usual = statistics.median(best.values()) if best else 0.0
    return [pair for pair, speed in speeds.items() if speed < usual * _SLOW]


def slow_nodes(pairs: Sequence[tuple[str, str]]) -> dict[str, list[str]]:
    """The nodes that slow pairs speak against, with their partners: first who is in the most of them; of a pair that has
    nothing else against it, both."""
    left, found = list(pairs), {}
    while left:
        counted = Counter(name for pair in left for name in pair)
        most = max(counted.values())
        worst = [name for name, count in counted.items() if count == most][: 1 if most > 1 else 2]
        for name in worst:
            found[name] = sorted(other for pair in pairs if name in pair for other in pair if other != name)
        left = [pair for pair in left if not set(pair) & set(worst)]
    return found
