"""What commands show in a terminal. Names out of data are shown as they are: brackets in them mean nothing here."""

from __future__ import annotations

import os
import stat

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def console(stderr: bool = False) -> Console:
    """A console that takes `a[/b]` for a name and not for markup."""
    return Console(stderr=stderr, markup=False)


def progress(unit: str) -> Progress:
    """Bars on stderr, counted in `unit`, one for each task; they vanish at the end."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
    return Progress(*columns, TimeRemainingColumn(), TextColumn("left"), console=console(stderr=True), transient=True)


def leave_terminal() -> None:
    """Sends what this process still says to nowhere if it went to a terminal, which is gone: to write there is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # a terminal that is gone no longer says that it is one
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
