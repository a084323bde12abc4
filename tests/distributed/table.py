"""Prints the table of README.md: how far every selected case is from the run of one process.

OMP_NUM_THREADS=1 python -m tests.distributed.table          # the pairwise selection
OMP_NUM_THREADS=1 python -m tests.distributed.table full     # the full matrix
"""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from tests.distributed.cases import FLAGS, Case, full, pairwise, run_case, run_cases
from tests.helpers.distributed import run_distributed

PER_START = 16


@cache
def _reference(case: Case) -> list[dict[str, Any]]:
    return run_case(case)


def _largest(expected: list[dict[str, Any]], got: list[dict[str, Any]], key: str) -> float:
    return max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(expected, got, strict=True))


def main() -> None:
    """Runs the cases and prints one row for each."""
    rows = full() if sys.argv[1:] == ["full"] else pairwise()
    print("| engine | processes | model | packs x micro-batch | with | loss | gradient norm |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for world in sorted({world for world, _ in rows}):
        cases = sorted((case for size, case in rows if size == world), key=lambda case: case.name)
        for start in range(0, len(cases), PER_START):
            chunk = cases[start : start + PER_START]
            results = run_distributed(run_cases, world, chunk, timeout=120.0 * (1 + len(chunk)))[0]
            for case in chunk:
                print(_row(world, case, results[case.name]), flush=True)


def _row(world: int, case: Case, got: list[dict[str, Any]]) -> str:
    expected = _reference(case.reference)
    flags = [name for name in FLAGS if getattr(case, name)]
    flags += [] if case.adapter == "none" else [case.adapter]
    loss, norm = (_largest(expected, got, key) for key in ("loss", "grad_norm"))
    return (
        f"| {case.engine} | {world} | {case.model} | {case.packs} x {case.micro} | {', '.join(flags) or '-'} "
        f"| {loss:.0e} | {norm:.0e} |"
    )


if __name__ == "__main__":
    main()
