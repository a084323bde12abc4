"""A run that is stopped at any moment and started again ends as if nothing had happened."""

import json
import signal
import time

import pytest

from m4train import exits
from tests.end_to_end.conftest import small_run
from tests.helpers import warm

pytestmark = pytest.mark.slow


def _metrics(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"], row["data_hash"]) for row in rows}


def _run(digits_root, folder):
    """Long enough that no kill comes too late."""
    return [*small_run(digits_root, folder), "trainer.max_steps=20"]


@pytest.fixture(scope="module")
def uninterrupted(digits_root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run = warm.start_command("train", *_run(digits_root, folder), folder=folder)
    assert run.wait(timeout=240) == 0, run.said()
    return _metrics(folder / "run")


@pytest.mark.parametrize(
    ("how", "step"),
    [
        (signal.SIGKILL, 6),
        pytest.param(signal.SIGKILL, 9, marks=pytest.mark.full),
        (signal.SIGINT, 3),
        (signal.SIGTERM, 7),
    ],
)
def test_stopped_and_started_again(digits_root, tmp_path, uninterrupted, how, step):
    command = ["train", *_run(digits_root, tmp_path)]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = warm.start_command(*command, folder=tmp_path)
    deadline = time.monotonic() + 200
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    if how == signal.SIGKILL:
        process.signal(how)
    else:  # its data processes hear it too
        process.signal_group(how)
    # a signal that can be heard ends in a checkpoint
    assert process.wait(timeout=100) == (-how if how == signal.SIGKILL else exits.STOPPED_EARLY)
    again = warm.start_command(*command, "data.num_workers=0", folder=tmp_path)
    assert again.wait(timeout=240) == 0, again.said()
    assert _metrics(tmp_path / "run") == uninterrupted
