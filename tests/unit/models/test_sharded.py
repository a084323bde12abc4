"""Sharded parameters, one rank with images and one without: no rank waits for ever, and the gradients are those of one."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "zero3", pytest.param("fsdp2_compiled", marks=pytest.mark.full)])
def test_uneven_ranks(kind: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run(
        [*command, "tests.helpers.models_sharded", kind],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
