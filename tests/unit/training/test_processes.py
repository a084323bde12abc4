"""A process whose gloo threads still hold tensors when it ends, ends with its own exit code."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from m4train.training.engines.processes import Processes

processes = Processes(timedelta(minutes=1))
group = dist.group.WORLD  # as device meshes and sharded parameters do
received, sent = [[torch.zeros(3) for _ in range(1000)] for _ in range(2)]
dist.all_gather_coalesced([received], sent, async_op=True)  # gloo's thread is the last to let go of 2,000 tensors
if sys.argv[1] == "orderly":
    processes.shutdown()
sys.exit(7)
"""


@pytest.mark.parametrize("way", ["orderly", "at once"])
def test_gloo_does_not_abort_a_process_that_ends(way: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 7, done.stderr
