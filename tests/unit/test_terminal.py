"""Names out of data are shown in tables and bars as they are, whatever brackets they hold."""

from __future__ import annotations

import io
import re
import time
from typing import Any

import pytest
from rich.table import Table

from m4train import launching, terminal
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
        assert name in "".join(str(bars.columns[1].render(task)) for task in bars.tasks)


def test_a_stage_is_named_in_a_log_after_a_while_and_then_every_minute(capsys, monkeypatch) -> None:
    monkeypatch.setattr(terminal, "SOON", 0.0)
    monkeypatch.setattr(terminal, "EVERY", 0.0)
    said = ""
    with terminal.narrated():
        terminal.stage("reading the index of [a/b]", "shards")
        deadline = time.monotonic() + 30
        while "elapsed" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().err
        for done in range(1, 4):
            terminal.counted(done, 900)
            time.sleep(0.01)
        while "left" not in said and time.monotonic() < deadline:
            said += capsys.readouterr().err
    assert re.search(r"^m4train: reading the index of \[a/b\]: 0:00:\d\d elapsed$", said, re.MULTILINE)
    assert re.search(r"^m4train: reading the index of \[a/b\]: 3/900 shards, .*/s, \d+:\d\d:\d\d left$", said, re.M)


def test_nothing_is_shown_soon_nor_by_other_ranks_nor_outside_of_commands(capsys, monkeypatch) -> None:
    with terminal.narrated():
        terminal.stage("quick")
    terminal.stage("outside")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(terminal, "SOON", 0.0)
    with terminal.narrated():
        terminal.stage("of another rank")
        assert terminal._now is None
    assert capsys.readouterr().err == ""


def test_lines_of_a_log_are_a_minute_apart(capsys) -> None:
    bars = terminal.Bars("samples")
    bars.add_task("one", total=10)
    bars._due = 0.0
    bars.postpone()
    assert terminal.EVERY <= bars._due < terminal.EVERY + 5


@pytest.mark.parametrize("width", [80, 140])
def test_a_table_is_cut_into_tables_that_fit_and_break_no_cell(width: int) -> None:
    table = Table(title="a title")
    for number in range(14):
        table.add_column(f"column {number}", justify="right")
    table.add_row(*(f"a longer value {number}" for number in range(14)))
    console = terminal.console()
    console.file, console.width = io.StringIO(), width
    for part in terminal.fitted(table, width):
        console.print(part)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert [f"column {number}" in text and f"a longer value {number}" in text for number in range(14)] == [True] * 14
    assert text.count("a title") == 1
    assert terminal.fitted(table, 1000) == [table]


def test_a_log_keeps_whole_lines_without_what_moves_the_cursor(tmp_path, monkeypatch) -> None:
    stream = io.StringIO()
    with (tmp_path / "log").open("w") as log:
        both = launching._Both(stream, log)
        for text in (
            "one",
            " line\n\x1b[2Kbar 1\r\x1b[2Kbar 2",
            "\r\x1b[2Kstep 1\n",
            "bar 3\r",
            "\x1b[31mred\x1b[0m\n\nend",
        ):
            both.write(text)
    assert (tmp_path / "log").read_text() == "one line\nstep 1\nred\n\n"
    assert stream.getvalue().endswith("\n\nend")
