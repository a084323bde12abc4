"""Requests to stop: signals, a stop file and a time limit, noticed by one rank and agreed by all at a step border."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from m4train.durable import remove
from m4train.exits import STOPS, check_interrupts
from m4train.run_files import STOP
from m4train.terminal import leave_terminal


def forget_request(run_dir: Path) -> None:
    """Removes a stop file that was there before the run started, which was meant for another start, and says so."""
    if (run_dir / STOP).exists():
        remove(run_dir / STOP)
        print(
            f"{run_dir / STOP} was there before this start and is removed; make it again to stop this one.", flush=True
        )


class StopRequests:
    """Listens for SIGINT, SIGTERM, SIGUSR1, SIGHUP and the file `run_dir/stop`, of a stage also that of the `whole`, while it is
    open.

    A second SIGINT is not caught, so that a user can always leave. SIGHUP stays ignored if it is, as nohup asks; it says that the
    terminal is gone, so that nothing more is written to it. Handlers are put back on exit.
    """

    def __init__(self, run_dir: Path, max_hours: float | None = None, whole: Path | None = None) -> None:
        self.files = [folder / STOP for folder in (run_dir, whole) if folder is not None]
        self._deadline = None if max_hours is None else time.monotonic() + 3600.0 * max_hours
        self._received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequests:
        check_interrupts()  # of what came before
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        if self._received == "SIGHUP":
            leave_terminal()
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def signalled(self) -> bool:
        """Whether a signal arrived at this rank."""
        return self._received is not None

    def file_present(self) -> bool:
        """Whether a stop file exists."""
        return any(file.exists() for file in self.files)

    def out_of_time(self) -> bool:
        """Whether this process has trained for its `max_hours`."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def clear(self) -> None:
        """Removes the stop file once it was obeyed, so that the next run does not stop at once."""
        for file in self.files:
            remove(file)
