"""How much more is read than used, when samples are read in blocks (row groups), predicted from the plan."""

from __future__ import annotations

from collections import Counter

import numpy as np

from m4train.data.plan.plan import Plan, StepPlan
from m4train.data.storage.kept_blocks import KeptBlocks

HIGH = 2.0  # above this, shards are the better form


class ReadSimulation:
    """Follows the readers of a run (`ranks` times data.num_workers processes), each of which keeps its last few blocks.

    `amplification()` is, per source that is read in blocks, the samples read for each sample used.
    """

    def __init__(self, plan: Plan, ranks: int, micro_batch_size: int) -> None:
        self._plan, self._ranks, self._micro = plan, ranks, micro_batch_size
        ends = {number: source.index.block_ends() for number, source in enumerate(plan.sources)}
        self._ends: dict[int, np.ndarray] = {number: found for number, found in ends.items() if found is not None}
        self._kept: dict[tuple[int, int, int], KeptBlocks[bool]] = {}  # rank, worker, source -> blocks
        self._turns = [0] * ranks
        self._read: Counter[int] = Counter()
        self._used: Counter[int] = Counter()

    def add(self, step: StepPlan) -> None:
        """Follows one more step."""
        if not self._ends:
            return
        workers = max(1, self._plan.data.num_workers)
        for rank, groups in enumerate(self._plan.shared(step.packs, self._ranks, self._micro)):
            for group in groups:
                worker = self._turns[rank] % workers
                self._turns[rank] += 1
                for unit in (unit for number in group for unit in step.packs[number].units):
                    if unit.source in self._ends:
                        self._fetch((rank, worker, unit.source), unit.sample)

    def _fetch(self, reader: tuple[int, int, int], sample: int) -> None:
        source = reader[2]
        ends = self._ends[source]
        block = int(np.searchsorted(ends, sample, side="right"))
        if reader not in self._kept:
            self._kept[reader] = KeptBlocks(self._plan.data.shuffle_window, self._plan.data.packing_pool)
        if self._kept[reader].get(block) is None:
            samples = int(ends[block] - (ends[block - 1] if block else 0))
            self._kept[reader].add(block, True, samples)
            self._read[source] += samples
        self._used[source] += 1

    def amplification(self) -> dict[str, float]:
        """By the name of the source; at least 1."""
        sources = self._plan.sources
        return {sources[n].name: max(1.0, self._read[n] / self._used[n]) for n in self._ends if self._used[n]}
