"""How much longer the slowest rank takes than the mean one, by the costs of packs measured on this machine.

    PYTHONPATH=. python benchmarks/balance.py [--packs 24] [--model 20m] [--save FILE | --load FILE]

Packs of 4,096 tokens of documents with lengths like those of OBELICS run forward and backward (processor time of one thread).
The fit is made from 12 of them, chosen as a run chooses them. The simulated packs are others: a pack takes what the fit over all
that were measured says, times one plus a residual that was measured. Every step is shared among ranks by the packs in their order,
by the constants of data.cost, by the fit, and by the times themselves, which nobody knows before.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.training import IMAGE, SIZES, Sample, packed, saved
from m4train import Idefics3ForConditionalGeneration
from m4train.config import Config, CostConfig
from m4train.data.plan.balance import assign, imbalance
from m4train.data.plan.packing import Packer, Unit
from m4train.data.plan.plan import PlannedPack
from m4train.pack_costs import PackCosts, fit_costs
from m4train.training.engines.single import SingleEngine
from m4train.training.step import run_micro_batches
from tests.unit.data.plan.test_packing import _units, obelics_lengths

TOKENS, FRAMES, POOL, PER_FRAME = 4096, 64, 128, 64
RANKS, EACH, STEPS = (8, 16, 32, 64), (1, 2, 4, 8), 40


def planned(count: int, seed: int) -> list[PlannedPack]:
    """The first `count` packs of an endless stream."""
    packer, packs = Packer(TOKENS, FRAMES, POOL), []
    for unit in _units(obelics_lengths(count * 6 + 400, seed)):
        if unit.tokens <= TOKENS:
            packs += [PlannedPack(0, tuple(pack)) for pack in packer.add(unit)]
        if len(packs) >= count:
            break
    return packs[:count]


def shape(pack: PlannedPack) -> tuple[int, int, int, int]:
    return 1, pack.tokens, pack.squared, pack.frames


def measured(count: int, size: str, save: Path | None) -> list[tuple[tuple[int, ...], float]]:
    """Shapes of packs, and seconds of processor time, after one for a warm-up."""
    torch.set_num_threads(1)
    config, rng = Config(name="benchmark"), np.random.default_rng(1)
    config.trainer.precision = "fp32"
    side = SIZES[size][-2]
    with tempfile.TemporaryDirectory() as folder:
        saved(folder, size)
        engine = SingleEngine(config, "cpu")
        engine.prepare(Idefics3ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train())

    def sample(unit: Unit) -> Sample:
        ids = torch.from_numpy(rng.integers(10, SIZES[size][0], unit.tokens))
        ids[: unit.frames * PER_FRAME] = IMAGE
        return Sample(ids, torch.from_numpy(rng.integers(0, 256, (unit.frames, 3, side, side), dtype=np.uint8)))

    packs, rows = planned(count, 1), []
    for number, pack in enumerate(packs[:1] + packs):
        batch = packed([sample(unit) for unit in pack.units])
        begun = time.process_time()
        run_micro_batches(engine, [batch], batch.loss_tokens, 0.0, None)
        taken = time.process_time() - begun
        if number:
            rows.append((shape(pack), taken))
            if save is not None:
                save.write_text(json.dumps(rows))
        for parameter in engine.trainable.values():
            parameter.grad = None
    return rows


def slowest(ranks: int, each: int, fit: PackCosts, true: PackCosts, residuals: np.ndarray) -> list[list[float]]:
    """Slowest over mean rank of every step: in order, by the constants, by the fit, by the times, and what no sharing can be below:
    the costliest pack with the cheapest others."""
    rng, found = np.random.default_rng(ranks * each), [[], [], [], [], []]
    packs = planned(ranks * each * STEPS, ranks + each)
    constants = PackCosts(0.0, 1.0, CostConfig.squared, CostConfig.frame)
    for start in range(0, len(packs), ranks * each):
        step = packs[start : start + ranks * each]
        times = [pack.cost(true) * (1 + rng.choice(residuals)) for pack in step]
        orders = [[pack.cost(costs) for pack in step] for costs in (constants, fit)]
        in_order = [[list(range(rank * each, (rank + 1) * each))] for rank in range(ranks)]
        shared = [in_order, *(assign(costs, ranks, 1) for costs in (*orders, times))]
        for place, assignment in zip(found, shared, strict=False):
            place.append(1 + imbalance(times, assignment))
        least = (max(times) + sum(sorted(times)[: each - 1])) / each / np.mean(times)
        found[-1].append(max(1.0, float(least)))
    return found


def varied(rows: list[tuple]) -> list[tuple]:
    """Three with the most frames, with the fewest, with the longest and with the shortest segments."""
    orders = [sorted(rows, key=lambda row: row[0][place]) for place in (3, 2)]
    return [row for order in orders for row in (*order[:3], *order[-3:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=24)
    parser.add_argument("--model", default="20m", choices=SIZES)
    parser.add_argument("--save", type=Path)
    parser.add_argument("--load", type=Path)
    options = parser.parse_args()
    rows = (
        json.loads(options.load.read_text()) if options.load else measured(options.packs, options.model, options.save)
    )
    shapes, seconds = [tuple(row[0]) for row in rows], [row[1] for row in rows]
    true, spread = fit_costs(shapes, seconds)
    fit, _ = fit_costs(*zip(*varied(list(zip(shapes, seconds, strict=True))), strict=True))
    residuals = np.array([taken / true.of(*row[1:]) - 1 for row, taken in zip(shapes, seconds, strict=True)])
    for name, costs in (("all", true), ("12 of them", fit)):
        print(
            f"fit of {name}: {costs.pack:.3g} s a pack, {costs.token:.3g} a token, {costs.squared:.3g} a squared token, {costs.frame:.3g} a frame"
        )
    print(
        f"{len(rows)} packs of {np.mean(seconds):.2f} s, {np.std(seconds) / np.mean(seconds):.1%} apart; the fit leaves {spread:.2%}"
    )
    print(
        "| ranks | packs a rank | in order | constants | fit | times known | bound |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for each in EACH:
        for ranks in RANKS:
            found = slowest(ranks, each, fit, true, residuals)
            cells = " | ".join(f"{np.mean(column):.3f} ({max(column):.3f})" for column in found)
            print(f"| {ranks} | {each} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
