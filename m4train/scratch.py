"""One folder for all that is temporary in a command: sockets of data processes, logs of launchers, words between processes.

SIGKILL lets nobody tidy up. The folder belongs to a process by a lock that dies with it: whoever starts next removes the folders
that nobody holds, with the semaphores named after them. The same lock tells processes that were launched that their launcher is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

VARIABLE = "M4TRAIN_SCRATCH"  # the folder of who launched this process
PREFIX = "m4train-scratch-"
_OWNER = "owner"
_LONGEST = 60  # characters of a folder in which sockets still have names that the system takes
_YOUNG = 60.0  # seconds in which a folder may still be without its lock
_SEMAPHORES = Path("/dev/shm")


@contextmanager
def scratch() -> Iterator[None]:
    """Within it, temporary files of this process and of those it starts lie in a folder that does not outlive them for long."""
    folder = _launched_from() or _own(os.getpid())
    if folder is None:
        yield
        return
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before[1]
        if before[0] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[0]


@contextmanager
def launching() -> Iterator[None]:
    """Within it, processes that are started live as long as this one at most: a moment after its end they are asked to stop."""
    folder = _own(os.getpid())
    if folder is not None:
        os.environ[VARIABLE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(VARIABLE, None)


@cache
def _own(process: int) -> Path | None:
    """The folder of this process, which goes with it; None if the name of the place for temporary files is too long."""
    import fcntl
    from multiprocessing import util
    from multiprocessing.process import current_process

    place = Path(tempfile.gettempdir())
    sweep(place)
    if len(str(place)) + len(PREFIX) + 9 > _LONGEST:
        return None
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = (folder / _OWNER).open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    current_process()._config["semprefix"] = f"/{folder.name}"  # type: ignore[attr-defined]
    # after multiprocessing has ended its processes and removed its sockets, which lie in here
    util.Finalize(lock, shutil.rmtree, (folder, True), exitpriority=-200)
    _HELD.append(lock)
    return folder


_HELD: list[object] = []  # open as long as the process lives


def sweep(place: Path) -> None:
    """Removes what processes that were killed have left in the place for temporary files."""
    import fcntl

    for folder in place.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or another start sweeps, too
            lock = folder / _OWNER
            if not lock.exists() and time.time() - folder.stat().st_mtime < _YOUNG:
                continue
            with lock.open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for semaphore in _SEMAPHORES.glob(f"sem.{folder.name}-*"):
                    semaphore.unlink()
                shutil.rmtree(folder)


@cache
def _launched_from() -> Path | None:
    """The folder of the launcher, whose end is noticed from now on; None if there is no launcher of that kind."""
    name = os.environ.get(VARIABLE)
    if not name or not (Path(name) / _OWNER).exists():
        return None
    threading.Thread(target=_stop_with, args=(Path(name) / _OWNER,), name="launcher", daemon=True).start()
    return Path(name)


def _stop_with(lock: Path) -> None:
    import fcntl

    with lock.open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)  # comes when the launcher is gone, and keeps the folder for who still uses it
        _HELD.append(file)
        os.kill(os.getpid(), signal.SIGTERM)  # ends a run with a checkpoint
        threading.Event().wait()
