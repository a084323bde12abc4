"""How the data side starts processes, and makes sure that none outlives the trainer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from functools import cache
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection
from typing import Any

from m4train.exits import STOPS


def worker_context() -> Any:
    """Processes forked from a clean server that has already imported what they need: no threads of the trainer are copied,
    and they start at once.

    The server and its processes never see the signals that ask a run to stop, which terminals, launchers and SLURM send to
    everything at once: the trainer still needs its data until the ranks have agreed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["m4train.data.loading.loader"])
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        resource_tracker.ensure_running()  # the server would start it, which unblocks some of them
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


@cache
def lifeline() -> tuple[Connection, Connection]:
    """A pipe that this process holds open at both ends as long as it lives; children are given the first, the reading end.

    The children of a fork server keep it alive and it keeps them, so nobody would notice that the trainer was killed. When
    this process ends by itself, its end closes before multiprocessing waits for children, which SIGTERM does not reach.
    """
    line = multiprocessing.Pipe(duplex=False)
    util.Finalize(None, line[1].close, exitpriority=100)
    return line


def live_with_the_trainer(line: Connection) -> None:
    """Called first in every child: ends it as soon as the trainer's end of its `lifeline` closes, and leaves
    interrupts from the terminal to the trainer, which alone decides what they mean."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        try:
            line.recv_bytes()
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=watch, name="m4train-lifeline", daemon=True).start()
