"""A run that is stopped at any moment and started again ends as if nothing had happened."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.end_to_end.conftest import small_run

pytestmark = pytest.mark.slow


def _metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"], row["data_hash"]) for row in rows}


@pytest.fixture(scope="module")
def uninterrupted(digits_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    subprocess.run([sys.executable, "-m", "m4train", "train", *small_run(digits_root, folder)], check=True, timeout=240)
    return _metrics(folder / "run")


@pytest.mark.parametrize(
    ("how", "step"), [(signal.SIGKILL, 6), (signal.SIGKILL, 9), (signal.SIGINT, 3), (signal.SIGTERM, 7)]
)
def test_stopped_and_started_again(digits_root, tmp_path, uninterrupted, how, step):
    command = [sys.executable, "-m", "m4train", "train", *small_run(digits_root, tmp_path)]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    process.wait(timeout=100)
    assert (process.returncode == 0) == (how != signal.SIGKILL)  # a signal that can be heard ends in a checkpoint
    other_workers = ["data.num_workers=0"]
    subprocess.run([*command, *other_workers], check=True, timeout=240)
    assert _metrics(tmp_path / "run") == uninterrupted
