"""What commands show in a terminal and in log files. Names out of data are shown as they are: brackets in them mean nothing here.

In a terminal what goes on is a line at the bottom that changes, with rate and time left, or the time that has elapsed; in a log
file a line after two seconds, and then one a minute. `stage` names what a command does now, `counted` how far it is.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Column, Table
from rich.text import Text

SOON, EVERY = 2.0, 60.0  # seconds of a task before its first line in a log, and between two lines


def console(stderr: bool = False) -> Console:
    """A console that takes `a[/b]` for a name and not for markup."""
    return Console(stderr=stderr, markup=False)


class _Figures(ProgressColumn):
    """How far a task is."""

    def render(self, task: Task) -> Text:
        return Text(figures(task), no_wrap=True)


class Bars(Progress):
    """A line for each task, counted in `unit`, on stderr: in a terminal with a bar, and gone at the end."""

    def __init__(self, unit: str = "", shown: Console | None = None) -> None:
        shown = shown or console(stderr=True)
        self.unit, self._due, self._closed = unit, SOON, threading.Event()
        columns = (
            SpinnerColumn("line"),
            TextColumn("{task.description}", markup=False, table_column=_SHORTENED),
            _Bar(),
        )
        own = sys.stdout.isatty()  # or what is printed would go to the terminal instead of the file
        super().__init__(
            *columns,
            _Figures(),
            console=shown,
            transient=True,
            disable=not shown.is_terminal,
            redirect_stdout=own,
        )

    def add_task(self, description: str, *arguments: Any, **settings: Any) -> Any:
        return super().add_task(description, *arguments, unit=self.unit, **settings)

    def start(self) -> None:
        stage(None)
        super().start()
        if self.disable:
            threading.Thread(target=self._lines, name="progress", daemon=True).start()

    def stop(self) -> None:
        self._closed.set()
        super().stop()

    def postpone(self) -> None:
        """Something was said in the log: the next line is due a minute from now."""
        self._due = max([0.0, *(task.elapsed or 0.0 for task in self.tasks)]) + EVERY

    def _lines(self) -> None:
        while not self._closed.wait(0.5):
            for task in self.tasks:
                if not task.finished and (task.elapsed or 0.0) >= self._due:
                    self._due += EVERY
                    # not by rich's console: a line of a log is not cut at a width
                    print(f"m4train: {task.description}: {figures(task)}", file=sys.stderr, flush=True)


class _Bar(BarColumn):
    """A bar for what is counted."""

    def __init__(self) -> None:
        super().__init__(bar_width=12)

    def render(self, task: Task) -> Any:
        return super().render(task) if task.total else Text()


_SHORTENED = Column(overflow="ellipsis", no_wrap=True)


def figures(task: Task) -> str:
    """Count, rate and time left of a task, or how long it has taken if it is not counted."""
    if not task.total:
        return f"{_clock(task.elapsed or 0.0)} elapsed"
    unit, speed, left = task.fields.get("unit", ""), task.speed, task.time_remaining
    text = f"{task.completed:,.0f}/{task.total:,.0f} {unit}"
    if not speed or left is None:
        return f"{text}, {_clock(task.elapsed or 0.0)} elapsed"
    rate = f"{speed:,.1f}/s" if speed >= 0.1 else f"{1 / speed:,.0f} s each"
    return f"{text}, {rate}, {_clock(left)} left"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def progress(unit: str) -> Bars:
    """Bars on stderr, counted in `unit`, one for each task; they vanish at the end."""
    return Bars(unit)


_narrating = False
_now: Bars | None = None


@contextmanager
def narrated() -> Iterator[None]:
    """Within it, `stage` is shown by the first rank; elsewhere, as in programs that use this library, it is silent."""
    global _narrating
    before, _narrating = _narrating, os.environ.get("RANK", "0") == "0"
    try:
        yield
    finally:
        stage(None)
        _narrating = before


def stage(what: str | None, unit: str = "") -> None:
    """Shows what is done from now on, instead of what was shown before; None: nothing any more."""
    global _now
    if _now is not None:
        ended, _now = _now, None
        ended.stop()
    if what is not None and _narrating:
        begun = Bars(unit)
        begun.add_task(what, total=None)
        begun.start()
        _now = begun


def counted(done: int, total: int) -> None:
    """How far the stage is that is shown."""
    if _now is not None:
        _now.update(_now.task_ids[0], completed=done, total=total)


def fitted(table: Table, width: int) -> list[Table]:
    """The table as tables that fit `width` columns, each led by its first column, so that no cell is broken that fits a line."""
    widths = [max(map(_wide, [column.header, *column.cells])) + 3 for column in table.columns]
    blocks, found = fitting(widths, width - 1), []
    if len(blocks) == 1:
        return [table]
    for block in blocks:
        part = copy(table)
        part.columns = [copy(table.columns[number]) for number in block]
        for number, column in enumerate(part.columns):
            column._index = number
        part.title = table.title if block is blocks[0] else None
        found.append(part)
    return found


def fitting(widths: Sequence[int], width: int | None) -> list[list[int]]:
    """The numbers of columns of these widths in blocks of at most `width` (None: one block), the first column in each."""
    if width is None or sum(widths) <= width:
        return [list(range(len(widths)))]
    blocks = [[0]]
    for number in range(1, len(widths)):
        if len(blocks[-1]) > 1 and sum(widths[i] for i in [*blocks[-1], number]) > width:
            blocks.append([0])
        blocks[-1].append(number)
    return blocks


def _wide(cell: Any) -> int:
    return max(map(cell_len, str(cell).splitlines()), default=0)


def leave_terminal() -> None:
    """Sends what this process still says to nowhere if it went to a terminal, which is gone: to write there is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # a terminal that is gone no longer says that it is one
            os.dup2(nowhere, descriptor)
    os.close(nowhere)
