"""A Ctrl-C that Python or a library loses on its way is found before training begins; one that nobody could hear is obeyed."""

import os
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp

from m4train import cli, exits, launching
from m4train.training.checkpoints.tensor_files import read_tensors, stored_tensors
from m4train.training.stopping import StopRequests
from tests.helpers.training import TinyModel, make_config, make_trainer


class Freed:
    """Python prints what is raised here, and goes on."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):
            pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_lost_stops_before_the_first_step(monkeypatch, tmp_path, capsys):
    went_on = []

    def prepare(name, arguments):
        freed = Freed()
        del freed
        went_on.append("after")
        with StopRequests(tmp_path):
            went_on.append("trained")

    monkeypatch.setattr(cli, "COMMANDS", {"train": type("Command", (), {"run": staticmethod(prepare)})})
    assert cli.main(["train"]) == exits.INTERRUPTED
    assert went_on == ["after"]
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with exits.interrupts_noted():
        exits.check_interrupts()  # the next command starts anew


def test_an_interrupt_while_a_checkpoint_is_read_is_one(tmp_path, monkeypatch):
    make_trainer(make_config(tmp_path, stop_after=4), TinyModel()).train()
    (folder,) = (tmp_path / "checkpoints").iterdir()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(dcp.FileSystemReader, "read_data", interrupted)
    name, entry = next(iter(stored_tensors(folder / "tensors").items()))
    with pytest.raises(KeyboardInterrupt):
        read_tensors(folder / "tensors", {name: torch.empty(entry.size, dtype=entry.properties.dtype)})


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_signal_before_any_process_was_started_ends_the_launcher(number, raised, monkeypatch):
    import psutil

    monkeypatch.setattr(psutil.Process, "children", lambda self: [])
    with pytest.raises(raised), launching._signals_passed_on():
        signal.raise_signal(number)
