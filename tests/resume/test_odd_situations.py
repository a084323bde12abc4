"""What happens to runs around their steps: places that move, vanish, fill up or are links, clocks and terminals that go away."""

import errno
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from m4train import cli, exits
from m4train.errors import CheckpointError, ConfigError
from m4train.run_files import METRICS
from m4train.training.callbacks.base import Callback
from m4train.training.checkpoints.find import find_checkpoint
from m4train.training.claim import claim
from m4train.training.heartbeat import EXIT_CODE, Heartbeat
from m4train.training.stopping import forget_request
from tests.helpers import warm
from tests.helpers.training import TinyModel, make_config, make_trainer, read_metrics


def _trainer(run_dir, **options):
    return make_trainer(make_config(run_dir, **{"save_every": 2, "keep_last": 2, **options}), TinyModel())


def _steps(run_dir):
    return [line["step"] for line in read_metrics(run_dir)]


class At(Callback):
    """Does something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, trainer):
        if trainer.step == self.step:
            self.action()


# Links and foreign things


def test_a_run_behind_a_link_is_the_run(tmp_path):
    """A run directory moved to another disk, with a link in its old place: it goes on, and one at a time trains it."""
    _trainer(tmp_path / "run", stop_after=4).train()
    (tmp_path / "run").rename(tmp_path / "disk")
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    trainer = _trainer(tmp_path / "run", stop_after=4)
    with claim(tmp_path / "run", trainer.engine), pytest.raises(ConfigError, match="is being trained by process"):
        claim(tmp_path / "disk", trainer.engine)
    assert trainer.train().step == 8
    assert (tmp_path / "run").is_symlink()
    assert _steps(tmp_path / "disk") == list(range(1, 9))


def test_checkpoints_that_are_links_are_pruned_and_what_they_point_to_stays(tmp_path):
    run, archive = tmp_path / "run", tmp_path / "archive"
    _trainer(run, stop_after=4).train()
    archive.mkdir()
    for path in (run / "checkpoints").iterdir():
        path.rename(archive / path.name)
        path.symlink_to(archive / path.name)
    assert _trainer(run, stop_after=4).train().step == 8
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000006", "step-000008"]
    assert len(list(archive.glob("step-*/manifest.json"))) == 2


def test_the_folder_of_checkpoints_may_be_a_link(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "disk").mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "disk")
    for last in (4, 8):
        assert _trainer(run, stop_after=4).train().step == last
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["step-000006", "step-000008"]


def test_foreign_things_among_checkpoints_are_passed_over_and_cost_no_save(tmp_path):
    run = tmp_path / "run"
    _trainer(run, stop_after=4).train()
    folder = run / "checkpoints"
    (folder / "step-000009").write_text("a file")  # newer than all, and no folder
    (folder / "step-000001").symlink_to(tmp_path / "nowhere")
    (folder / "step-000004.bak").mkdir()
    (folder / ".writing-step-000006").write_text("a file")
    said = []
    assert find_checkpoint(make_config(run), said.append).step == 4
    assert "step-000009" in said[0]
    assert _trainer(run, stop_after=6).train().step == 10
    assert _steps(run) == list(range(1, 11))
    assert {path.name for path in folder.iterdir()} == {"step-000008", "step-000010", "step-000004.bak"}


def test_a_stop_file_that_is_a_folder_is_obeyed_and_removed(tmp_path, capsys):
    trainer = _trainer(tmp_path)
    trainer.callbacks.append(At(3, (tmp_path / "stop").mkdir))
    assert trainer.train().stopped_by == "stop_file"
    assert not (tmp_path / "stop").exists()
    (tmp_path / "stop").mkdir()
    (tmp_path / "stop" / "note").touch()
    forget_request(tmp_path)
    assert not (tmp_path / "stop").exists()
    assert "was there before this start" in capsys.readouterr().out


# Requests at odd moments


def test_a_stop_file_made_while_the_held_out_loss_is_measured(tmp_path):
    """In the middle it stops the run after that measurement; at the last one the run is complete, and the file is of no start."""
    for steps, expected in ((12, ("stop_file", 3)), (3, ("max_steps", 3))):
        run = tmp_path / str(steps)
        trainer = _trainer(run, eval_every=3, max_steps=steps)
        held_out = trainer.validation

        def measured(run=run, held_out=held_out):
            (run / "stop").touch()
            return held_out()

        trainer.validation = measured
        result = trainer.train()
        assert (result.stopped_by, result.step) == expected
        assert "eval/loss" in read_metrics(run)[2]
        assert find_checkpoint(make_config(run, max_steps=steps)).step == 3


@pytest.fixture
def heard():
    """SIGHUP is not ignored, as it is where nohup began the tests."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_in_a_save_beside_training_waits_for_it(number, tmp_path, heard):
    trainer = _trainer(tmp_path)
    trainer.callbacks.append(At(4, lambda: os.kill(os.getpid(), number)))  # the save of step 4 is under way
    result = trainer.train()
    assert (result.stopped_by, result.step) == ("signal", 4)
    assert find_checkpoint(make_config(tmp_path)).step == 4
    assert signal.getsignal(number) == signal.SIG_DFL


def test_nohup_keeps_a_run_from_the_end_of_its_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        trainer = _trainer(tmp_path)
        trainer.callbacks.append(At(4, lambda: os.kill(os.getpid(), signal.SIGHUP)))
        assert trainer.train().stopped_by == "max_steps"
    finally:
        signal.signal(signal.SIGHUP, before)


def _hang_up(run_dir):
    """Trains in a terminal that is gone after step 3: from then on each word to it is an error."""
    import pty

    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    master, slave = pty.openpty()
    for descriptor in (1, 2):
        os.dup2(slave, descriptor)
    os.close(slave)
    config = make_config(run_dir, save_every=100)
    config.logging.console = True
    trainer = make_trainer(config, TinyModel())
    trainer.callbacks += [At(3, lambda: os.close(master)), At(3, lambda: os.kill(os.getpid(), signal.SIGHUP))]
    assert trainer.train().stopped_by == "signal"
    print("stopped", flush=True)


def test_a_terminal_that_is_closed_ends_the_run_with_a_checkpoint(tmp_path):
    child = warm.start(_hang_up, str(tmp_path / "run"), output=tmp_path / "log")
    assert child.wait(timeout=100) == 0
    assert find_checkpoint(make_config(tmp_path / "run")).step == 3


def _stuck(folder, seconds):
    with Heartbeat(Path(folder), 0, 1, 2.0) as heart:
        heart.beat("update")
        Path(folder, "begun").touch()
        time.sleep(seconds)


@pytest.mark.slow
@pytest.mark.parametrize(("stuck", "code"), [(1.0, 0), (60.0, EXIT_CODE)])
def test_a_suspended_process_does_not_hang_and_a_hang_after_it_is_found(stuck, code, tmp_path):
    """SIGSTOP, a suspended job, a laptop that sleeps: the time in which nothing could run does not count."""
    child = warm.start(_stuck, str(tmp_path), stuck, output=tmp_path / "log")
    while not (tmp_path / "begun").exists():
        assert child.poll() is None
        time.sleep(0.01)
    child.signal(signal.SIGSTOP)
    time.sleep(3.0)
    child.signal(signal.SIGCONT)
    assert child.wait(timeout=60) == code, child.said()


# Clocks


def test_a_clock_that_jumps_changes_nothing(tmp_path, monkeypatch):
    """Of what is said when, and what ends when: all of it is counted by a clock that no one sets."""
    _trainer(tmp_path / "whole").train()
    real, jumps = time.time, iter((0.0, 1e6, -1e8, 3e8, -1e9) * 10_000)
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    for last in (4, 12):
        trainer = _trainer(tmp_path / "run", max_hours=1.0, hang_timeout=60.0, stop_after=None if last == 12 else 4)
        assert trainer.train().step == last
    pairs = zip(read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "run"), strict=True)
    for whole, jumped in pairs:
        assert jumped["loss"] == whole["loss"]
        assert jumped["tokens_per_second"] > 0
        assert 0 <= jumped["data_wait_fraction"] <= 1


@pytest.mark.parametrize("shift", [-(10**9), 10**9])
def test_checkpoints_of_another_time_are_ordered_by_their_steps(shift, tmp_path):
    _trainer(tmp_path, stop_after=4).train()
    for path in sorted((tmp_path / "checkpoints").rglob("*")):
        os.utime(path, (time.time() + shift * (path.name == "step-000004"),) * 2)
    assert _trainer(tmp_path).train().step == 12
    assert _steps(tmp_path) == list(range(1, 13))


# Places that fill up, vanish, or refuse


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EMFILE])
def test_a_folder_of_checkpoints_that_refuses_keeps_the_last_one(number, tmp_path, monkeypatch):
    from m4train.training.checkpoints import save

    _trainer(tmp_path, stop_after=4).train()

    def refuse(aside):
        raise OSError(number, os.strerror(number), str(aside))

    monkeypatch.setattr(save, "_make_folder", refuse)
    with pytest.raises(CheckpointError) as caught:
        _trainer(tmp_path).train()
    said = str(caught.value)
    assert os.strerror(number) in said
    assert str(tmp_path / "checkpoints") in said
    assert said.endswith("step-000004 before it is kept.")
    monkeypatch.undo()
    assert _trainer(tmp_path).train().step == 12
    assert _steps(tmp_path) == list(range(1, 13))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, which stands for a full disk")
@pytest.mark.parametrize("held", [False, True])
def test_a_disk_that_is_full_for_metrics_is_said_with_what_is_kept(held, tmp_path, monkeypatch, capsys):
    from m4train.commands import train as command

    if held:
        _trainer(tmp_path, stop_after=4).train()
        (tmp_path / METRICS).unlink()
    (tmp_path / METRICS).symlink_to("/dev/full")
    monkeypatch.setattr(command, "_train_claimed", lambda config, callbacks: _trainer(config.run_dir).train())
    arguments = ["experiment=digits_pretrain", f"run_dir={tmp_path}"]
    assert cli.main(["train", *arguments]) == exits.FAILED
    said = capsys.readouterr().err.strip()
    assert "No space left on device" in said
    assert str(tmp_path / METRICS) in said
    assert said.endswith("Step-000004 is kept." if held else "There is no checkpoint yet.")
    assert len(said.splitlines()) == 1


# Keys that change together


def test_accumulation_batch_and_precision_change_at_once(tmp_path):
    """As a person does who moves a run to another machine: each step is there once, with the packs of its own start."""
    changes = [{"micro_batch_size": 1}, {"micro_batch_size": 3, "precision": "bf16"}, {"gradient_checkpointing": True}]
    for number, change in enumerate(changes):
        stop = 4 if number < 2 else None
        trainer = _trainer(tmp_path, stop_after=stop, **change)
        assert trainer.train().step == 4 * (number + 1)
    whole = tmp_path / "whole"
    _trainer(whole).train()
    pairs = list(zip(read_metrics(tmp_path), read_metrics(whole), strict=True))
    assert all(a["data_hash"] == b["data_hash"] for a, b in pairs)
    assert [a["loss"] for a, _ in pairs] == pytest.approx(
        [b["loss"] for _, b in pairs], rel=torch.finfo(torch.bfloat16).eps
    )


def test_a_run_that_is_copied_goes_on_in_both_places(tmp_path):
    _trainer(tmp_path / "a", stop_after=4).train()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for name in ("a", "b"):
        assert _trainer(tmp_path / name).train().step == 12
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("a", "b")]
    assert losses[0] == losses[1]
