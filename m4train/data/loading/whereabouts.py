"""Which sample every worker is at, so that a worker that dies is named together with the sample that killed it."""

from __future__ import annotations

import os
import time

import psutil
from torch.utils.data import get_worker_info

from m4train.data.loading.processes import worker_context
from m4train.data.plan.packing import Unit

_NONE = -1
_SAMPLES = 1 << 40  # a cell holds source x this + sample, so that it is written at once


class Whereabouts:
    """Memory that the workers share with the trainer; the kernel frees it with the last of them."""

    def __init__(self, workers: int) -> None:
        self._pids = worker_context().RawArray("q", [_NONE] * workers)
        self._places = worker_context().RawArray("q", [_NONE] * workers)

    def __call__(self, unit: Unit | None) -> None:
        """Called in a worker: it begins with the sample of `unit`, or is at none."""
        worker = get_worker_info()
        if worker is not None:
            self._pids[worker.id] = os.getpid()
            self._places[worker.id] = _NONE if unit is None else unit.source * _SAMPLES + unit.sample

    def of_the_dead(self, patience: float = 5.0) -> list[tuple[int, int]]:
        """Source and sample number that each dead worker was at; nothing of one that died between two.

        A process closes its connections before it ends, so that the trainer may notice before the worker counts as dead:
        waits up to `patience` seconds for a first one that does.
        """
        end = time.monotonic() + patience
        while not (dead := [n for n, pid in enumerate(self._pids) if pid != _NONE and not _lives(pid)]):
            if time.monotonic() >= end:
                break
            time.sleep(0.02)
        return [divmod(self._places[n], _SAMPLES) for n in dead if self._places[n] != _NONE]


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
