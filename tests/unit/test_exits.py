"""Exit codes and last lines: what happened is said once, by one code."""

import signal
import time
from pathlib import Path

import pytest

from m4train import cli, exits, launching
from m4train.errors import ConfigError
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

    def trainer(config, engine, resume, heart):
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
        text = str(launching._explain(1, code, said, tmp_path if train else None))
        assert text.startswith(f"process 1 {how} and the others were stopped")
        assert text.endswith(expected)


@pytest.mark.slow
def test_an_interrupt_while_a_run_is_prepared_is_one_sentence(tmp_path):
    child = warm.start_command("train", "experiment=digits_pretrain", "data.root=data", folder=tmp_path)
    deadline = time.monotonic() + 100
    while not (tmp_path / "data").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.signal_group(signal.SIGINT)
    assert child.wait(60) == 130, child.said()
    assert "Traceback" not in child.said()
    assert child.said().count("interrupted at once") == 1
