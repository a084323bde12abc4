import subprocess
import sys

import pytest


@pytest.fixture
def m4train(digits_root, tmp_path):
    """Runs one command on the digits with a run directory of the test's own; returns the finished process."""

    def run(command, *overrides, root=digits_root, check=True, timeout=240):
        done = subprocess.run(
            [sys.executable, "-m", "m4train", *command.split(), *small_run(root, tmp_path), *overrides],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def small_run(root, tmp_path):
    """Overrides of a run of some seconds."""
    return [
        "experiment=digits_pretrain",
        f"data.root={root}",
        f"run_dir={tmp_path / 'run'}",
        "trainer.max_steps=12",
        "trainer.eval_every=0",
        "trainer.save_every=4",
        "trainer.log_every=1",
        "trainer.global_batch_size=2",
        "trainer.micro_batch_size=1",
        "schedule.warmup_steps=2",
        "data.sequence_length=256",
        "data.num_workers=1",
        "threads=1",
        "logging=none",
    ]
