"""Names out of data are shown in tables and bars as they are, whatever brackets they hold."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.table import Table

from m4train import terminal
from m4train.inspection.replay import ReplayedSample, replay_table
from m4train.inspection.validate import SourceValidation, validation_tables

NAMES = ["a[/b]", "[red]x", "[/]", "[link=javascript:alert(1)]y[/link]", "[a", "\\[b]"]


def shown(table: Any) -> str:
    console = terminal.console()
    console.file, console.width = io.StringIO(), 200
    console.print(table)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_names_are_no_markup(name: str) -> None:
    table = Table(name, title=name)
    table.add_row(name)
    assert shown(table).count(name) == 3
    assert name in shown(name)
    sample = ReplayedSample(0, name, name, name, [[0, 1]], "", 0, None, [0, 1], [[0, 1]], 1, 0, name)
    assert name in shown(replay_table(1, [sample]))
    found = SourceValidation(name)
    found.samples, found.examples = 1, [{"key": name, "shard": name, "reason": "bad_json", "detail": name}]
    found.problems["bad_json"] = 1
    assert name in "".join(shown(table) for table in validation_tables([found]))


@pytest.mark.parametrize("name", NAMES)
def test_bars_take_any_name(name: str) -> None:
    with terminal.progress("samples") as bars:
        bars.console.file = io.StringIO()
        bars.add_task(name, total=1, completed=1)
        assert name in "".join(str(bars.columns[0].render(task)) for task in bars.tasks)
