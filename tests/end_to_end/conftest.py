import subprocess

import pytest

from tests.helpers import warm


@pytest.fixture
def m4train(digits_root, tmp_path):
    """Runs one command on the digits with a run directory of the test's own; returns the finished process."""

    def run(command, *overrides, root=digits_root, check=True, timeout=240):
        child = warm.start_command(*command.split(), *small_run(root, tmp_path), *overrides, folder=tmp_path)
        try:
            code = child.wait(timeout)
        finally:
            child.kill()
        done = subprocess.CompletedProcess(command, code, child.output.read_text(), child.errors.read_text())
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
