"""What the time before the first step goes into is printed once, logged once, and known of commands alone."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from m4train import startup
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def test_the_parts_of_a_command_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(startup.BEGAN, raising=False)
    before = time.time()
    startup.command("configuration")
    startup.enter("imports")
    startup.stage("index")
    time.sleep(0.02)
    startup.stage("beats of other stages")  # count as the part before
    startup.stage("forward")
    spent = startup.ended()
    assert list(spent) == ["python", "configuration", "imports", "index", "first step"]
    assert spent["index"] >= 0.02
    age = time.time() - (before - spent["python"])
    assert sum(spent.values()) == pytest.approx(age, abs=0.05)
    assert startup.ended() == {}
    startup.stage("forward")
    assert startup.ended() == {}, "no clock runs"


def test_a_launched_process_counts_from_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(startup.BEGAN, str(startup.began() - 5.0))
    startup.command("configuration")
    spent = startup.ended()
    assert spent["launch"] == pytest.approx(5.0, abs=0.05)
    assert startup.line(spent).startswith(f"start-up {sum(spent.values()):.1f} s: launch 5.0, python ")


@pytest.mark.parametrize("command", [True, False])
def test_a_run_says_and_logs_it_once(command: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if command:
        startup.command("imports")
    make_trainer(make_config(tmp_path, max_steps=3), TinyModel()).train()
    assert capsys.readouterr().out.count("start-up ") == command
    logged = [line for line in read_metrics(tmp_path) if "startup_seconds" in line]
    assert [line["step"] for line in logged] == [1] * command
    for line in logged:
        parts = [value for key, value in line.items() if key.startswith("startup/")]
        assert {"startup/imports", "startup/callbacks", "startup/first_batch", "startup/first_step"} <= line.keys()
        assert line["startup_seconds"] == pytest.approx(sum(parts))


def test_without_proc_a_process_begins_now(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr("builtins.open", nowhere)
    found = startup._own_start()
    monkeypatch.undo()
    assert abs(found - time.time()) < 1.0
    assert os.path.exists("/proc/self/stat") == (startup._own_start() < found)
