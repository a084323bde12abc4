"""Exit codes and last lines: what happened is said once, by one code."""

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from m4train import cli, exits, launching
from m4train.commands.train import make_run_dir
from m4train.config.compose import load_config
from m4train.errors import ConfigError
from m4train.training.engines.processes import _complete_environment
from m4train.training.stopping import forget_request
from tests.helpers import warm
from tests.helpers.training import TinyModel, make_config, make_trainer


def _train(run_dir, stop):
    """What `m4train train` does, on the tiny model, stopped in one of the ways."""
    import os
    import sys

    from m4train.commands import train as command
    from m4train.training.callbacks.base import Callback

    class At(Callback):
        def on_step_end(self, trainer):
            if trainer.step == 5 and stop == "stop_file":
                (Path(run_dir) / "stop").touch()
            if trainer.step == 5 and stop == "signal":
                os.kill(os.getpid(), signal.SIGTERM)

    config = make_config(run_dir, stop_after=6 if stop == "stop_after" else None)

    def trainer(config, engine, resume, heart, *lengths):
        made = make_trainer(config, TinyModel(), engine, steps=7 if stop == "end_of_data" else None)
        made.callbacks[:0] = [At()]
        if stop == "time_limit":
            made._stops.out_of_time = lambda: made.step == 5
        return made.train()

    command._train = trainer
    sys.exit(command.train(config))


@pytest.mark.parametrize(
    ("stop", "code", "step"),
    [
        ("max_steps", 0, 12),
        ("stop_after", 0, 6),
        ("end_of_data", 0, 7),
        ("signal", 3, 5),
        ("time_limit", 3, 5),
        ("stop_file", 3, 5),
    ],
)
def test_only_a_complete_run_ends_with_zero(stop, code, step, tmp_path):
    child = warm.start(_train, str(tmp_path / "run"), stop, output=tmp_path / "log")
    assert child.wait(120) == code, child.said()
    assert ("with a checkpoint: the same command goes on" in child.said()) == (code == 3)
    assert (tmp_path / "run" / "checkpoints" / f"step-{step:06d}").is_dir()
    if code == 3:  # a process of a group leaves word for its launcher, which would take 3 for a failure
        (tmp_path / "outcome").mkdir()
        again = warm.start(
            _train, str(tmp_path / "other"), stop, output=tmp_path / "log2", M4TRAIN_OUTCOME=str(tmp_path / "outcome")
        )
        assert again.wait(120) == 0
        assert exits.has_stopped_early(tmp_path / "outcome")


def test_a_stop_file_from_before_the_start_is_removed_with_a_note(tmp_path, capsys):
    forget_request(tmp_path)
    assert capsys.readouterr().out == ""
    (tmp_path / "stop").touch()
    forget_request(tmp_path)
    assert "was there before this start" in capsys.readouterr().out
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ConfigError("no such thing")])
def test_every_process_of_a_launch_says_a_sentence_once(error, tmp_path, monkeypatch, capsys):
    def failing(*arguments):
        raise error

    monkeypatch.setattr(cli.Command, "run", failing)
    monkeypatch.setenv(exits.FOLDER, str(tmp_path))
    codes = [cli.main(["train"]) for _ in range(3)]
    said = capsys.readouterr().err
    assert codes == [130 if isinstance(error, KeyboardInterrupt) else 2] * 3
    assert said.count("\n") == 1
    assert said.startswith("m4train")
    monkeypatch.delenv(exits.FOLDER)
    cli.main(["train"])
    assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("said", "train", "checkpoint", "expected"),
    [
        (True, True, True, "the reason is above."),
        (False, True, True, "the same command continues the run."),
        (False, True, False, "before there was a checkpoint; the same command starts the run again."),
        (False, False, True, "the others were stopped."),
    ],
)
def test_the_last_line_of_a_launcher_is_right(said, train, checkpoint, expected, tmp_path):
    if checkpoint:
        (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    for code, how in ((-9, "was ended by SIGKILL"), (1, "ended with exit code 1")):
        text = str(launching._explain(1, code, said, "", tmp_path if train else None))
        assert text.startswith(f"process 1 {how} and the others were stopped")
        killed = said and code < 0  # what the others say then is not why
        assert text.endswith("the same command continues the run." if killed else expected)


@pytest.mark.slow
def test_an_interrupt_while_a_run_is_prepared_is_one_sentence(tmp_path):
    child = warm.start_command("train", "experiment=digits_pretrain", "data.root=data", folder=tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "data.lock").exists() and time.monotonic() < deadline:  # the data is being built
        time.sleep(0.01)
    child.signal_group(signal.SIGINT)
    assert child.wait(60) == 130, child.said()
    assert "Traceback" not in child.said()
    assert child.said().count("interrupted at once") == 1


def test_what_the_system_refuses_is_one_sentence(monkeypatch, capsys, tmp_path):
    def failing(number, path):
        def run(*arguments):
            raise OSError(number, os.strerror(number), path) if number else OSError("a defect")

        return run

    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE, errno.ENOENT, errno.EIO):
        monkeypatch.setattr(cli.Command, "run", failing(number, "/some/where"))
        assert cli.main(["train"]) == 1
        said = capsys.readouterr().err
        assert said.startswith(f"m4train train: {os.strerror(number)}: /some/where; ")
        assert said.count("\n") == 1
    monkeypatch.setattr(cli.Command, "run", failing(None, None))
    monkeypatch.setattr(cli.tempfile, "tempdir", str(tmp_path))
    assert cli.main(["train"]) == 1  # a defect, whose traceback helps to find it
    assert capsys.readouterr().err.startswith(f"m4train train: OSError: a defect (where: {tmp_path}")
    monkeypatch.setattr(cli.Command, "run", failing(errno.EPIPE, None))
    monkeypatch.setattr(cli.os, "dup2", lambda *files: None)
    assert cli.main(["train"]) == 1  # as in `| head`
    assert capsys.readouterr().err == ""


def test_a_run_dir_that_cannot_be_one_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir .*file is a file: choose another folder"):
        make_run_dir(tmp_path / "file")
    with pytest.raises(ConfigError, match=r"run_dir .*below cannot be made \(Not a directory\)"):
        make_run_dir(tmp_path / "file" / "below")
    make_run_dir(tmp_path / "new" / "one")
    assert (tmp_path / "new" / "one").is_dir()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "2"}, "RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK"),
    ],
)
def test_half_an_environment_is_refused_in_a_sentence(variables, named, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    def join():
        launching.check_launched(load_config(["experiment=digits_pretrain", "engine=ddp"]))
        _complete_environment()

    with pytest.raises(ConfigError, match=named):
        join()
