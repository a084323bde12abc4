"""Memory does not grow with the steps of a run."""

from __future__ import annotations

import pytest

from benchmarks.growth import memory


@pytest.mark.full
def test_memory_is_flat_over_1000_steps() -> None:
    """A real run with data workers, evaluations and checkpoints; 4 MiB in 750 steps would be 5.5 KiB a step."""
    rows = memory(1_000, "logging=none").rows
    settled, last = rows[len(rows) // 4 - 1], rows[-4:]
    assert min(own for _, own, _, _ in last) < settled[1] + 4
    assert min(others for _, _, others, _ in last) < settled[2] + 4
