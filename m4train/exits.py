"""How a command ended: one code and one sentence, however many processes worked on it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

COMPLETE = 0  # what was asked for is done
FAILED = 1
REFUSED = 2  # nothing was begun
STOPPED_EARLY = 3  # a signal, the time limit or the stop file ended the run with a checkpoint
HUNG = 86  # no progress: every rank has said where it is
INTERRUPTED = 130  # Ctrl-C, at once

# What asks a run to stop: a terminal's Ctrl-C and its end, launchers, SLURM.
STOPS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name))

FOLDER = "M4TRAIN_OUTCOME"  # the folder in which the processes of one launch leave word for who started them
_STOPPED = "stopped-early"


_interrupts: list[int] = []


@contextlib.contextmanager
def interrupts_noted() -> Iterator[None]:
    """Within it, an interrupt is remembered as well as raised: what is raised while an object is freed, or in a callback of a
    library, is lost."""

    def note(number: int, frame: FrameType | None) -> None:
        _interrupts.append(number)
        raise KeyboardInterrupt

    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if usual and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        _interrupts.clear()
        if signal.getsignal(signal.SIGINT) is note:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check_interrupts() -> None:
    """Raises KeyboardInterrupt if one was lost since the command began."""
    if _interrupts:
        raise KeyboardInterrupt


def say_once(sentence: str) -> None:
    """Prints a sentence to stderr, unless another process of the same launch has."""
    folder = os.environ.get(FOLDER)
    if folder:
        import hashlib  # here, as in other modules that every command loads, for a quick --help

        name = "said-" + hashlib.sha256(sentence.encode()).hexdigest()[:16]
        try:
            os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        except OSError:  # the folder is gone with who started this
            pass
    print(sentence, file=sys.stderr, flush=True)


def stopped_early() -> int:
    """The exit code of a process whose run stopped early.

    Launchers take every code but 0 for a failure, and kill the other processes: one that asked for word gets it instead.
    """
    folder = os.environ.get(FOLDER)
    if not folder:
        return STOPPED_EARLY
    with contextlib.suppress(OSError):
        os.close(os.open(os.path.join(folder, _STOPPED), os.O_CREAT))
    return COMPLETE


def has_stopped_early(folder: Path) -> bool:
    """Whether a process left word in `folder` that the run stopped early."""
    return (folder / _STOPPED).exists()


def has_said(folder: Path) -> bool:
    """Whether a process has said why it ended."""
    return any(folder.glob("said-*"))
