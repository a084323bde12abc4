"""Runs a function on several gloo processes of this machine, and never hangs."""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _child(rank: int, world_size: int, port: int, work: bytes, folder: str) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    try:
        function, args = cloudpickle.loads(work)
        result = cloudpickle.dumps(function(*args))
        (Path(folder) / f"result-{rank}").write_bytes(result)
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        os._exit(1)  # the process group of a failed rank may wait for the others for ever


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Calls `function(*args)` on `world_size` processes that find each other through the environment.

    Returns what each rank returned. Raises AssertionError with the traceback of the first rank that failed, or saying
    which ranks were still running after `timeout` seconds; every child is ended before this returns.
    """
    context = mp.get_context("spawn")
    work, port = cloudpickle.dumps((function, args)), free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = [
            context.Process(target=_child, args=(rank, world_size, port, work, folder), daemon=True)
            for rank in range(world_size)
        ]
        for child in children:
            child.start()
        try:
            _wait(children, time.monotonic() + timeout)
        finally:
            for child in children:
                if child.is_alive():
                    child.kill()
                child.join()
        errors = {rank: Path(folder, f"error-{rank}") for rank in range(world_size)}
        texts = [f"rank {rank}:\n{path.read_text()}" for rank, path in errors.items() if path.exists()]
        if texts:
            raise AssertionError("\n".join(texts))
        stuck = [rank for rank in range(world_size) if not Path(folder, f"result-{rank}").exists()]
        if stuck:
            codes = [children[rank].exitcode for rank in stuck]
            raise AssertionError(f"ranks {stuck} gave no result within {timeout} s (exit codes {codes})")
        return [cloudpickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world_size)]


def _wait(children: list[Any], deadline: float) -> None:
    """Until all children ended, one failed (and the others had a moment to say why), or the deadline passed."""
    while any(child.is_alive() for child in children) and time.monotonic() < deadline:
        if any(child.exitcode not in (None, 0) for child in children):
            deadline = min(deadline, time.monotonic() + 5.0)
        time.sleep(0.05)
