"""Engines x adapters x precision x recomputation: every pair of values occurs in a run that stops and goes on under another engine,
with the losses of one that was left alone in one process.

`make test` runs few cells in which every pair occurs, `make test-full` all of them.
"""

import itertools
import os
import random
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from m4train.training.engines import make_engine
from tests.distributed.cases import Case, build
from tests.helpers.distributed import run_distributed
from tests.helpers.training import make_trainer, read_metrics

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
FACTORS = {
    "engine": ENGINES,
    "next": ENGINES,  # where the run goes on
    "adapter": ("none", "lora", "dora", "qlora"),
    "precision": ("fp32", "bf16", "fp16"),
    "recompute": (False, True),
}
STEPS, STOP = 4, 2
# Relative. Sums in another order; half precision rounds what is summed, too. The pairs are within 2.5e-8, 6.4e-4 and 6.5e-5.
NEAR = {"fp32": 1e-6, "bf16": 2e-3, "fp16": 3e-4}


@dataclass(frozen=True)
class Cell:
    engine: str
    next: str
    adapter: str
    precision: str
    recompute: bool

    def __str__(self) -> str:
        flags = "-recompute" if self.recompute else ""
        return f"{self.engine}-{self.next}-{self.adapter}-{self.precision}{flags}"


def _all() -> list[Cell]:
    return [Cell(*row) for row in itertools.product(*FACTORS.values())]


def _pairs(cell: Cell) -> set:
    return set(itertools.combinations([(key, getattr(cell, key)) for key in FACTORS], 2))


def _pairwise() -> list[Cell]:
    """Few cells in which every pair of values of every two factors occurs, found greedily."""
    left, missing, chosen = _all(), {pair for cell in _all() for pair in _pairs(cell)}, []
    random.Random(0).shuffle(left)
    while missing:
        best = max(left, key=lambda cell: len(_pairs(cell) & missing))
        missing -= _pairs(best)
        chosen.append(best)
    return chosen


def _train(cell: Cell, run_dir: str, engine: str, steps: int | None) -> None:
    case = Case(engine, "idefics3", packs=3, micro=1, steps=STEPS, adapter=cell.adapter, recompute=cell.recompute)
    config, model, shape = build(case, run_dir)
    config.trainer.precision, config.trainer.stop_after = cell.precision, steps
    config.trainer.save_every, config.trainer.worst_batch_first = 100, False
    config.trainer.async_checkpoint = False
    engine_ = make_engine(config)
    make_trainer(config, model, engine_, packs=3, shape=shape).train()
    engine_.barrier()


def _losses(run_dir: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(run_dir)]


def _runs(cells: list[Cell]) -> dict[str, list[tuple[int, float]] | str]:
    """The losses of every cell by its name, or what it raised; on every rank of the same processes."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    box = [tempfile.mkdtemp()]
    dist.broadcast_object_list(box)
    found: dict[str, list[tuple[int, float]] | str] = {}
    for cell in cells:
        run_dir = os.path.join(box[0], str(cell))
        try:
            _train(cell, run_dir, cell.engine, STOP)
            _train(cell, run_dir, cell.next, None)
            found[str(cell)] = _losses(run_dir)
        except Exception as error:
            found[str(cell)] = repr(error)
    return found


@cache
def _left_alone(adapter: str, precision: str) -> list[tuple[int, float]]:
    with tempfile.TemporaryDirectory() as scratch:
        cell = Cell("single", "single", adapter, precision, False)
        _train(cell, str(Path(scratch) / "run"), "single", None)
        return _losses(str(Path(scratch) / "run"))


def _check(cells: list[Cell]) -> None:
    found = run_distributed(_runs, 2, cells, timeout=120.0 + 20.0 * len(cells))[0]
    wrong = {}
    for cell in cells:
        got, expected = found[str(cell)], _left_alone(cell.adapter, cell.precision)
        if isinstance(got, str) or [step for step, _ in got] != list(range(1, STEPS + 1)):
            wrong[str(cell)] = got
        elif (far := max(abs(a[1] - b[1]) / b[1] for a, b in zip(got, expected, strict=True))) > NEAR[cell.precision]:
            wrong[str(cell)] = far
    assert not wrong, wrong


def test_every_pair_of_values_occurs():
    cells = _pairwise()
    assert {pair for cell in cells for pair in _pairs(cell)} == {pair for cell in _all() for pair in _pairs(cell)}
    assert len(cells) <= 30
    assert {(cell.engine, cell.next) for cell in cells} == set(itertools.product(ENGINES, ENGINES))


@pytest.mark.slow
def test_pairs():
    _check(_pairwise())


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("engine", ENGINES)
def test_every_cell(engine):
    _check([cell for cell in _all() if cell.engine == engine])
