"""Runs a function on several gloo processes of this machine, and never hangs."""

from __future__ import annotations

import contextlib
import random
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from tests.helpers import warm


def free_port() -> int:
    """A port nobody listens on, below those that the system hands out: it would give a freed one of them to the next who asks."""
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def start_ranks(function: Callable[..., Any], world_size: int, *args: Any, folder: Path) -> list[warm.Child]:
    """Starts `function(*args)` on `world_size` processes that find each other through the environment.

    What rank N writes to stdout and stderr lies in `folder/rank-N.log`.
    """
    port = free_port()
    return [
        warm.start(
            function,
            *args,
            output=folder / f"rank-{rank}.log",
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(world_size),
            LOCAL_WORLD_SIZE=str(world_size),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(world_size)
    ]


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 600.0) -> list[Any]:
    """Calls `function(*args)` on `world_size` processes that find each other through the environment.

    Returns what each rank returned. Raises AssertionError with the output of the ranks that failed, or saying which ranks
    were still running after `timeout` seconds; every child is ended before this returns.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        ranks = start_ranks(_keep_result, world_size, function, args, scratch, folder=folder)
        try:
            wait_for_ranks(ranks, timeout)
        finally:
            end_ranks(ranks)
        failed = {rank: child.returncode for rank, child in enumerate(ranks) if child.returncode == 1}
        texts = [f"rank {rank}:\n{ranks[rank].said()}" for rank in failed]
        assert not failed, "\n".join(texts)
        stuck = {rank: child.returncode for rank, child in enumerate(ranks) if child.returncode != 0}
        assert not stuck, f"ranks {list(stuck)} gave no result within {timeout} s (exit codes {list(stuck.values())})"
        return [cloudpickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(world_size)]


def wait_for_ranks(ranks: list[warm.Child], timeout: float) -> None:
    """Until all have ended, or one failed (and the others had a moment to say why), or `timeout` seconds passed."""
    deadline = time.monotonic() + timeout
    while any(child.poll() is None for child in ranks) and time.monotonic() < deadline:
        if any(child.returncode not in (None, 0) for child in ranks):
            deadline = min(deadline, time.monotonic() + 5.0)
        time.sleep(0.02)


def end_ranks(ranks: list[warm.Child]) -> None:
    """Kills those that still run."""
    for child in ranks:
        child.kill()
    for child in ranks:
        child.wait(timeout=30)


def _keep_result(function: Callable[..., Any], args: tuple[Any, ...], folder: str) -> None:
    import os

    result = cloudpickle.dumps(function(*args))
    Path(folder, f"result-{os.environ['RANK']}").write_bytes(result)
