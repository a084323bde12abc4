"""Every engine gives the curve of one process, however a step is split over ranks and micro-batches.

By default the pairwise selection runs; with M4TRAIN_FULL_MATRIX=1 the full matrix of `cases.full`.
"""

import os
from dataclasses import replace
from functools import cache

import pytest

from tests.distributed.cases import Case, full, pairwise, run_case, run_cases
from tests.helpers.distributed import run_distributed

LOSS, NORM = 1e-5, 1e-4
FULL = bool(os.environ.get("M4TRAIN_FULL_MATRIX"))
# In ten steps the batch has grown twice, the rate has passed its peak, and a checkpoint is written.
SELECTED = full() if FULL else [(world, replace(case, steps=10)) for world, case in pairwise()]
PER_START = 30  # cases run in one start of the processes


@cache
def _reference(case: Case):
    return run_case(case)


@cache
def _chunk(world: int, start: int):
    """Metrics of `PER_START` cases by name, from one start of `world` processes."""
    cases = [case for size, case in SELECTED if size == world][start : start + PER_START]
    return run_distributed(run_cases, world, cases, timeout=60.0 + 120.0 * len(cases))[0]


def _metrics(world: int, case: Case):
    position = [c for size, c in SELECTED if size == world].index(case)
    return _chunk(world, position - position % PER_START)[case.name]


def _compare(expected, got):
    assert [line["step"] for line in got] == [line["step"] for line in expected]
    for a, b in zip(expected, got):
        assert b["data_hash"] == a["data_hash"]
        assert b["loss_tokens"] == a["loss_tokens"]
        assert b["loss"] == pytest.approx(a["loss"], rel=LOSS)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=NORM)
        for key in ("loss/web", "loss/chat"):
            assert b[key] == pytest.approx(a[key], rel=LOSS)
        by_part = {key for key in a if key.startswith("grad_norm/")}
        assert by_part == {key for key in b if key.startswith("grad_norm/")} != set()
        for key in by_part:
            assert b[key] == pytest.approx(a[key], rel=NORM, abs=NORM * a["grad_norm"])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), SELECTED, ids=[f"{case.name}-x{world}" for world, case in SELECTED])
def test_engine_equals_one_process(world, case):
    _compare(_reference(case.reference), _metrics(world, case))


def test_the_selection_covers_every_engine_with_every_hazard():
    rows = pairwise()
    for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3"):
        mine = [case for _, case in rows if case.engine == engine]
        assert {case.adapter for case in mine} == {"none", "lora", "dora"}
        assert any(case.frozen for case in mine)
        assert all(any(getattr(case, flag) for case in mine) for flag in ("rows", "weighted", "ramp"))
        assert any(case.tied for case in mine)
        assert any(case.packs % world for world, case in rows if case.engine == engine)
        assert engine == "ddp" or any(case.offload for case in mine)
    assert len(rows) <= 45


def test_the_steps_hold_a_rank_without_images():
    """Rank 0 of 3 gets packs 0, 3 of the first step, which are text only; so does one rank of 2 in micro-batches of one."""
    from tests.helpers.training import FakeLoader

    first = [next(iter(FakeLoader(packs=6, micro=1, rank=rank, world_size=2))).micro_batches for rank in range(2)]
    counts = [[batch.images.count for batch in batches] for batches in first]
    assert counts[0][0] == 0
    assert counts[1][0] > 0


def test_two_processes_equal_one_quickly():
    """The short form of the matrix, for every run of the tests."""
    cases = [Case(engine, "idefics3", packs=7, steps=4) for engine in ("ddp", "fsdp2", "zero2", "zero3")]
    results = run_distributed(run_cases, 2, cases, timeout=400)[0]
    for case in cases:
        _compare(_reference(case.reference), results[case.name])


@pytest.mark.slow
def test_sharding_within_nodes_and_replicating_over_them():
    cases = [
        Case("fsdp2", "idefics3", packs=7, steps=6, nodes=True),
        Case("fsdp2", "tiny", tied=True, packs=7, steps=6, nodes=True, frozen=True, recompute=True),
    ]
    results = run_distributed(run_cases, 4, cases, timeout=400)[0]
    for case in cases:
        _compare(_reference(case.reference), results[case.name])
