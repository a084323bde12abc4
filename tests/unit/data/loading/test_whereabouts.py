import subprocess
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from m4train.data.loading import whereabouts
from m4train.data.loading.whereabouts import Whereabouts
from m4train.data.plan.packing import Unit


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen]:
    """A process in the place of worker 1 of two."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(whereabouts, "get_worker_info", lambda: SimpleNamespace(id=1))
    monkeypatch.setattr(whereabouts.os, "getpid", lambda: process.pid)
    yield process
    process.kill()
    process.wait()


def _at(where: Whereabouts, sample: int | None) -> None:
    where(None if sample is None else Unit(source=2, sample=sample, epoch=0, first=0, last=-1, tokens=5, frames=0))


def test_a_worker_that_lives_is_not_accused(worker: subprocess.Popen) -> None:
    where = Whereabouts(2)
    _at(where, 7)
    assert where.of_the_dead(patience=0.05) == []


def test_a_worker_whose_end_is_noticed_before_it_is_dead_is_found(worker: subprocess.Popen) -> None:
    where = Whereabouts(2)
    _at(where, 7)
    threading.Timer(0.3, worker.kill).start()
    assert where.of_the_dead() == [(2, 7)]


def test_a_worker_that_dies_between_samples_is_at_none(worker: subprocess.Popen) -> None:
    where = Whereabouts(2)
    _at(where, 7)
    _at(where, None)
    worker.kill()
    assert where.of_the_dead() == []
