"""A build of an extension that was killed does not hold the next one."""

import contextlib
import multiprocessing
import os
import shutil
import signal
import time

import pytest

from m4train.training.engines.extensions import Baton, compile_in_turn


def _hold(path, ready):
    baton = Baton(path)
    assert baton.try_acquire()
    ready.set()
    signal.pause()


def test_a_lock_dies_with_its_owner(tmp_path):
    path = str(tmp_path / "lock")
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    owner = context.Process(target=_hold, args=(path, ready), daemon=True)
    owner.start()
    assert ready.wait(30)
    import fcntl

    with open(f"{path}.held") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # it is held indeed
    os.kill(owner.pid, signal.SIGKILL)
    baton = Baton(path)
    assert baton.try_acquire()  # would wait for ever
    baton.release()
    owner.join()


def test_torch_builds_next_to_the_lock_of_a_killed_build(tmp_path, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "FileBaton", cpp_extension.FileBaton)
    compile_in_turn()
    built = []
    monkeypatch.setattr(
        cpp_extension, "_write_ninja_file_and_build_library", lambda **options: built.append(options["name"])
    )
    monkeypatch.setattr(cpp_extension, "_import_module_from_library", lambda name, *rest: name)
    (tmp_path / "lock").touch()  # as torch's own lock stays
    (tmp_path / "a.cpp").touch()
    loaded = cpp_extension.load(name="m4train_test", sources=[str(tmp_path / "a.cpp")], build_directory=str(tmp_path))
    assert built == ["m4train_test"]
    assert loaded == "m4train_test"


SOURCE = 'extern "C" int m4train_answer() { return 42; }\n'
SLOW = """#!/bin/sh
case "$*" in *answer.cpp*) touch "$STARTED"; sleep "$PAUSE" ;; esac
exec c++ "$@"
"""


def _build(folder, compiler, environment):
    """Compiles and loads in a process group of its own, as a launched rank does."""
    from torch.utils import cpp_extension

    os.setsid()
    os.environ.update(environment, CXX=compiler)
    compile_in_turn()
    cpp_extension.load(
        name="m4train_answer",
        sources=[str(folder / "answer.cpp")],
        build_directory=str(folder / "build"),
        is_python_module=False,
    )
    (folder / f"built-{os.getpid()}").touch()


@pytest.mark.slow
@pytest.mark.parametrize("whole_group", [True, False], ids=["with its compiler", "alone"])
def test_a_build_that_is_killed_holds_neither_who_waits_nor_the_next_start(whole_group, tmp_path):
    """Ranks build in turn, the first for all: one that waited for a killed one compiles in its place, and a third finds all done."""
    pytest.importorskip("ninja", reason="extensions are compiled by ninja")
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    (tmp_path / "answer.cpp").write_text(SOURCE)
    (tmp_path / "build").mkdir()
    (tmp_path / "slow").write_text(SLOW)
    (tmp_path / "slow").chmod(0o755)
    context, started = multiprocessing.get_context("fork"), tmp_path / "started"
    build = lambda *given: context.Process(target=_build, args=(tmp_path, *given), daemon=True)
    compiler = str(tmp_path / "slow")
    first = build(compiler, {"STARTED": str(started), "PAUSE": "300"})
    first.start()
    _until(started.exists)
    second = build(compiler, {"STARTED": str(tmp_path / "second"), "PAUSE": "0"})
    second.start()
    second.join(0.5)
    assert second.is_alive()  # it waits for its turn
    (os.killpg if whole_group else os.kill)(first.pid, signal.SIGKILL)
    second.join(60)
    assert second.exitcode == 0
    third = build(compiler, {"STARTED": str(tmp_path / "third"), "PAUSE": "0"})
    third.start()
    third.join(60)
    assert third.exitcode == 0
    assert (tmp_path / "second").exists()
    assert not (tmp_path / "third").exists()  # nothing was compiled again
    assert len(list(tmp_path.glob("built-*"))) == 2
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)


def _until(there):
    deadline = time.monotonic() + 60
    while not there():
        assert time.monotonic() < deadline
        time.sleep(0.01)
