"""How full packs are, how even the ranks' work, and what planning costs, on lengths like those of OBELICS.

    python benchmarks/packing.py [--quick]

A document takes 2.5 images of 64 tokens and 910 tokens in all on average. "binding" is the fuller budget over all packs,
"each" the mean over packs of the one each is fuller in. `--quick`:
one seed, three budgets, and no planning.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m4train.config import CostConfig, DataConfig
from m4train.data.plan.balance import assign, imbalance
from m4train.data.plan.packing import Packer
from m4train.data.plan.plan import Plan, PlannedPack
from m4train.pack_costs import PackCosts
from tests.helpers.data import synthetic_source
from tests.unit.data.plan.test_packing import _units, fills, obelics_lengths

SEEDS = range(3)
BUDGETS = ((4096, 64), (4096, 23), (4096, 14), (4096, 12), (4096, 10), (4096, 8), (8192, 64), (8192, 22), (8192, 18))


def fill_table(budgets: Sequence[tuple[int, int]], seeds: Sequence[int]) -> None:
    print("| tokens, frames of a pack | token fill | frame fill | binding | each |\n| --- | --- | --- | --- | --- |")
    for tokens, frames in budgets:
        packs = [fills(obelics_lengths(10_000, seed), tokens, frames) for seed in seeds]
        used = np.mean([each.mean(axis=0) for each in packs], axis=0)
        binding = min(each.mean(axis=0).max() for each in packs)
        fullest = min(each.max(axis=1).mean() for each in packs)
        print(f"| {tokens:,}, {frames} | {used[0]:.2%} | {used[1]:.2%} | {binding:.2%} | {fullest:.2%} |")


def balance(seeds: Sequence[int]) -> None:
    worst, before = [], []
    for seed in seeds:
        packer = Packer(4096, 64, 128)
        units = [unit for unit in _units(obelics_lengths(10_000, seed)) if unit.tokens <= 4096]
        costs = [
            PlannedPack(0, tuple(pack)).cost(PackCosts(0.0, 1.0, CostConfig.squared, CostConfig.frame))
            for unit in units
            for pack in packer.add(unit)
        ]
        for start in range(0, len(costs) - 63, 64):
            step = costs[start : start + 64]
            worst.append(imbalance(step, assign(step, 8, 2)))
            before.append(imbalance(step, [[list(range(rank * 8, rank * 8 + 8))] for rank in range(8)]))
    print(
        f"imbalance of 64 packs on 8 ranks: {np.mean(worst):.2%} mean, {max(worst):.2%} worst of {len(worst)} steps",
        end="",
    )
    print(f" (in order of packing: {np.mean(before):.2%} mean)")


def planning(frames: int) -> float:
    """Seconds of CPU time for a step of 10,000 documents."""
    with tempfile.TemporaryDirectory() as folder:
        source = synthetic_source(Path(folder), 100_000, 10)
        steps = Plan([source], DataConfig(sequence_length=8192, images_per_pack=frames), 0, 1_100).steps()
        documents = sum(len(pack.units) for pack in next(steps).packs)
        begun = time.process_time()
        for _ in range(4):
            next(steps)
        return (time.process_time() - begun) / 4 * 10_000 / documents


def main(arguments: list[str] | None = None) -> None:
    quick = "--quick" in (sys.argv[1:] if arguments is None else arguments)
    seeds = SEEDS[:1] if quick else SEEDS
    fill_table(BUDGETS[:6:2] if quick else BUDGETS, seeds)
    balance(seeds)
    for frames in () if quick else (64, 24):
        print(
            f"planning a step of 10,000 documents, packs of 8,192 tokens and {frames} frames: {planning(frames):.3f} s"
        )


if __name__ == "__main__":
    main()
