"""What a warm process starts is warm too, and otherwise what a process of its own would be."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.helpers import warm

TELL = """
import json, os, sys
here = [sys.argv[1:], os.getcwd(), os.environ.get("WHO"), os.getppid(), os.getsid(0) == os.getpid(), "torch" in sys.modules]
print(json.dumps([*here, sys.stdin.read()]))
sys.exit(int(sys.argv[1]))
"""


def _starts(folder: str) -> None:
    command = [sys.executable, "-c", TELL, "7"]
    place = {"cwd": folder, "env": {**os.environ, "WHO": "me"}, "start_new_session": True}
    for _ in range(2):  # the second finds no spare
        done = subprocess.run(command, input="said", text=True, capture_output=True, **place)
        assert done.returncode == 7, done.stderr
        print(done.stdout.strip())
    print(os.getpid())


def test_a_spare_has_the_place_of_the_process_it_stands_for(tmp_path: Path) -> None:
    child = warm.start(_starts, str(tmp_path), output=tmp_path / "out", errors=tmp_path / "err", ready=1)
    assert child.wait(120) == 0, child.said()
    spare, real, parent = map(json.loads, (tmp_path / "out").read_text().splitlines())
    assert spare == [["7"], str(tmp_path), "me", parent, True, True, "said"]
    assert real == [*spare[:5], False, "said"]


def _works() -> bool:
    return "torch" in sys.modules


def _serves() -> None:
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        print(pool.apply(_works))


def test_a_server_of_processes_is_warm(tmp_path: Path) -> None:
    child = warm.start(_serves, output=tmp_path / "out", errors=tmp_path / "err", ready=1)
    assert child.wait(120) == 0, child.said()
    assert (tmp_path / "out").read_text() == "True\n"


def _hears(folder: str) -> None:
    heard = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    os.killpg(0, signal.SIGTERM)
    child = subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"], stdout=-1)
    assert child.stdout is not None
    assert child.stdout.readline() == b"up\n", "a signal from before it was started has ended it"
    child.send_signal(signal.SIGTERM)
    print(heard, child.wait(20))


def test_signals_reach_a_spare_once_it_is_started(tmp_path: Path) -> None:
    child = warm.start(_hears, str(tmp_path), output=tmp_path / "out", errors=tmp_path / "err", ready=1)
    assert child.wait(120) == 0, child.said()
    assert (tmp_path / "out").read_text() == "[15] -15\n"
