"""A build of an extension that was killed does not hold the next one."""

import multiprocessing
import os
import signal

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
