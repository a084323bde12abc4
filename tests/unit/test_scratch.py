"""What is temporary does not outlive its process for long, whatever ends it."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from m4train import scratch

ROOT = Path(__file__).parents[2]
USE = """
import multiprocessing, sys, tempfile, time
from m4train import scratch
from m4train.data.loading.processes import worker_context
if __name__ == "__main__":
    with scratch.scratch():
        queue = worker_context().Queue()
        open(tempfile.mkstemp()[1], "w")
        print(tempfile.gettempdir(), flush=True)
        if sys.argv[1:]:
            time.sleep(60)
"""


@pytest.fixture
def place():
    """A place for temporary files with a short name, as /tmp is."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="p") as folder:
        yield Path(folder)


def _start(place, *arguments, **environment):
    file = place / "use.py"
    file.write_text(USE)
    environment = {**os.environ, "TMPDIR": str(place), "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, str(file), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _left(place, name):
    return [*place.glob("m4train-*"), *place.glob("pymp-*"), *Path("/dev/shm").glob(f"sem.{name}*")]


def test_nothing_is_left_of_who_ends_by_itself(place):
    run = _start(place)
    said, _ = run.communicate(timeout=60)
    assert run.returncode == 0
    assert said.startswith(str(place / scratch.PREFIX))
    assert _left(place, Path(said.strip()).name) == []


@pytest.mark.parametrize("whole_group", [False, True])
def test_what_a_kill_left_goes_with_the_next_start(whole_group, place):
    run = _start(place, "wait")
    folder = Path(run.stdout.readline().strip())
    assert any(Path("/dev/shm").glob(f"sem.{folder.name}-*"))
    scratch.sweep(place)
    assert folder.exists()  # that of a process that lives is nobody's business
    (os.killpg if whole_group else os.kill)(run.pid, signal.SIGKILL)
    run.wait()
    assert folder.exists()
    scratch.sweep(place)
    assert _left(place, folder.name) == []


def test_who_was_launched_is_asked_to_stop_when_the_launcher_is_gone(place):
    launcher = _start(place, "wait")
    folder = launcher.stdout.readline().strip()
    child = _start(place, "wait", **{scratch.VARIABLE: folder})
    assert child.stdout.readline().strip() == folder
    launcher.kill()
    assert child.wait(timeout=30) == -signal.SIGTERM
    launcher.wait()


def test_a_fresh_folder_and_a_long_name_are_left_alone(place, monkeypatch):
    (place / f"{scratch.PREFIX}fresh").mkdir()
    scratch.sweep(place)
    assert (place / f"{scratch.PREFIX}fresh").exists()
    os.utime(place / f"{scratch.PREFIX}fresh", (time.time() - 99,) * 2)
    scratch.sweep(place)
    assert not (place / f"{scratch.PREFIX}fresh").exists()
    deep = place / ("x" * 80)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    scratch._own.cache_clear()
    with scratch.scratch():
        assert tempfile.gettempdir() == str(deep)
    scratch._own.cache_clear()
