"""A hang is impossible to miss: every rank says where it is stuck, and ends."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from m4train import exits, startup, terminal
from m4train.batch import PackedBatch
from m4train.deaths import note_of
from m4train.run_files import STALLED

EXIT_CODE = exits.HUNG
TABLE = "ranks.txt"
PATIENCE = 4  # a stage of preparation may take this many times the timeout
_PREPARATION = ("checkpoint", "data", "index", "model")
_GRACE = 30.0  # seconds the ranks have to write down where they are, before they end


class Heartbeat:
    """Watches the progress of this rank from a thread of its own.

    After `timeout` seconds without a beat (0: never) the rank writes its step, stage and sample keys to
    `run_dir/stalled/rank-N.txt` and to standard error, rank 0 prints those of all ranks and keeps them in
    `run_dir/stalled/ranks.txt`, and the process ends with exit code 86. Ranks that wait for a stuck one stall with it, so
    that all of them report; none ends before rank 0 has spoken, since launchers kill the others when one ends.

    What comes before the first step (a checkpoint is checked, data made, an index built, a model read) makes no beats on the
    way and may rightly take long on one rank while the others wait: each of its stages has `PATIENCE` times the timeout.
    """

    def __init__(self, run_dir: Path, rank: int, world_size: int, timeout: float) -> None:
        self.folder = run_dir / STALLED
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self._stage, self._step = "start", 0
        self._batch: PackedBatch | None = None
        self._note = note_of(run_dir, rank)
        self.changed: Callable[[str], None] | None = None  # told what begins, each time that it is something else
        self._first = {"start": "starting the engine", "fetch": "the first step", "measure": None}
        self._last = time.monotonic()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self.tell: Callable[[str], None] | None = None  # called on rank 0 before it ends, with what the ranks said

    def start(self) -> None:
        """Begins to watch, unless it does already, and forgets what an earlier run left behind."""
        if self.timeout <= 0 or self._thread is not None:
            return
        for name in (_name(self.rank), *([TABLE] if self.rank == 0 else [])):
            (self.folder / name).unlink(missing_ok=True)
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> Heartbeat:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def beat(self, stage: str, step: int | None = None, batch: PackedBatch | None = None) -> None:
        """Notes progress: what begins now, at which step, with which samples. Costs a few assignments, and if a launcher wants to
        know where this rank died, a small write."""
        if stage != self._stage:
            self._show(stage)
        self._stage, self._batch = stage, batch
        self._step = self._step if step is None else step
        self._last = time.monotonic()
        if self._note is not None:
            documents, ahead = (batch.documents, batch.device.type != "cpu") if batch is not None else ((), False)
            self._note.write(stage, self._step, documents, ahead)

    def _show(self, stage: str) -> None:
        """Says what takes long before the first step is logged; later a callback does."""
        startup.stage(stage)
        if self.changed is not None:
            self.changed(stage)
        elif stage in self._first:
            terminal.stage(self._first.pop(stage))

    def describe(self) -> str:
        """One line: rank, stage, step and the keys of the current samples."""
        since = time.monotonic() - self._last
        keys = ", ".join(document.key for document in self._batch.documents) if self._batch is not None else "none"
        return f"rank {self.rank}: in {self._stage} of step {self._step} for {since:.0f} s, samples: {keys}"

    def _watch(self) -> None:
        interval, before = min(1.0, self.timeout / 4), time.monotonic()
        while not self._closed.wait(interval):
            now = time.monotonic()
            if (
                asleep := now - before - interval
            ) > interval:  # this process was stopped as a whole, as a suspended job is
                self._last = min(now, self._last + asleep)
            before = now
            limit = self.timeout * (PATIENCE if self._stage in _PREPARATION else 1)
            if time.monotonic() - self._last > limit:
                self._report(limit)

    def _report(self, limit: float) -> NoReturn:
        line = self.describe()
        times = f"{PATIENCE} times " if limit > self.timeout else ""
        print(f"No progress for {limit:.0f} s ({times}trainer.hang_timeout). {line}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(file=sys.stderr)
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(self.folder / _name(self.rank), line)
        paths = [self.folder / _name(rank) for rank in range(self.world_size)]
        if self.rank == 0:
            _wait_for(paths)
            lines = [
                path.read_text(encoding="utf-8").strip() if path.exists() else f"rank {rank}: said nothing"
                for rank, path in enumerate(paths)
            ]
            print("\n".join(lines), file=sys.stderr, flush=True)
            _write(self.folder / TABLE, "\n".join(lines))
            self._tell(lines[0])
        else:
            _wait_for([self.folder / TABLE])
        os._exit(EXIT_CODE)  # the main thread is stuck, often inside a collective that nothing can interrupt

    def _tell(self, line: str) -> None:
        """In a thread of its own, which may be stuck as well."""
        if self.tell is not None:
            telling = threading.Thread(target=self.tell, args=(line,), daemon=True)
            telling.start()
            telling.join(_GRACE)


def _write(path: Path, text: str) -> None:
    """Writes aside and renames, so that another rank never reads half of it."""
    aside = path.with_name(f".{path.name}")
    aside.write_text(text + "\n", encoding="utf-8")
    aside.rename(path)


def _wait_for(paths: list[Path]) -> None:
    """Until all are there, or the others have had time enough."""
    deadline = time.monotonic() + _GRACE
    while not all(path.exists() for path in paths) and time.monotonic() < deadline:
        time.sleep(0.05)


def _name(rank: int) -> str:
    return f"rank-{rank:05d}.txt"
